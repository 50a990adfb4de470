"""Horovod with groups of m samples against the truth, whole and sharded; what a look sends."""

import json

import cases
import pytest
import task
import torch

from launch import horovodrun

pytestmark = pytest.mark.needs("horovod")

WORKER = "horovod_worker.py"
OPTIMIZERS = ("sam", "look_sam", "layer_sam", "look_layer_sam", "gsam")
BOTH = ("look_sam", "look_layer_sam")
LAYERS, GROUPS = len(list(task.net().parameters())), 2  # of parameters: with and without decay


def of(stage: int, *shapes: tuple[int, int], optimizers=OPTIMIZERS, **how) -> list[dict]:
    """Cases of these (accumulation, m)."""
    return [
        {"optimizer": o, "stage": stage, "accumulation": a, "m": m, **how}
        for o in optimizers
        for a, m in shapes
    ]


TWO = [
    *(
        c for s in (0, 1) for c in of(s, (2, 6), (4, 12))
    ),  # own groups, and two micro-batches of all
    *(c for s in (0, 1) for c in of(s, (4, 6), (2, 3), optimizers=BOTH)),  # all; parts
    *(c for s in (0, 1) for c in of(s, (1, 12), optimizers=BOTH, base="sgd", clip=0.3)),
    *of(0, (2, 6), (4, 12), optimizers=("look_sam",), base="sgd", theirs=True),
]
COARSE = [
    c
    for s in (0, 1)
    for p in ("bf16", "fp16")
    for c in of(s, (2, 6), optimizers=("look_sam",), base="sgd", precision=p)
]
CASES = {1: [c for s in (0, 1) for c in of(s, (4, 6), optimizers=BOTH)], 2: TWO + COARSE}
COARSE_LIMIT = 1e-2


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """ranks -> folder of results; each is started once, when first asked for."""
    done = {}

    def of(ranks: int):
        if ranks not in done:
            folder = done[ranks] = tmp_path_factory.mktemp(f"horovod-m-{ranks}")
            (folder / "cases.json").write_text(json.dumps(CASES[ranks]))
            horovodrun(ranks, WORKER, folder / "cases.json", folder)
        return done[ranks]

    return of


def names(ranks: int, cases: list[dict]) -> list:
    return [
        pytest.param(ranks, i, id=f"{ranks}ranks-" + json.dumps(case, sort_keys=True))
        for i, case in enumerate(CASES[ranks])
        if case in cases
    ]


@pytest.mark.parametrize("ranks, number", [*names(1, CASES[1]), *names(2, CASES[2])])
def test_groups_of_m_under_horovod_train_to_the_weights_of_the_reference(results, ranks, number):
    case = CASES[ranks][number]
    got = torch.load(task.result_file(results(ranks), number), weights_only=True)
    base, coarse = case.get("base"), case in COARSE
    want = task.truth(case["optimizer"], base, m=case["m"], clip=case.get("clip"))
    limit = COARSE_LIMIT if coarse else task.tolerance(case["optimizer"], base)
    assert task.worst(got["weights"], want) < limit
    assert got["alike"]
    cases.assert_course(got["rows"], want.records, numbers=not coarse)


OWN = [c for c in TWO if c["accumulation"] == 2 and "theirs" not in c]


@pytest.mark.parametrize("ranks, number", names(2, OWN))
def test_a_look_of_own_groups_sends_g_and_g_s_once_and_nothing_for_eps(results, ranks, number):
    """Whole: g as one message of its own, g_s layer by layer. Sharded: two reduce-scatters for
    each param group, and one gather of the new weights."""
    case = CASES[ranks][number]
    got = torch.load(task.result_file(results(ranks), number), weights_only=True)
    for (look, *_), (reduced, scattered, gathered) in zip(got["rows"], got["made"], strict=True):
        if case["stage"] == 0:
            assert (reduced, scattered, gathered) == (LAYERS, 0, 0)
        else:
            assert (reduced, scattered, gathered) == (0, GROUPS * (2 if look else 1), GROUPS)
