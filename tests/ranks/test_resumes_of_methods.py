"""Runs of train.py with m, adaptive looks, gsam, msam, --perturb and schedules of rho go on to the
bit from their checkpoints, and on other numbers of ranks as they would have."""

import json

import pytest
import torch
from safetensors.torch import load_file

from launch import play_trains

pytestmark = pytest.mark.needs("deepspeed")

STEPS, DONE = 12, 5
FLAGS = ["--data", "digits", "--steps", str(STEPS), "--batch_size", "24", "--base", "sgd"]
FLAGS += ["--save_every", str(DONE), "--workers", "0", "--device", "cpu"]
HOW = {  # GROUP: the smallest m of the backend
    "adaptive": "look_layer_sam --k 3 --looks adaptive --perturb norms --group GROUP",
    "gsam": "gsam --rho_schedule cosine --rho_warmup_steps 3 --group GROUP",
    "msam": "msam --rho_schedule linear --rho_end 2 --perturb norms",
}
WAYS = {
    (2, "ddp"): ["--backend", "ddp", "--micro_batch", "6"],
    (2, "fsdp2"): ["--backend", "fsdp2", "--micro_batch", "6"],
    (4, "blocks"): ["--backend", "fsdp2", "--shard_ranks", "2", "--micro_batch", "3"],
    (1, "plain"): ["--micro_batch", "6"],
}
GROUPS = {"ddp": "6", "fsdp2": "12", "blocks": "6", "plain": "6"}
CASES = [
    *((2, "ddp", how) for how in HOW),
    *((2, "fsdp2", how) for how in ("adaptive", "msam")),
    (4, "blocks", "adaptive"),
]
MOVED = [("ddp", 4, "blocks"), ("blocks", 1, "plain")]  # of "adaptive", whose m is 6 there


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every case whole and from step 5 of itself; the moved ones from step 5 of the first."""
    folder = tmp_path_factory.mktemp("resumes")

    def flags(ranks, way, how, out, begin=None):
        words = HOW[how].replace("GROUP", GROUPS[way]).split()
        resume = [] if begin is None else ["--resume", str(folder / begin / f"step-{DONE}")]
        return [*FLAGS, *WAYS[ranks, way], "--optimizer", *words, *resume,
                "--out", str(folder / out)]  # fmt: skip

    played: dict[int, list] = {2: [], 4: [], 1: []}
    for ranks, way, how in CASES:
        out = f"{way}-{how}"
        played[ranks] += [flags(ranks, way, how, out)]
        played[ranks] += [flags(ranks, way, how, f"{out}-again", f"{out}/checkpoints")]
    for before, ranks, way in MOVED:
        begin = f"{before}-adaptive/checkpoints"
        played[ranks] += [flags(ranks, way, "adaptive", f"{before}-{way}", begin)]
    play_trains(folder, played, 1400)
    return folder


def rows(run):
    read = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: (r["look"], r["rho"]) for r in read if "look" in r}


@pytest.mark.parametrize("ranks, way, how", CASES)
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(runs, ranks, way, how):
    whole, again = runs / f"{way}-{how}", runs / f"{way}-{how}-again"
    one, two = (load_file(run / "model.safetensors") for run in (whole, again))
    assert all(torch.equal(one[n], two[n]) for n in one)
    steps = rows(whole)
    assert rows(again) == {t: steps[t] for t in range(DONE, STEPS)}
    looks = sum(look for look, _ in steps.values())
    assert looks == {"gsam": STEPS, "msam": 0}.get(how, looks) and (how == "msam" or looks >= 3)


@pytest.mark.parametrize("before, ranks, way", MOVED)
def test_a_run_that_goes_on_elsewhere_ends_where_it_would_have(runs, before, ranks, way):
    whole, moved = runs / "ddp-adaptive", runs / f"{before}-{way}"
    one, two = (load_file(run / "model.safetensors") for run in (whole, moved))
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-6
    assert rows(moved) == {t: rows(whole)[t] for t in range(DONE, STEPS)}
