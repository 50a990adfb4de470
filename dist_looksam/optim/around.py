"""An optimizer around a base: one list of groups and one state; rho and alpha lie in the groups."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from . import groups
from .base import Pieces
from .checks import check_base, check_inside


class AroundBase(Optimizer):
    """The half of `Sharpness` that takes no step. Attributes as there."""

    base_optimizer: Optimizer
    driver: Callable[[], None] | None
    module: nn.Module | None
    pieces: Pieces
    _own: dict[str, float]  # rho and alpha of groups that name none
    _keys: dict[str, str]  # under which keys they stand in the groups
    _settings_before: list[dict[str, float]]
    _columns: dict[str, tuple[tuple[float, ...], Tensor | float]]

    def __new__(cls, _: Any = None, base_optimizer: Any = None, *__: Any, **___: Any) -> Any:
        """ConfigError for an optimizer's class as base, before its lr=... is a TypeError."""
        if isinstance(base_optimizer, type):
            check_base(base_optimizer)
        return super().__new__(cls)

    def _share_with_base(self, _: Optimizer | None = None) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        for group, before in zip(self.param_groups, self._settings_before, strict=False):
            for key, value in before.items():
                group.setdefault(key, value)
        self._settings_before = []

    def _keep_settings(self, *_: Any) -> None:
        """rho and alpha, for groups loaded from a plain optimizer's state, which have none."""
        self._settings_before = [
            {self._keys[name]: self.setting(group, name) for name in self._own}
            for group in self.base_optimizer.param_groups
        ]

    def setting(self, group: dict[str, Any], name: str) -> float:
        """rho or alpha of a group; the default where the group came by the base and has none."""
        return group.setdefault(self._keys[name], self._own[name])

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
        if self.module is not None:
            check_inside([p for p in group["params"] if isinstance(p, Tensor)], self.module)
        base.add_param_group(group)

    def _layers(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def column(self, name: str) -> Tensor | float:
        """rho or alpha of every active layer: one number if all agree, else [P]."""
        values = tuple(
            self.setting(g, name)
            for g in self.param_groups
            for p in g["params"]
            if p.grad is not None
            for _ in self.pieces(p, p)
        )
        if len(set(values)) <= 1:
            return values[0] if values else 0.0
        if self._columns.get(name, ((), 0.0))[0] != values:
            device = next(p.device for p in self._layers())
            column = torch.tensor(values, dtype=torch.float64, device=device)
            self._columns[name] = (values, column)
        return self._columns[name][1]

    def mark_stepped(self) -> None:
        """Tell torch's schedulers, on either object, that a step came before theirs."""
        for optimizer in (self, self.base_optimizer):
            optimizer._opt_called = True  # type: ignore[attr-defined]

    def first_step(self, *_: Any, **__: Any) -> None:
        """ConfigError: a step is one call here."""
        raise ConfigError(
            f"a step must be one call of step(closure), got {type(self).__name__}.first_step or "
            f"second_step; pass a closure that zeroes, computes, calls backward and returns the "
            f"loss, which step calls as often as needed."
        )

    second_step = first_step
