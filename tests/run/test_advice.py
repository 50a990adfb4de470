"""One line where a setting hurts, and no second one."""

import pytest
import torch

from dist_looksam.optim.seen import Seen
from dist_looksam.run.advice import Advice, without_effect
from dist_looksam.settings.config import parse


def seen(cosine: float | None) -> Seen:
    one = torch.ones(())
    kept = None if cosine is None else torch.tensor(cosine)
    return Seen(True, torch.tensor(True), one, one, eps_cosine=kept)


def test_a_rounded_perturbation_is_told_once_with_what_to_change():
    said: list[str] = []
    advice = Advice(said.append)
    for step in range(200):
        advice.look(step, seen(0.31))
    assert len(said) == 1
    assert "0.31" in said[0] and "--rho" in said[0]


def test_a_faithful_perturbation_and_fp32_are_not_remarked_on():
    said: list[str] = []
    advice = Advice(said.append)
    advice.look(0, seen(0.97))
    advice.look(1, seen(None))
    advice.line({"step": 3, "gv_ratio": 0.4})
    advice.line({"step": 3, "gv_ratio": None})
    advice.line(None)
    assert said == []


def test_a_g_v_larger_than_g_is_told_once():
    said: list[str] = []
    advice = Advice(said.append)
    for step in (5, 10):
        advice.line({"step": step, "gv_ratio": 1.5})
    assert len(said) == 1 and "at step 5" in said[0]


@pytest.mark.parametrize("flags, names", [
    ("--optimizer adamw --rho 0.05 --k 3 --alpha 0.5", "--rho, --k, --alpha"),
    ("--optimizer sam --k 2 --decompose layer", "--k, --decompose"),
    ("--optimizer sam_k --k 2 --alpha 0.1 --layer_ascent literal", "--layer_ascent, --alpha"),
    ("--optimizer look_sam --base sgd --betas 0.9,0.95", "--betas"),
    ("--optimizer lamb --momentum 0.8", "--momentum"),
    ("--optimizer adamw --rho 0", ""),
    ("--optimizer look_layer_sam --rho 0.1 --k 2 --alpha 0.1 --reuse paper --decompose layer", ""),
    ("--optimizer lars --momentum 0.8", ""),
])  # fmt: skip
def test_settings_without_an_effect_are_named(flags, names):
    settings = parse(flags.split()).resolved(ranks=1, launcher="single", samples=1000)
    said = without_effect(settings)
    assert [text.split(":")[0] for text in said] == ([names] if names else [])
