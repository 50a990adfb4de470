"""DeepSpeed engines that would be trained wrongly are refused in a sentence."""

import cases
import pytest

pytestmark = pytest.mark.needs("deepspeed")

HALF = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
BF16 = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
MASTERS = {
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
}
PREDIVIDED = {
    "gradient_predivide_factor": 2.0,
    "zero_optimization": {"stage": 3, "reduce_scatter": False},
}
WRONG = [
    *(({"stage": s, "config": HALF}, "dtype bfloat16, got torch.float16") for s in (0, 1, 2, 3)),
    ({"stage": 0, "outside": True}, "must be the module's"),  # at others DeepSpeed's own KeyError
    ({"stage": 0, "experts": True}, "data parallel alone, got mixture of experts"),
    ({"stage": 2, "config": MASTERS}, "master weights must be fp32"),
    (
        {"stage": 3, "config": PREDIVIDED},
        "must not be the number of ranks at ZeRO stage 3, got 2.0",
    ),
    ({"stage": 2, "precision": "bf16"}, "got bf16 for a DeepSpeed engine in fp32"),
]
RIGHT = [
    *({"stage": s, "config": BF16, "train": True} for s in (0, 3)),
    {"stage": 3, "config": {**PREDIVIDED, "gradient_predivide_factor": 4.0}, "train": True},
    {"stage": 2, "config": BF16, "precision": "bf16", "train": True},
]
CASES = {2: [*(case for case, _ in WRONG), *RIGHT]}


@pytest.fixture(scope="session")
def result(tmp_path_factory):
    """(ranks, number) -> the sentence."""
    return cases.results(tmp_path_factory.mktemp, "zero_mistakes_worker.py", CASES)


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_an_engine_that_would_be_trained_wrongly_is_refused(result, number):
    """torch_autocast in float16 reported gradients of 69,536 in place of .24: its loss scale is
    with a scaler that the step does not see. A head in the loss was a KeyError of a number.
    Engine(..., precision="bf16") trained in fp32 without a word where the config had no bf16.
    Predivided by the number of ranks, stage 3 gave gradients that many times too small."""
    assert WRONG[number][1] in result(2, number)


@pytest.mark.parametrize("number", range(len(RIGHT)))
def test_what_is_right_beside_them_trains(result, number):
    assert 0.05 < float(result(2, len(WRONG) + number)) < 5
