"""`ascent="rank"`: refused where a rank has no gradient of its own; layers that one did not use."""

import cases
import pytest
import torch

pytestmark = pytest.mark.needs("deepspeed")

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
REFUSED = [
    {"kind": "refused", "optimizer": "look_sam", "stage": s, "zero": zero}
    for s, zero in ((2, {}), (3, {}), (1, OFFLOAD), (2, OFFLOAD), (3, OFFLOAD))
]
IN_HALVES = [
    {"kind": "refused", "optimizer": "look_sam", "stage": 1, "precision": p, **how}
    for p, how in (("bf16", {"ascent": "rank"}), ("fp16", {"m": 12}), ("bf16", {"m": 4}))
]
UNUSED = [
    {"kind": "unused", "optimizer": o, "stage": s}
    for o in ("look_sam", "layer_sam")
    for s in ("ddp", 0)  # from stage 1 on, DeepSpeed itself asks for the same layers on all ranks
]
CASES = {2: REFUSED + UNUSED + IN_HALVES}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """(2, number) -> what came out on each rank."""
    return cases.results(tmp_path_factory.mktemp, "own_ascent_worker.py", CASES)


@pytest.mark.parametrize("ranks, number", cases.everywhere(CASES, REFUSED))
def test_a_users_engine_whose_ranks_have_no_whole_gradient_is_refused(result, ranks, number):
    """train.py refused it; Engine around a DeepSpeedEngine took it, and eps was 0 in all layers
    whose gradient other ranks own."""
    for sentence in result(ranks, number):
        assert "m must be 24 on backend zero with 1 x 2 micro-batches of 12, got 12 by" in sentence


@pytest.mark.parametrize("ranks, number", cases.everywhere(CASES, UNUSED))
def test_a_layer_that_one_rank_did_not_use_has_a_gradient_of_zero_there(result, ranks, number):
    """The gradients that ranks had were averaged in a row, so that with one missing the rows were
    of different lengths, and gloo aborted the process."""
    ends = result(ranks, number)
    for rank in ends:
        for name, want in rank["want"].items():
            torch.testing.assert_close(rank["got"][name], want, rtol=0, atol=1e-6)
            assert torch.equal(rank["got"][name], ends[0]["got"][name])


@pytest.mark.parametrize("ranks, number", cases.everywhere(CASES, IN_HALVES))
def test_groups_of_a_users_engine_at_stage_1_in_16_bits_are_refused(result, ranks, number):
    """train.py refused them; Engine added eps to weights in 16 bits, which rounded it away."""
    for sentence in result(ranks, number):
        assert "m must be 24 on backend zero with 1 x 2 micro-batches of 12, got " in sentence
