"""DeepSpeed ZeRO with groups of m samples against the truth, at every stage."""

import json

import cases
import pytest
import task

pytestmark = pytest.mark.needs("deepspeed")

OPTIMIZERS = ("sam", "look_sam", "layer_sam", "look_layer_sam", "gsam")
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SMALL = {"reduce_bucket_size": 30, "allgather_bucket_size": 50, "sub_group_size": 20}
OVERLAP = {**SMALL, "overlap_comm": True, "contiguous_gradients": True}


def of(stage: int, *shapes: tuple[int, int], optimizers=OPTIMIZERS, **how) -> list[dict]:
    """Cases of these (accumulation, m)."""
    return [
        {"optimizer": o, "stage": stage, "accumulation": a, "m": m, **how}
        for o in optimizers
        for a, m in shapes
    ]


BOTH = ("look_sam", "look_layer_sam")
SHAPES = {0: ((2, 6), (4, 3), (4, 12)), 1: ((2, 6), (4, 3), (4, 12))}
SHAPES |= {2: ((2, 12), (4, 12)), 3: ((2, 12), (4, 12))}


def pairs(stage: int) -> list[dict]:
    """Every optimizer at this stage, the shapes in turn: every pair of optimizer and stage, of
    stage and shape, and three shapes of every optimizer. (All products take 33 s longer.)"""
    shapes = SHAPES[stage]
    return [
        case
        for i, optimizer in enumerate(OPTIMIZERS)
        for case in of(stage, shapes[(i + stage) % len(shapes)], optimizers=(optimizer,))
    ]


ONE = [c for s in range(4) for c in of(s, (4, 6), (4, 12), optimizers=BOTH)]
TWO = [
    *(c for s in range(4) for c in pairs(s)),
    *(c for s in range(4) for c in of(s, (4, 6), optimizers=BOTH, base="sgd", clip=0.3)),
    *of(1, (2, 6), optimizers=BOTH, zero=OVERLAP),
    *(c for s in (2, 3) for c in of(s, (4, 6), optimizers=BOTH, zero=OVERLAP)),
    *(c for s in (1, 2, 3) for c in of(s, (2, 12), optimizers=("look_layer_sam",), zero=OFFLOAD)),
]
FOUR = [
    *(c for s in (0, 1) for c in of(s, (2, 6), (2, 3), (2, 12), optimizers=BOTH)),
    *(c for s in (2, 3) for c in of(s, (2, 12), optimizers=BOTH)),
]
COARSE = [  # 16 bits: near the truth
    c
    for s in (2, 3)
    for p in ("bf16", "fp16")
    for c in of(s, (2, 12), optimizers=("look_sam",), base="sgd", precision=p)
]
CASES = {1: ONE, 2: TWO + COARSE, 4: FOUR}
COARSE_LIMIT = 1e-2  # weights of 8 (bf16) or 11 bits, and what a look makes of that


@pytest.fixture(scope="session")
def result(tmp_path_factory):
    """(ranks, number) -> what came out."""
    return cases.results(tmp_path_factory.mktemp, "zero_worker.py", CASES)


def names(ranks: int) -> list:
    return [
        pytest.param(ranks, i, id=f"{ranks}ranks-" + json.dumps(case, sort_keys=True))
        for i, case in enumerate(CASES[ranks])
    ]


@pytest.mark.parametrize("ranks, number", [*names(1), *names(2), *names(4)])
def test_groups_of_m_under_zero_train_to_the_weights_of_the_reference(result, ranks, number):
    case, got = CASES[ranks][number], result(ranks, number)
    base, coarse = case.get("base"), case in COARSE
    want = task.truth(case["optimizer"], base, m=case["m"], clip=case.get("clip"))
    limit = COARSE_LIMIT if coarse else task.tolerance(case["optimizer"], base)
    assert task.worst(got["weights"], want) < limit
    cases.assert_course(got["rows"], want.records, numbers=not coarse)
