"""A gradient that is not finite, in either pass, at every stage: the step did not happen."""

import json

import cases
import pytest

pytestmark = pytest.mark.needs("deepspeed")

CASES = [
    {"optimizer": o, "stage": s, "precision": precision, "bad_pass": bad, "zero": zero}
    for o in ("look_sam", "look_layer_sam")
    for precision in ("fp16", "bf16", "fp32")
    for s in (0, 1, 2, 3)
    for bad in (1, 2)
    for zero in ({},)
    if not (s == 0 and precision != "fp32") and not (o == "look_sam" and precision != "fp16")
] + [
    {"optimizer": "look_layer_sam", "stage": 2, "precision": "fp16", "bad_pass": bad, "zero": zero}
    for bad in (1, 2)
    for zero in ({"offload_optimizer": {"device": "cpu"}},)
]
FIRST = {"optimizer": "look_sam", "stage": 2, "precision": "fp16", "bad_pass": 2, "bad_step": 0}
OWN = {"optimizer": "look_sam", "stage": 1, "precision": "fp16", "bad_pass": 1, "zero": {}}
CASES += [FIRST, {**OWN, "ascent": "rank"}]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """(2, number) -> what came out on each rank."""
    return cases.results(tmp_path_factory.mktemp, "zero_overflow_worker.py", {2: CASES})


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: json.dumps(CASES[n]))
def test_a_step_that_overflows_changes_no_bit_and_training_goes_on(result, number):
    case = CASES[number]
    for rank in result(2, number):
        assert not rank["finite"]
        if case is not FIRST:  # a base's empty state may be made, as zeros, at the first step
            assert rank["changed"] == []
        else:
            assert [n for n in rank["changed"] if n.startswith(("master", "visible"))] == []
        before, after = rank["scales"]
        assert after == (before / 2 if case["precision"] == "fp16" else before)
        bad = case.get("bad_step", 3)
        assert rank["looks"][bad] and rank["looks"][bad + 1], "the next step must look again"
        assert all(rank["moved"])
