"""Horovod against the truth: every optimizer, whole and sharded, 1 to 3 ranks, gloo and MPI."""

import json

import cases
import pytest
import reference
import task
import torch

from launch import horovodrun

pytestmark = pytest.mark.needs("horovod")

LAYERS = len(list(task.net().parameters()))
GROUPS = 2  # of parameters: with and without weight decay
BY_LAYER = {"decompose": "layer", "reuse": "natural"}
STAGES = (0, 1)
DECAY = 0.7  # of averages
TABLE = [{"optimizer": o, "stage": s} for o in task.OPTIMIZERS for s in STAGES]
VARIED = [
    *({"optimizer": "look_sam", "base": "sgd", "stage": s} for s in STAGES),
    *({"optimizer": "look_sam", "stage": s, "clip": 0.3} for s in STAGES),
    *({"optimizer": "look_sam", "stage": s, "rule": BY_LAYER} for s in STAGES),
    *({"optimizer": "sam", "base": "sgd", "stage": s, "rule": {"p": 3.0}} for s in STAGES),
    *({"optimizer": "look_sam", "base": "sgd", "stage": s, "ema": DECAY} for s in STAGES),
]
RANK_ASCENT = [
    {"optimizer": o, "base": "sgd", "stage": s, "ascent": "rank", "accumulation": 1}
    for o in ("sam", "look_sam", "look_layer_sam")
    for s in STAGES
]
THEIRS = [
    {"optimizer": "adamw", "stage": 0, "theirs": True},
    {"optimizer": "look_layer_sam", "stage": 0, "theirs": True},
    {"optimizer": "look_sam", "base": "sgd", "stage": 0, "theirs": True, "ascent": "rank",
     "accumulation": 1},
]  # fmt: skip
COARSE = [  # 16 bits on the wire, or in the arithmetic: near the truth, and counted all the same
    {"optimizer": "look_sam", "base": "sgd", "stage": 0, "compression": "fp16"},
    *({"optimizer": "look_sam", "base": "sgd", "stage": s, "precision": "bf16"} for s in STAGES),
    *({"optimizer": "look_sam", "base": "sgd", "stage": s, "precision": "fp16"} for s in STAGES),
]
CASES = {1: TABLE, 2: TABLE + COARSE + THEIRS + VARIED + RANK_ASCENT, 3: TABLE}
# Both controllers, and over MPI both ways to start: by, ranks, how many of the cases. "forks" is
# gloo (horovodrun itself: test_horovod_runs.py). What is left out over MPI is other arithmetic on
# the same messages.
STARTS = [("forks", r, len(CASES[r])) for r in CASES]
STARTS += [("mpirun", 1, len(TABLE)), ("mpi", 2, len(TABLE + COARSE + THEIRS))]
STARTS += [("mpirun", 3, len(TABLE))]
COARSE_LIMIT = 1e-2  # a look and its reuse amplify what rounding to 8 (bf16) or 11 bits costs


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """(by, ranks) -> folder of results; each is started once, when first asked for."""
    done = {}
    count = {(by, ranks): n for by, ranks, n in STARTS}

    def of(by: str, ranks: int):
        if (by, ranks) not in done:
            folder = tmp_path_factory.mktemp(f"horovod-{by}-{ranks}")
            cases = CASES[ranks][: count[by, ranks]]
            (folder / "cases.json").write_text(json.dumps(cases))
            horovodrun(ranks, "horovod_worker.py", folder / "cases.json", folder, by=by)
            done[by, ranks] = folder
        return done[by, ranks]

    return of


def result(results, ranks: int, number: int, by: str = "forks") -> dict:
    return torch.load(task.result_file(results(by, ranks), number), weights_only=True)


def names() -> list:
    return [
        pytest.param(
            by,
            ranks,
            i,
            id=f"{by}-{ranks}ranks-" + json.dumps(case, sort_keys=True),
            marks=[] if by == "forks" else pytest.mark.needs("mpi"),
        )
        for by, ranks, count in STARTS
        for i, case in enumerate(CASES[ranks][:count])
    ]


@pytest.mark.parametrize("by, ranks, number", names())
def test_horovod_trains_to_the_weights_of_the_reference(results, by, ranks, number):
    case = CASES[ranks][number]
    got = result(results, ranks, number, by)
    changed = {**case.get("rule", {}), "clip": case.get("clip")}
    own = task.BATCH // ranks if case.get("ascent") == "rank" else None
    want = task.truth(case["optimizer"], case.get("base"), m=own, **changed)
    coarse = case in COARSE
    limit = COARSE_LIMIT if coarse else task.tolerance(case["optimizer"], case.get("base"))
    assert task.worst(got["weights"], want) < limit
    assert got["alike"]
    cases.assert_course(got["rows"], want.records, numbers=not coarse)


@pytest.mark.parametrize("number", [i for i, c in enumerate(CASES[2]) if "ema" in c])
def test_the_average_of_the_weights_is_the_references_and_leaves_them(results, number):
    got, want = result(results, 2, number), task.truth("look_sam", "sgd")
    names = [n for n, _ in task.net().named_parameters()]
    for name, wanted in zip(names, reference.average(want.weights, DECAY), strict=True):
        assert float((got["ema"][name].double() - torch.from_numpy(wanted)).abs().max()) < 1e-6
    assert got["same"]


@pytest.mark.parametrize("number", [i for i, c in enumerate(CASES[2]) if c["stage"] == 0])
def test_a_step_reduces_every_gradient_once_and_a_look_twice(results, number):
    """Climbing each rank's own gradient moves a reduction, and adds none for eps.

    There the first pass sends nothing, and the mean of g travels as one message of its own.
    """
    case = CASES[2][number]
    got = result(results, 2, number)
    if case.get("theirs"):  # its reductions are its own, under its own names
        return
    for (look, *_), (reduced, scattered, gathered) in zip(got["rows"], got["made"], strict=True):
        passes = 2 if look and case.get("ascent") != "rank" else 1
        assert reduced == passes * LAYERS
        assert scattered == gathered == 0


@pytest.mark.parametrize("number", [i for i, c in enumerate(CASES[2]) if c["stage"] == 1])
def test_a_sharded_look_costs_one_more_scatter_and_gather_and_no_gather_to_restore(results, number):
    """With --ascent rank not even the gather: every rank has its own gradient whole. msam gathers
    in every step that has a momentum."""
    case = CASES[2][number]
    got = result(results, 2, number)
    rows = zip(got["rows"], got["made"], strict=True)
    for step, ((look, *_), (reduced, scattered, gathered)) in enumerate(rows):
        ahead = case["optimizer"] == "msam" and step > 0
        assert reduced == 0
        assert scattered == GROUPS * (2 if look else 1)
        assert gathered == GROUPS * (2 if ahead or (look and case.get("ascent") != "rank") else 1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_gv_takes_four_bytes_per_entry_over_ranks(results, ranks, stage):
    case = {"optimizer": "look_layer_sam", "stage": stage}
    got = result(results, ranks, CASES[ranks].index(case))
    whole = 4 * sum(p.numel() for p in task.net().parameters())
    share = whole / ranks if stage else whole
    padding = 4 * GROUPS if stage else 0  # every group is rounded up to whole slices
    assert all(share <= size + padding and size <= share + padding for size in got["gv_bytes"])
