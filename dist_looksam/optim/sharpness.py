"""An optimizer around a base optimizer: decides which gradient the base gets.

Both share `param_groups` and `state`, so a scheduler works on either, and g_v is saved with the
base's own state, as `state[param]["g_v"]`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from . import groups
from .ahead import Ahead, momentum_key
from .checks import (
    check_base,
    check_inside,
    check_minimises,
    check_no_scaler,
    check_real,
    check_same,
    check_whole,
    warn_of_halves,
)
from .closure import with_cleared_gradients
from .distributed_checkpoint import counters_in, made_state
from .replay import Replay
from .rule import Rule, check_alpha, check_rho
from .trainers import check_trainer, without_closure


class Sharpness(Ahead):
    """A base optimizer plus a `Rule`. Users take one of the subclasses.

    Args:
        params: the parameters, or group dictionaries, which may carry their own `rho`, `alpha` and
            `perturb`: False keeps a group's layers at w on a look, and out of the norms of eps.
        base_optimizer: an instance over the same parameters.
        rule: when to look, and which gradient the base gets.
        rho, alpha: defaults for groups without them.
        model: a step changes its buffers (BatchNorm statistics) as one pass would.

    Attributes: as of `TwoGradients`, and
        module: the one that Engine trains; it must have the parameters of groups added later.

    Raises:
        ConfigError: a setting is out of range, or `params` are not those of the base.
    """

    def __new__(cls, _: Any = None, base_optimizer: Any = None, *__: Any, **___: Any) -> Any:
        """ConfigError for a class as base, before Python raises a TypeError for its lr=..."""
        if isinstance(base_optimizer, type):
            check_base(base_optimizer)
        return super().__new__(cls)

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
        self.module: nn.Module | None = None
        self._settings_before: list[dict[str, float]] = []
        check_base(base_optimizer)
        super().__init__(groups.copied(params), {})
        check_same(self, base_optimizer)
        check_real(self._layers())
        self._check_minimises(base_optimizer.param_groups)
        self._own = {"rho": rho, "alpha": alpha, "perturb": True}
        self._keys = groups.keys_of(base_optimizer)
        defaults = {key: self._own[name] for name, key in self._keys.items()}
        self.defaults = {**base_optimizer.defaults, **defaults}  # some schedulers read them
        groups.place(self.param_groups, base_optimizer, defaults=self._own)
        if rule.along_momentum:
            momentum_key(base_optimizer)
        if rule.ascent is not None:
            groups.check_some_perturbed(base_optimizer)
        self.base_optimizer = base_optimizer
        self._follow_base()

    def _check_minimises(self, groups: Iterable[dict[str, Any]]) -> None:
        if self.rule.ascent is not None:
            check_minimises(groups)

    def _follow_base(self) -> None:
        self._share_with_base()
        self.base_optimizer.register_load_state_dict_post_hook(self._share_with_base)
        self.base_optimizer.register_load_state_dict_pre_hook(self._take_counters)
        self.base_optimizer.register_load_state_dict_pre_hook(self._keep_settings)
        self.base_optimizer.register_state_dict_pre_hook(self._take_counters)

    def _share_with_base(self, _: Optimizer | None = None) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        for group, before in zip(self.param_groups, self._settings_before, strict=False):
            for key, value in before.items():
                group.setdefault(key, value)
        self._settings_before = []

    def _keep_settings(self, *_: Any) -> None:
        """Remember rho and alpha: groups loaded from a plain optimizer's state have none."""
        self._settings_before = [
            {self._keys[name]: self.setting(group, name) for name in self._own}
            for group in self.base_optimizer.param_groups
        ]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base and to this optimizer.

        Raises:
            ConfigError: a setting is out of range, or an engine has sharded the parameters.
        """
        base = getattr(self, "base_optimizer", None)
        if base is None:
            super().add_param_group(param_group)
            return
        if self.driver is not None:
            raise ConfigError(
                "groups must be complete before Engine shards the optimizer, got add_param_group "
                "after that; add the group first, or make another Engine."
            )
        group = groups.completed(param_group, base, defaults=self._own)
        self._check_minimises([{**base.defaults, **group}])
        if self.module is not None:
            check_inside([p for p in group["params"] if isinstance(p, Tensor)], self.module)
        base.add_param_group(group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Returns the loss of the first pass.

        Args:
            closure: zeroes the gradients, computes the loss, calls backward, returns the loss.
                Called twice on looks, once otherwise (MSAM: at w + eps); both calls draw the same
                random numbers (see `Replay`). Its batch climbs together, as one group: `Engine` has
                groups of m samples. Gradients of earlier micro-batches cannot be added up here:
                `Engine` accumulates.

        Raises:
            ConfigError: no closure; one that added to the gradients before it, or that called no
                backward; a call by torch's GradScaler. Weights and state are then unchanged, and
                the caller must zero the gradients.
        """
        if self.driver is not None:  # DeepSpeed calls this in its own step
            self.driver()
            return None
        if hasattr(self.base_optimizer, "skip_synchronize"):  # its hooks may still be reducing
            raise ConfigError(
                "step needs a base optimizer of its own, got hvd.DistributedOptimizer; give both "
                "to Engine, which waits for the reduced gradients of each pass."
            )
        check_no_scaler()
        if closure is None and made_state(self):
            return None
        if closure is None:
            raise ConfigError(
                f"{type(self).__name__}.step needs a closure, got none; "
                "pass a function that zeroes, computes, calls backward and returns the loss"
                f"{without_closure()}."
            )
        if not callable(closure):
            raise ConfigError(
                f"step needs a function that zeroes, computes, calls backward and returns the "
                f"loss, got a {type(closure).__name__}; pass the function, not its result."
            )
        check_trainer(closure)
        check_whole(self._layers())
        if self.steps == 0:
            warn_of_halves(self._layers())
        replay = Replay(self.model)
        try:
            if self.perturbs_ahead():
                self.perturb_ahead()
            with torch.enable_grad():
                loss = with_cleared_gradients(closure, self._layers())
            if self.looks():
                self.perturb()
                self.zero_grad()  # if the closure does not: unseen where its first call found none
                with torch.enable_grad(), replay.again():
                    closure()
            seen = self.update()
        except BaseException:
            self.abandon()
            replay.undo()
            raise
        replay.undo_buffers(unless=seen.finite)
        return loss

    def mark_stepped(self) -> None:
        """Show torch's schedulers, on either object, that the optimizer has stepped before them."""
        for optimizer in (self, self.base_optimizer):
            optimizer._opt_called = True  # type: ignore[attr-defined]

    def first_step(self, *_: Any, **__: Any) -> None:
        """Always ConfigError: other SAM implementations have two calls, this one has `step`."""
        raise ConfigError(
            f"a step must be one call of step(closure), got {type(self).__name__}.first_step or "
            f"second_step; pass a closure that zeroes, computes, calls backward and returns the "
            f"loss, which step calls as often as needed."
        )

    second_step = first_step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters. Not by the base: Horovod's takes no argument."""
        super().zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base's state with g_v in it, in torch's form, plus the counters."""
        counters = self.counters()
        saved = self.base_optimizer.state_dict()
        # In the groups, too: torch.distributed.checkpoint saves only these and the state.
        groups = [{**group, "sharpness": counters} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups, "sharpness": counters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as saved, also between two looks. Without g_v the next step looks.

        Raises:
            ConfigError: there is g_v without the counters.
        """
        counters = counters_in(state_dict)
        self.base_optimizer.load_state_dict(
            {key: value for key, value in state_dict.items() if key != "sharpness"}
        )
        self._take_counters()
        self._count_from(counters or {"steps": 0, "owed": False})

    def __getstate__(self) -> dict[str, Any]:
        # Without hooks, as torch copies optimizers, and without a scheduler's wrapper of `step`,
        # which would step this optimizer and not the copy.
        scheduled = hasattr(self.__dict__.get("step"), "_wrapped_by_lr_sched")
        kept = {
            key: value
            for key, value in self.__dict__.items()
            if not (key.startswith("_optimizer_") or (scheduled and key == "step"))
        }
        return {**kept, "module": None}  # a copy of the optimizer copies no network

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "base_optimizer" in state:  # a copy; torch's copy of the base has lost its hooks
            self._follow_base()
