"""A gradient that is not finite, in either pass, at every stage: the step did not happen."""

import json

import cases
import pytest
import task

from dist_looksam.backends.zero import config as zero_config

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
OWN = {"optimizer": "look_sam", "stage": 1, "precision": "fp32", "bad_pass": 1, "zero": {}}
CASES += [FIRST, {**OWN, "ascent": "rank"}]
# Two groups, so that the calls are: first pass, second, first of the second group, second of it.
CASES += [
    {"optimizer": "look_sam", "stage": s, "precision": p, "m": m, "bad_call": n, "zero": {}}
    for s, p, m in ((0, "fp32", 6), (1, "fp32", 6), (2, "fp16", 12), (3, "fp16", 12))
    for n in (1, 2, 3, 4)
]
CASES += [
    {"optimizer": "look_sam", "stage": s, "precision": "fp16", "m": 12, "bad_call": n,
     "zero": {"offload_optimizer": {"device": "cpu"}}}
    for s, n in ((1, 3), (2, 2), (3, 1), (3, 4))
]  # fmt: skip
UNCHECKED = {  # as train.py has it: only the step looks whether gradients are finite
    "bf16": {"enabled": True, "check_grad_overflow": False},
    "data_types": {"grad_accum_dtype": "fp32"},
}
CASES += [
    {"optimizer": "look_layer_sam", "stage": s, "precision": "bf16", "bad_pass": bad,
     "config": UNCHECKED}
    for s in (1, 2, 3)
    for bad in (1, 2)
] + [
    {"optimizer": "look_sam", "stage": s, "precision": "bf16", "m": m, "bad_call": bad,
     "config": UNCHECKED}
    for s, m in ((2, 12), (3, 12))
    for bad in (2, 3)
]  # fmt: skip


def trains(stage: int, precision: str) -> dict:
    """DeepSpeed's configuration as train.py has it."""
    how = {"batch_size": task.BATCH, "micro_batch": task.BATCH // 4, "ranks": 2, "offload": False}
    return zero_config.make({}, stage=stage, precision=precision, **how)


# What the host does where the gradients are on a GPU: it does not ask whether they are finite.
ON_GPU = [
    {"optimizer": o, "stage": s, "precision": p, "bad_pass": bad, "gpu": True,
     "config": trains(s, p)}
    for o, stages in (("look_layer_sam", (0, 1, 2, 3)), ("look_sam", (3,)))
    for s in stages
    for p in ("fp32", "bf16")
    for bad in (1, 2)
    if not (s == 0 and p == "bf16")
] + [
    {"optimizer": "look_sam", "stage": s, "precision": "fp32", "m": m, "bad_call": n, "gpu": True}
    for s, m in ((1, 6), (2, 12), (3, 12))
    for n in (2, 3)
]  # fmt: skip
CASES += ON_GPU


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """(2, number) -> what came out on each rank."""
    return cases.results(tmp_path_factory.mktemp, "zero_overflow_worker.py", {2: CASES})


def named(case: dict) -> str:
    return json.dumps({key: value for key, value in case.items() if key != "config"})


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: named(CASES[n]))
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
        assert rank["skipped"] == 1, "what DeepSpeed counts"
        assert rank["applied"] == [step != bad for step in range(8)]


@pytest.mark.parametrize("case", ON_GPU, ids=named)
def test_after_the_first_step_the_host_reads_nothing(result, case):
    """But, copied before, whether the last look was skipped, and whether the last step was. Nor
    does it wait for the whole device: DeepSpeed did so 3 to 5 times a step, to time itself."""
    for rank in result(2, CASES.index(case)):
        assert [now for now, _ in rank["reads"][1:]] == [0] * 7
        assert all(later <= 2 for _, later in rank["reads"])
        if "config" in case:
            assert not any(rank["waits"])


def test_secondary_copies_are_put_back_with_the_weights(tmp_path_factory):
    """With zero_hpz_partition_size forward gathers DeepSpeed's secondary copies, which stayed at
    w + eps after a skipped look. One case a process: their groups are global."""
    base = {"optimizer": "look_layer_sam", "stage": 3, "precision": "fp32", "bad_pass": 2}
    gathered = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    gathered["stage3_max_live_parameters"] = 0
    losses = []
    for more in ({}, {"zero_hpz_partition_size": 2}):
        case = {**base, "zero": {**gathered, **more}}
        found = cases.results(tmp_path_factory.mktemp, "zero_overflow_worker.py", {2: [case]})
        losses.append([rank["losses"][4:] for rank in found(2, 0)])
    assert losses[0] == losses[1]
