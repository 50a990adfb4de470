"""rho, alpha and perturb per group, in the base optimizer's groups, where schedulers reach them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from .checks import check_real
from .rule import check_alpha, check_perturb, check_rho

CHECKS: dict[str, Callable[[float], None]] = {
    "rho": check_rho,
    "alpha": check_alpha,
    "perturb": check_perturb,
}
ONE_FOR_ALL = (
    "k", "p", "scope", "layer_ascent", "decompose", "reuse", "along", "looks", "look_from",
    "look_until",
)  # fmt: skip

Group = dict[str, Any]


def copied(params: Any) -> Any:
    """A copy of `params`, since torch writes into the group dictionaries it is given."""
    if isinstance(params, Tensor | dict):
        return params  # torch raises the error
    listed = list(params)
    if listed and isinstance(listed[0], dict):
        return [dict(group) for group in listed]
    return [{"params": listed}] if listed else listed


def keys_of(base: Optimizer) -> dict[str, str]:
    """The groups' keys for the settings: Adadelta has a rho of its own, RMSprop an alpha."""
    return {name: f"sam_{name}" if name in base.defaults else name for name in CHECKS}


def check_names(group: Group, base: Optimizer) -> None:
    """ConfigError for a setting that all groups share."""
    for name in ONE_FOR_ALL:
        if name in group and name not in base.defaults:
            raise ConfigError(
                f"{name} must be the same for all groups, got {name}={group[name]!r} in one; pass "
                f"{name} to the constructor."
            )


def completed(group: Group, base: Optimizer, *, defaults: dict[str, float]) -> Group:
    """The group for the base optimizer, with rho, alpha and perturb: its own or the defaults."""
    check_names(group, base)
    params = group["params"]
    group = {**group, "params": [params] if isinstance(params, Tensor) else list(params)}
    check_real(p[1] if isinstance(p, tuple) else p for p in group["params"])
    for name, key in keys_of(base).items():
        value = group.pop(name, defaults[name])
        CHECKS[name](value)
        group[key] = value
    return group


def place(own: list[Group], base: Optimizer, *, defaults: dict[str, float]) -> None:
    """Write rho, alpha and perturb of every parameter into the base's groups.

    A group's own value comes first, whether it stands in `own` or in the base's groups; then the
    default. A group of the base whose parameters differ is split in two or more.

    Args:
        own: groups over the same parameters, with the user's settings.
        defaults: rho, alpha and perturb where no group has them.

    Raises:
        ConfigError: a value is out of range, is set twice, or would have no effect.
    """
    keys = keys_of(base)
    for group in own:
        check_names(group, base)
    for group, key in getattr(base, "filled_settings", []):  # by an earlier optimizer around it
        group.pop(key, None)
    mine = {id(p): group for group in own for p in group["params"]}
    placed: list[Group] = []
    filled: list[tuple[Group, str]] = []
    for group in base.param_groups:
        check_names(group, base)
        parts: dict[tuple[float, ...], list[int]] = {}
        for number, p in enumerate(group["params"]):
            _check_used(mine[id(p)], group, base)
            values = tuple(_value(n, mine[id(p)], group.get(keys[n]), defaults[n]) for n in keys)
            parts.setdefault(values, []).append(number)
        missing = [key for key in keys.values() if key not in group]
        for values, part in _split(group, parts or {tuple(defaults.values()): []}):
            part.update(zip(keys.values(), values, strict=True))
            placed.append(part)
            filled += [(part, key) for key in missing]
    base.param_groups[:] = placed
    base.filled_settings = filled  # type: ignore[attr-defined]


def check_some_perturbed(base: Optimizer) -> None:
    """ConfigError if no group may be perturbed: a look would be a plain step in two passes."""
    key = keys_of(base)["perturb"]
    if not any(group[key] for group in base.param_groups):
        raise ConfigError(
            "perturb must be True in at least one group, got False in all; leave it out of one, or "
            "use the base optimizer alone."
        )


def _value(name: str, own: Group, in_base: float | None, default: float) -> float:
    """rho or alpha of one parameter; `in_base`: the value in the base's group."""
    value = own.get(name, default if in_base is None else in_base)
    if in_base is not None and value != in_base:
        raise ConfigError(
            f"{name} of a group must be set once, got {value} and, in the groups of the base "
            f"optimizer, {in_base}; drop one."
        )
    CHECKS[name](value)
    return value


def _check_used(own: Group, in_base: Group, base: Optimizer) -> None:
    """ConfigError for a setting not of CHECKS that the base's group does not have."""
    for name, value in own.items():
        if name in (*CHECKS, "params", "param_names"):
            continue
        if name not in in_base or not bool(value == in_base[name]):
            got = f"{in_base[name]!r} there" if name in in_base else "nothing there"
            raise ConfigError(
                f"{name} must be set in the groups of the base optimizer {type(base).__name__}, "
                f"which uses it, got {value!r} beside it and {got}; set it there alone."
            )


def _split(
    group: Group, parts: dict[tuple[float, ...], list[int]]
) -> list[tuple[tuple[float, ...], Group]]:
    """A group for each part; the first part stays in `group` itself."""
    if len(parts) > 1 and "initial_lr" in group:
        raise ConfigError(
            f"a group of the base optimizer must have one rho, alpha and perturb, got {len(parts)} "
            f"of them and a scheduler that counts groups already; give both optimizers the same "
            f"groups, or make the scheduler later."
        )
    split: list[tuple[tuple[float, ...], Group]] = []
    whole = dict(group)
    for values, numbers in parts.items():
        part = dict(whole) if split else group
        for name in ("params", "param_names"):
            if name in whole:
                part[name] = [whole[name][n] for n in numbers]
        split.append((values, part))
    return split
