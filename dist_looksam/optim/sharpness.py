"""A base optimizer, plus which gradient it gets.

The optimizer that the user gives does the update; this one decides which gradient it gets. Both
share `param_groups` and `state`, so a scheduler on either reaches both, and the second gradient's
memory g_v is saved with the base's own state, as `state[param]["g_v"]`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError
from .base import check_whole
from .replay import Replay
from .rule import Rule, check_alpha, check_rho
from .step import TwoGradients


class Sharpness(TwoGradients):
    """A base optimizer plus a `Rule` of which gradient it gets. Users take one of the subclasses.

    Args:
        params: the parameters, or group dictionaries, which may carry their own `rho`, `alpha`.
        base_optimizer: an instance over the same parameters.
        rule: when to look and what to keep.
        rho, alpha: defaults for groups that name none.
        model: whose BatchNorm statistics one step leaves as one pass would.

    Attributes: as of `TwoGradients`.

    Raises:
        ConfigError: a setting is out of range, or `params` are not those of the base.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Optimizer,
        *,
        rule: Rule,
        rho: float = 0.0,
        alpha: float = 0.0,
        model: nn.Module | None = None,
    ) -> None:
        check_rho(rho)
        check_alpha(alpha)
        self._begin(rule, model)
        super().__init__(params, {"rho": rho, "alpha": alpha})
        if not isinstance(base_optimizer, Optimizer):
            raise ConfigError(
                f"base_optimizer must be an instance, got {base_optimizer!r}; "
                f"make it over the same parameters first."
            )
        _check_same_params(self, base_optimizer)
        self.defaults = {**base_optimizer.defaults, **self.defaults}  # some schedulers read them
        own = {id(p): group for group in self.param_groups for p in group["params"]}
        for group in base_optimizer.param_groups:
            mine = own.get(id(group["params"][0]), {}) if group["params"] else {}
            for name, check in (("rho", check_rho), ("alpha", check_alpha)):
                group[name] = mine.get(name, self.defaults[name])
                check(group[name])
        self.base_optimizer = base_optimizer
        self._follow_base()

    def _follow_base(self) -> None:
        self._share_with_base()
        self.base_optimizer.register_load_state_dict_post_hook(self._share_with_base)
        self.base_optimizer.register_load_state_dict_pre_hook(self._take_counters)
        self.base_optimizer.register_state_dict_pre_hook(self._take_counters)

    def _share_with_base(self, _: Optimizer | None = None) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base and to this optimizer."""
        base = getattr(self, "base_optimizer", None)
        if base is None:
            super().add_param_group(param_group)
            return
        base.add_param_group({name: self.defaults[name] for name in ("rho", "alpha")} | param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Returns the loss of the first pass.

        Args:
            closure: zeroes the gradients, computes the loss, calls backward, returns the loss.
                Called twice on looks, once otherwise; both calls draw the same random numbers.

        Raises:
            ConfigError: no closure.
        """
        if self.driver is not None:  # called by DeepSpeed, for which its backend has work
            self.driver()
            return None
        if hasattr(self.base_optimizer, "skip_synchronize"):  # its hooks may still be reducing
            raise ConfigError(
                "step needs a base optimizer of its own, got hvd.DistributedOptimizer; give both "
                "to Engine, which waits for the reduced gradients of each pass."
            )
        if closure is None:
            raise ConfigError(
                f"{type(self).__name__}.step needs a closure, got none; "
                "pass a function that zeroes, computes, calls backward and returns the loss."
            )
        check_whole(self._layers())
        replay = Replay(self.model, cuda=any(p.is_cuda for p in self._layers()))
        try:
            with torch.enable_grad():
                loss = closure()
            if self.looks():
                self.perturb()
                with torch.enable_grad(), replay.again():
                    closure()
            seen = self.update()
        except BaseException:
            self.abandon()
            replay.undo()
            raise
        replay.undo_statistics(unless=seen.finite)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters. Not by the base: Horovod's takes no argument."""
        super().zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base's state with g_v in it, in torch's form, plus the counters."""
        counters = self.counters()
        return {**self.base_optimizer.state_dict(), "sharpness": counters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as saved; mid-cycle too. A state without g_v looks on its next step."""
        state_dict = dict(state_dict)
        counters = state_dict.pop("sharpness", {"steps": 0, "owed": False})
        self.base_optimizer.load_state_dict(state_dict)
        self._count_from(counters)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "base_optimizer" in state:  # a copy; torch's copy of the base has lost its hooks
            self._follow_base()


def _check_same_params(own: Optimizer, base: Optimizer) -> None:
    mine, theirs = ({id(p) for g in o.param_groups for p in g["params"]} for o in (own, base))
    if mine != theirs:
        raise ConfigError(
            f"params must be those of base_optimizer, got {len(mine)} tensors against "
            f"{len(theirs)}, {len(mine & theirs)} of them shared; build both from the same list."
        )
