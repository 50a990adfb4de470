"""DeepSpeed ZeRO against the truth: every optimizer, stage and number of ranks."""

import json

import cases
import pytest
import task

pytestmark = pytest.mark.needs("deepspeed")

STAGES = (0, 1, 2, 3)
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SMALL = {"reduce_bucket_size": 30, "allgather_bucket_size": 50, "sub_group_size": 20}
OVERLAP = {**SMALL, "overlap_comm": True, "contiguous_gradients": True}

BY_LAYER = {"decompose": "layer", "reuse": "natural"}
TABLE = [{"optimizer": o, "stage": s} for o in task.OPTIMIZERS for s in STAGES]
VARIED = [
    *({"optimizer": "look_sam", "base": "sgd", "stage": s} for s in STAGES),
    *({"optimizer": "look_layer_sam", "stage": s, "zero": OFFLOAD} for s in (1, 2, 3)),
    *({"optimizer": "look_layer_sam", "stage": s, "zero": OVERLAP} for s in (1, 2, 3)),
    *({"optimizer": "look_sam", "stage": s, "zero": SMALL, "clip": 0.3} for s in (1, 2, 3)),
    # Natural, since the paper's reuse divides by ||g_v||, which is rounding in a one-entry layer.
    *({"optimizer": "look_sam", "stage": s, "rule": BY_LAYER} for s in (0, 2, 3)),
    *({"optimizer": "sam", "base": "sgd", "stage": s, "rule": {"p": 3.0}} for s in (1, 2, 3)),
    {"optimizer": "look_layer_sam", "stage": 3, "zero_init": True},
    *(
        {"optimizer": "msam", "base": "sgd", "stage": s, "zero": OFFLOAD, "clip": 0.3}
        for s in (1, 2, 3)
    ),
    *({"optimizer": "msam", "base": "lamb", "stage": s, "perturb": "norms"} for s in (0, 1, 2, 3)),
    # Some layers are gathered for each use, others stay gathered between steps.
    {"optimizer": "msam", "stage": 3, "zero": {**SMALL, "stage3_param_persistence_threshold": 20}},
    *({"optimizer": "look_layer_sam", "stage": s, "perturb": "norms"} for s in (0, 1, 2, 3)),
    *(
        {"optimizer": "gsam", "base": "sgd", "stage": s, "perturb": "first|last", "clip": 0.3}
        for s in (1, 2, 3)
    ),
]
RANK_ASCENT = [
    {"optimizer": o, "base": "sgd", "stage": s, "ascent": "rank", "accumulation": 1}
    for o in ("sam", "look_sam", "look_layer_sam")
    for s in (0, 1)
]
# Every pair of optimizer and stage on 1 and on 2 ranks; on 3 every other one, like a chessboard,
# and those that tell the size of g_v.
HALF = [
    {"optimizer": o, "stage": s}
    for i, o in enumerate(task.OPTIMIZERS)
    for s in STAGES
    if s % 2 == i % 2 or o == "look_layer_sam"
]
CASES = {1: TABLE, 2: TABLE + VARIED + RANK_ASCENT, 3: HALF}


@pytest.fixture(scope="session")
def result(tmp_path_factory):
    """(ranks, number) -> what came out."""
    return cases.results(tmp_path_factory.mktemp, "zero_worker.py", CASES)


def names(ranks: int) -> list:
    return [
        pytest.param(ranks, i, id=f"{ranks}ranks-" + json.dumps(case, sort_keys=True))
        for i, case in enumerate(CASES[ranks])
    ]


@pytest.mark.parametrize("ranks, number", [*names(1), *names(2), *names(3)])
def test_zero_trains_to_the_weights_of_the_reference(result, ranks, number):
    case, got = CASES[ranks][number], result(ranks, number)
    changed = {**case.get("rule", {}), **{x: case[x] for x in ("clip", "perturb") if x in case}}
    own = task.BATCH // ranks if case.get("ascent") == "rank" else None
    want = task.truth(case["optimizer"], case.get("base"), m=own, **changed)
    limit = task.tolerance(case["optimizer"], case.get("base"))
    assert task.worst(got["weights"], want) < limit
    cases.assert_course(got["rows"], want.records)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gv_takes_four_bytes_per_entry_over_ranks(result, ranks, stage):
    case = {"optimizer": "look_layer_sam", "stage": stage}
    got = result(ranks, CASES[ranks].index(case))
    layers = [p.numel() for p in task.net().parameters()]
    share = 4 * sum(layers) / ranks
    # Padding: stage 3 rounds every layer up to whole shards, 1 and 2 every group to 2 x ranks.
    padding = 4 * (len(layers) if stage == 3 else 2 * 2)
    assert all(abs(size - share) <= padding for size in got["gv_bytes"])
