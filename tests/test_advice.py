"""One line where a setting hurts, and no second one."""

import torch

from dist_looksam.advice import Advice
from dist_looksam.optim.seen import Seen


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
