"""The counters of a run: number of steps, and whether a skipped look must be repeated."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .later import Later
from .rule import Rule


class StepCounters(Optimizer):
    """Counts steps, and records whether the last look was skipped."""

    rule: Rule
    _steps = 0
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
        return {"steps": self.steps, "owed": self.must_retry_look()}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Continue from saved counters. Other keys are ignored."""
        self._take_counters()
        self._count_from(counters)

    def _count_from(self, counters: dict[str, Any]) -> None:
        self._steps = int(counters["steps"])
        self._look_finite = torch.tensor(False) if counters["owed"] else None

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

        Reads one number from the device if the last step looked and this one need not, to know if
        that one was skipped.
        """
        has_gv = any("g_v" in state for state in self.state.values())
        if self.rule.looks(self.steps, has_gv=has_gv, must_retry=False):
            return True
        return self.rule.looks(self.steps, has_gv=has_gv, must_retry=self.must_retry_look())
