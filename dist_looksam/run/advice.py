"""Notes and warnings for the user: settings without an effect, and signs of harmful settings."""

import math
from collections.abc import Callable

from ..data.sets import data_set
from ..optim.seen import Seen
from ..optim.table import ALPHA, base_row, unused
from ..record.metrics import Row
from ..settings.config import DEFAULTS, Settings

FAITHFUL = 0.9  # cosine of applied and intended perturbation; under it the ascent is mostly noise
EVERY = 50  # looks between readings from the device
# Skipped steps in a row that are reported. fp16 begins with up to 16, from a loss scale of 2^16.
MANY_SKIPS = 20


def without_effect(settings: Settings) -> list[str]:
    """A sentence about given settings that the method or its base does not use, and one about those
    that another setting makes useless; [] for none.

    Args:
        settings: resolved.
    """
    assert settings.base is not None
    unused_values = {
        "rho": 0.0,
        "alpha": ALPHA,
        "eps": base_row(settings.base).eps,
    }  # after `resolved`
    method_on_base = f"optimizer {settings.optimizer} on {settings.base}"
    why = dict.fromkeys(unused(settings.optimizer, settings.base), method_on_base)
    if "rho" in why:
        why["probe_every"] = method_on_base
    if settings.lr_scaling == "none":
        why["lr_base_batch"] = "lr_scaling none"
    size = data_set(settings.data).size
    if size(16).shape == size(32).shape:
        why["image_size"] = f"data {settings.data}"
    given: dict[str, list[str]] = {}
    for name, reason in why.items():
        if getattr(settings, name) not in (DEFAULTS[name], unused_values.get(name)):
            given.setdefault(reason, []).append(f"--{name}")
    return [f"{', '.join(flags)}: no effect with {reason}" for reason, flags in given.items()]


def nothing_learnt(skips: int, done: int, settings: Settings, *, loss: float) -> str | None:
    """The error of a run whose last `skips` of `done` steps were skipped; None if they are few and
    the evaluation's `loss` is finite."""
    many = min(MANY_SKIPS, settings.max_skips or MANY_SKIPS, done)
    if not skips or (skips < many and math.isfinite(loss)):
        return None
    if skips >= done:
        what = f"none of the {done} steps trained"
    else:
        what = f"nothing was learnt after step {done - skips} of {done}"
    fp16 = ", or use --precision bf16 or fp32" if settings.precision == "fp16" else ""
    return (
        f"{what}: the last {skips} steps were skipped, since their gradients were not finite; "
        f"lower --lr or --rho, lengthen --warmup_steps{fp16}."
    )


class Advice:
    """Checks the steps of a run, and passes each warning at most once to `note`."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._looks = 0
        self._topics: set[str] = set()  # already warned about

    def _once(self, topic: str, text: str) -> None:
        if topic not in self._topics:
            self._topics.add(topic)
            self._note(f"warning: {text}")

    def look(self, step: int, seen: Seen) -> None:
        """After a step that perturbed 16-bit weights: warn if rounding changed eps. Reads one
        number."""
        if seen.eps_cosine is None:
            return
        self._looks += 1
        if (self._looks - 1) % EVERY:
            return
        cosine = float(seen.eps_cosine)
        if cosine < FAITHFUL:
            self._once(
                "rounding",
                f"at step {step} 16-bit weights show a perturbation whose cosine with what was "
                f"intended is {cosine:.2f}, under {FAITHFUL}: raise --rho, or use "
                f"--precision fp16, which keeps more, or fp32.",
            )

    def skips(self, count: int, step: int) -> None:
        """After a training line was read: warn of many skipped steps in a row."""
        if count >= MANY_SKIPS:
            size = count.bit_length()  # warn again each time their number has doubled
            self._once(
                f"skips {size} {step - count}",
                f"the last {count} steps, to step {step}, were skipped: their gradients were not "
                f"finite, and nothing is learnt.",
            )

    def line(self, row: Row | None) -> None:
        """After a training line was read: warn if g_v is larger than g."""
        ratio = (row or {}).get("gv_ratio")
        if ratio is not None and ratio > 1:
            self._once(
                "ratio",
                f"||g_v||/||g|| was {ratio:.2f} at step {(row or {})['step']}, over 1: what is "
                f"reused outweighs the gradient; lower --rho or --alpha.",
            )
