"""train.py --backend fsdp2: the weights of one process, what a launcher gives, what it costs."""

import json
import re
import sys

import pytest
from safetensors.torch import load_file
from test_train import BATCH, DIGITS, RANDOM, RUNS

from dist_looksam.run.train import main
from launch import HERE, HOROVOD, play_train, run

TRAIN = str(HERE.parents[1] / "train.py")
NAMES = ("look_sam-sgd-random", "look_layer_sam-lamb")


def flags(name: str, ranks: int, accumulation: int) -> list[str]:
    micro = BATCH // (ranks * accumulation)
    return [*DIGITS, *RUNS[name][0], "--micro_batch", str(micro), "--device", "cpu"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(ranks, name) -> run directory; ranks 0 is one process of plain."""
    folder = tmp_path_factory.mktemp("fsdp2-train")
    for ranks, accumulation in ((1, 1), (2, 2), (3, 2)):
        cases = []
        for name in NAMES if ranks != 3 else NAMES[:1]:
            more = ["--out", str(folder / f"{ranks}-{name}"), "--backend", "fsdp2"]
            cases.append([*flags(name, ranks, accumulation), *more])
            if ranks == 1:
                more = ["--out", str(folder / f"0-{name}"), "--backend", "plain"]
                cases.append([*flags(name, 1, 1), *more])
        if ranks == 2:
            low = ["--optimizer", "look_sam", "--precision", "fp16", "--steps", "12"]
            to = ["--backend", "fsdp2", "--out", str(folder / "2-fp16"), "--eval_every", "4"]
            cases.append([*DIGITS[:2], "--batch_size", "24", "--device", "cpu", *low, *to])
        play_train(folder, ranks, cases, 400)
    return folder


@pytest.mark.parametrize("ranks, name", [*((n, NAMES[0]) for n in (1, 2, 3)), (2, NAMES[1])])
def test_the_weights_are_those_of_one_process(trained, ranks, name):
    """With accumulation, drop-path, augmentation, clipping."""
    want, got = (load_file(trained / f"{n}-{name}" / "model.safetensors") for n in (0, ranks))
    assert list(got) == list(want)
    assert max(float((got[n] - want[n]).abs().max()) for n in want) < RUNS[name][1]
    assert RANDOM[0] in RUNS[name][0]
    summary = json.loads((trained / f"{ranks}-{name}" / "summary.json").read_text())
    assert (summary["backend"], summary["world_size"]) == ("fsdp2", ranks)


def test_fp16_finds_a_scale_trains_and_is_evaluated_on_the_way(trained):
    rows = [json.loads(x) for x in (trained / "2-fp16" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(evaluated) == 3 and evaluated[-1] < evaluated[0]
    assert sum(not row["skipped"] for row in rows if "skipped" in row) >= 8


@pytest.mark.needs("mpi")
def test_mpirun_starts_it(trained, tmp_path):
    command = [*HOROVOD["mpirun"].split(), "-np", "2", sys.executable, TRAIN, "--backend", "fsdp2"]
    name = NAMES[1]
    run([*command, *flags(name, 2, 1), "--out", str(tmp_path / "run")], 200, {})
    want, got = (
        load_file(p / "model.safetensors") for p in (trained / f"0-{name}", tmp_path / "run")
    )
    assert max(float((got[n] - want[n]).abs().max()) for n in want) < RUNS[name][1]


def test_cost_counts_it(tmp_path):
    """The table of docs/fsdp.md."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "dist_looksam.cli.main", "cost", "--data", "digits"]
    command += ["--backend", "fsdp2", "--json", str(tmp_path / "cost.json")]
    print(run(command, 200, {}))
    rows = json.loads((tmp_path / "cost.json").read_text())
    base, look, reuse = (rows[n]["elements"] for n in ("base", "look", "reuse"))
    for kind in ("all_gather", "reduce_scatter"):
        assert look[kind] == 2 * base[kind] and reuse[kind] == base[kind] > 0
    assert 0 <= reuse["all_reduce"] - base["all_reduce"] <= 4 * rows["layers"]


@pytest.mark.parametrize(
    "more, says",
    [
        (["--offload"], "offload is of backend zero, got backend fsdp2; leave it out or use"),
        (
            ["--zero_stage", "3"],
            "zero_stage is of the backends zero and horovod, got backend fsdp2",
        ),
        (["--shard_ranks", "2"], "shard_ranks must divide the 1 ranks, got 2; use one of 1"),
    ],
)
def test_what_it_cannot_do_is_one_sentence_before_training(more, says, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(["--data", "digits", "--backend", "fsdp2", *more, "--out", str(out)]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and says in told and not out.exists()


def test_the_loop_of_the_documentation_runs_as_it_stands(tmp_path):
    text = (HERE.parents[1] / "docs" / "fsdp.md").read_text()
    script = tmp_path / "own.py"
    script.write_text(text.split("```python\n")[1].split("```\n")[0])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    said = run(["env", "-C", str(tmp_path), *command, str(script)], 120, {})
    assert sorted(re.findall(r"rank (\d): step 9, loss", said)) == ["0", "1"]  # lines may mingle
    assert (tmp_path / "checkpoints" / "step-10" / "manifest.json").exists()
