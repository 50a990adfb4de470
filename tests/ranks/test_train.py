"""train.py gives the same weights at any number of ranks and any accumulation."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from forks import place
from safetensors.torch import load_file

from launch import HERE, environment, play_train, run

STEPS, BATCH = 20, 24
DIGITS = ["--data", "digits", "--steps", str(STEPS), "--batch_size", str(BATCH), "--k", "3"]
# Everything random at once: drawn by sample, so that it cannot depend on who draws.
RANDOM = ["--drop_path", "0.3", "--augment", "crop,flip,randaugment,mixup", "--clip", "1"]
ADAM_EPS = ["--eps", "1e-4"]  # with 1e-8, rounding near a zero gradient becomes a step of size lr
RUNS = {
    # name: (flags, largest difference in any weight)
    "look_sam-sgd": (["--optimizer", "look_sam", "--base", "sgd"], 1e-6),
    "look_sam-sgd-random": (["--optimizer", "look_sam", "--base", "sgd", *RANDOM], 1e-6),
    "look_sam-adamw": (["--optimizer", "look_sam", *ADAM_EPS], 2e-5),
    "look_layer_sam-lamb": (["--optimizer", "look_layer_sam", *ADAM_EPS, *RANDOM], 2e-5),
}
ACCUMULATIONS = (1, 2, 4)


def micro_batch(ranks: int, accumulation: int) -> int:
    return BATCH // (ranks * accumulation)


def played(ranks: int, accumulation: int, name: str) -> bool:
    """Mixing needs pairs; and 2 is between 1 and 4."""
    pairs = micro_batch(ranks, accumulation) % 2 == 0
    return ("--augment" not in RUNS[name][0] or pairs) and (
        accumulation != 2 or name == "look_sam-sgd"
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(ranks, accumulation, name) -> run directory; each number of ranks is started once."""
    folder = tmp_path_factory.mktemp("train")
    started = set()

    def of(ranks: int, accumulation: int, name: str):
        if ranks not in started:
            started.add(ranks)
            cases = [
                [*DIGITS, *flags, "--micro_batch", str(micro_batch(ranks, a)),
                 "--out", str(folder / f"{ranks}-{a}-{n}")]
                for n, (flags, _) in RUNS.items() for a in ACCUMULATIONS
                if played(ranks, a, n)
            ]  # fmt: skip
            play_train(folder, ranks, cases, 1400)
        return folder / f"{ranks}-{accumulation}-{name}"

    return of


@pytest.mark.parametrize("ranks, accumulation, name", [
    (ranks, accumulation, name)
    for ranks in (1, 2, 3) for accumulation in ACCUMULATIONS for name in RUNS
    if played(ranks, accumulation, name)
])  # fmt: skip
def test_the_weights_depend_on_the_global_batch_alone(trained, ranks, accumulation, name):
    want = load_file(trained(1, 1, name) / "model.safetensors")
    got = load_file(trained(ranks, accumulation, name) / "model.safetensors")
    worst = max(float((got[n] - want[n]).abs().max()) for n in want)
    assert worst < RUNS[name][1]


@pytest.mark.parametrize("name", RUNS)
def test_that_is_no_wonder_of_small_steps(trained, name):
    """Other samples move the weights a thousand times further than the tolerance."""
    torch.manual_seed(0)
    from dist_looksam import models

    start = models.create("vit_8", num_classes=10, image_shape=(1, 8, 8)).state_dict()
    end = load_file(trained(1, 1, name) / "model.safetensors")
    assert max(float((end[n] - start[n]).abs().max()) for n in end) > 1000 * RUNS[name][1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_summary_says_who_trained(trained, ranks):
    summary = json.loads((trained(ranks, 2, "look_sam-sgd") / "summary.json").read_text())
    assert summary["world_size"] == ranks
    assert summary["backend"] == ("plain" if ranks == 1 else "ddp")
    assert summary["batch_size"] == BATCH
    looks = -(-STEPS // 3)
    assert summary["forward_backward_passes"] == STEPS + looks


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_measured_on_the_way_does_not_depend_on_ranks_either(trained, ranks):
    def rows(of: int):
        text = (trained(of, 1, "look_sam-sgd-random") / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    for got, want in zip(rows(ranks), rows(1), strict=True):
        for field in set(want) - {"images_per_s", "seconds"}:
            if want[field] is None:  # of a GPU, or of looks alone
                assert got[field] is None, field
            else:
                assert got[field] == pytest.approx(want[field], rel=1e-3, abs=1e-6), field


def test_a_signal_that_one_rank_alone_has_heard_stops_all_by_its_name(tmp_path):
    """SLURM tells all ranks, but not in one moment.
    Rank 0 then wrote of a SIGTERM that nobody had sent."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, str(HERE.parents[1] / "train.py"), "--data", "digits", "--workers"]
    command += ["0", "--device", "cpu", "--batch_size", "16", "--steps", "100000", "--save_every"]
    command += ["1", "--backend", "ddp", "--out", str(tmp_path / "run")]
    places = [{k: str(v) for k, v in place(rank, 2).items()} for rank in range(2)]
    ranks = [
        subprocess.Popen(
            command, env=environment(MASTER_PORT=port, **here), stdout=subprocess.PIPE, text=True
        )
        for here in places
    ]
    try:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("run/checkpoints/step-*")) and time.monotonic() < end:
            time.sleep(0.1)
        ranks[1].send_signal(signal.SIGUSR1)
        said, _ = ranks[0].communicate(timeout=60)
        assert ranks[1].wait(timeout=60) == ranks[0].returncode == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert re.search(r"^SIGUSR1 after step \d+: saved step-\d+", said, re.MULTILINE), said


@pytest.mark.needs("deepspeed")
def test_sharded_ranks_greet_with_all_parameters_and_end_with_1_if_nothing_is_learnt(tmp_path):
    """ZeRO 3 said 0 parameters: a rank holds none of them between steps."""
    flags = [*DIGITS[:2], "--steps", "30", "--model", "vit_8", "--device", "cpu", "--batch_size"]
    flags += ["16", "--optimizer", "adamw", "--lr", "1e9", "--max_skips", "6"]
    flags += ["--save_every", "10", "--out"]  # before it, steps in a row are counted
    on = {"zero": ["--zero_stage", "3"], "fsdp2": []}
    jobs = [[2, [*flags, str(tmp_path / o), "--backend", o, *on[o]], None, 1] for o in on]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run([sys.executable, str(HERE / "data_kinds_worker.py"), str(tmp_path / "jobs.json")], 600, {})
    for name in on:
        log = (tmp_path / name / "log.txt").read_text()
        assert "vit_8 (202,058 parameters)" in log and "nothing was learnt after step" in log
        assert json.loads((tmp_path / name / "summary.json").read_text())["steps"] < 30
    assert (tmp_path / "log").read_text().count("error: nothing was learnt") == len(on)
