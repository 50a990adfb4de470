"""The counters of a run: number of steps, whether a skipped look must be repeated, what decides
the next looks, and the factor of rho."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from .later import Later
from .rule import Rule
from .when import Decider


class StepCounters(Optimizer):
    """Counts steps, and records whether the last look was skipped."""

    rule: Rule
    decider: Decider
    _steps = 0
    _rho_scale: float | None = None  # None: nobody has set it
    _look_finite: Tensor | Later | None = None

    def _take_counters(self, *_: Any) -> None:
        """Move counters that a loader has put into the groups, if any, into this object.

        DeepSpeed's loader of universal checkpoints fills the groups and calls no hook. So every
        read and write of a counter calls this first.
        """
        loaded = [group.pop("sharpness") for group in self.param_groups if "sharpness" in group]
        if loaded:
            self._count_from(loaded[0])

    @property
    def steps(self) -> int:
        """Steps taken, skipped ones included; the next one is step number `steps`."""
        self._take_counters()
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._take_counters()
        self._steps = steps

    def counters(self) -> dict[str, Any]:
        """The counters, for a checkpoint; the same on every rank."""
        # Keys that defaults do not need are left out: by torch.distributed.checkpoint an optimizer
        # can only load a state that has all of its own keys, and older ones have the first two.
        kept: dict[str, Any] = {"steps": self.steps, "owed": self.must_retry_look()}
        rule, decided = self.rule, self.decider.state()
        if decided:
            kept["looks"] = decided
        if self._rho_scale is not None:
            kept["rho_scale"] = self._rho_scale
        if rule.reuses_gv and (rule.look_from or rule.look_until is not None):
            kept["has_gv"] = self._has_gv()
        return kept

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Continue from saved counters. Other keys are ignored."""
        self._take_counters()
        self._count_from(counters)

    def _count_from(self, counters: dict[str, Any]) -> None:
        self._steps = int(counters["steps"])
        self._look_finite = torch.tensor(False) if counters["owed"] else None
        self._rho_scale = counters.get("rho_scale")
        self.decider.load(counters.get("looks", {}))
        if not counters.get("has_gv", True):  # zeros, made for a loader
            self._drop_gv()

    @property
    def rho_scale(self) -> float:
        """Factor of every group's rho, for a schedule: set it before a step. Saved with the state;
        by torch.distributed.checkpoint only where it was set before saving and before loading."""
        self._take_counters()
        return 1.0 if self._rho_scale is None else self._rho_scale

    @rho_scale.setter
    def rho_scale(self, scale: float) -> None:
        self._take_counters()
        if not 0 <= scale < math.inf:
            raise ConfigError(f"rho_scale must be >= 0 and finite, got {scale}. 1 leaves rho.")
        self._rho_scale = float(scale)

    def _has_gv(self) -> bool:
        return any("g_v" in state for state in self.state.values())

    def _drop_gv(self) -> None:
        for state in self.state.values():
            state.pop("g_v", None)

    def must_retry_look(self) -> bool:
        """True if the last step looked and was skipped. Reads one number from the device, once."""
        self._take_counters()
        skipped = self._look_finite is not None and not bool(self._look_finite)
        self._look_finite = torch.tensor(False) if skipped else None
        return skipped

    def record_look(self, finite: Tensor | None) -> None:
        """Note whether the look that has just ended was finite (0-dim bool); None: no look."""
        self._take_counters()
        self._look_finite = None if finite is None else Later(finite)

    def may_look(self) -> bool:
        """Before the first pass: False if this step will not look, whatever its gradient is."""
        return self.looks()

    def looks(self) -> bool:
        """After the first pass: True if this step computes the second gradient.

        Inside the window: where the decider says so, where there is no g_v to reuse, and after a
        look that was skipped. Outside of it no step looks, and g_v, if there is one, is dropped.

        Reads one number from the device if the last step looked and this one need not, to know if
        that one was skipped.
        """
        rule, step = self.rule, self.steps
        if not rule.two_passes:
            return False
        due = self.decider.due(step)  # in every step: it follows the gradients outside, too
        if not rule.in_window(step):
            self._drop_gv()
            return False
        return due or (rule.reuses_gv and not self._has_gv()) or self.must_retry_look()
