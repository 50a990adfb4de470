"""The one table of optimizer names, and how a row becomes an optimizer."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from ..errors import ConfigError
from .base import Lamb, Lars
from .rule import Rule
from .sharpness import Sharpness


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row: which ascent, whether k can be set, what happens between looks, which base."""

    ascent: str | None
    settable_k: bool = False
    reuses_gv: bool = False
    base: str


METHODS = {
    "sgd": Method(ascent=None, base="sgd"),
    "adamw": Method(ascent=None, base="adamw"),
    "lamb": Method(ascent=None, base="lamb"),
    "lars": Method(ascent=None, base="lars"),
    "sam": Method(ascent="model", base="adamw"),
    "sam_k": Method(ascent="model", settable_k=True, base="adamw"),
    "look_sam": Method(ascent="model", settable_k=True, reuses_gv=True, base="adamw"),
    "layer_sam": Method(ascent="layer", base="lamb"),
    "look_layer_sam": Method(ascent="layer", settable_k=True, reuses_gv=True, base="lamb"),
}
BASES = ("sgd", "adamw", "lamb", "lars")
RHO = {"model": 0.02, "layer": 0.0005}  # by measurement on small data: README, "Defaults"
LR = {"sgd": 0.05, "adamw": 2e-3, "lamb": 0.01, "lars": 0.01}
WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 0.05, "lamb": 0.05, "lars": 0.05}


def method(name: str) -> Method:
    """The row of a name. ConfigError lists the names."""
    if name not in METHODS:
        raise ConfigError(f"optimizer must be one of {', '.join(METHODS)}, got {name!r}.")
    return METHODS[name]


def base_of(name: str, base: str | None) -> str:
    """The base of a method: its default, or `base` where it has a choice."""
    row = method(name)
    if base is None:
        return row.base
    if base not in BASES:
        raise ConfigError(f"base must be one of {', '.join(BASES)}, got {base!r}.")
    if row.ascent is None and base != row.base:
        raise ConfigError(
            f"base must be {row.base} with optimizer {name}, got {base}; use --optimizer {base}."
        )
    return base


def rule_of(
    name: str,
    *,
    k: int = 5,
    p: float = 2.0,
    layer_ascent: str = "scaled",
    decompose: str = "model",
    reuse: str = "paper",
) -> Rule:
    """The rule of a method; k counts only where the row lets it be set."""
    row = method(name)
    if not isinstance(k, int) or k < 1:
        raise ConfigError(f"k must be a whole number >= 1, got {k}. 1 looks every step.")
    return Rule(
        ascent=row.ascent,
        k=k if row.settable_k else 1,
        reuses_gv=row.reuses_gv,
        p=p,
        layer_ascent=layer_ascent,
        decompose=decompose,
        reuse=reuse,
    )


def unused(name: str, base: str) -> list[str]:
    """Settings that change nothing for this method on this base."""
    row, found = method(name), []
    if row.ascent is None:
        found += ["rho", "p", "ascent"]
    if row.ascent != "layer":
        found += ["layer_ascent"]
    if not row.settable_k:
        found += ["k"]
    if not row.reuses_gv:
        found += ["alpha", "decompose", "reuse"]
    return found + (["betas"] if base in ("sgd", "lars") else ["momentum"])


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of trainable parameters: matrices with weight decay; biases and norms without."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for _, p in named if len(getattr(p, "ds_shape", p.shape)) > 1]
    rest = [p for _, p in named if len(getattr(p, "ds_shape", p.shape)) <= 1]
    both = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [g for g in both if g["params"]]


def build_base(
    base: str,
    params: Iterable[Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
    fused: bool = True,
) -> Optimizer:
    """A base optimizer by name. `fused`: torch's kernels that can skip a step on the device."""
    if base == "sgd":
        return SGD(params, lr=lr, momentum=momentum, fused=fused)
    if base == "adamw":
        return AdamW(params, lr=lr, betas=betas, eps=eps, fused=fused)
    if base == "lars":
        return Lars(params, lr=lr, momentum=momentum)
    if base != "lamb":
        raise ConfigError(f"base must be one of {', '.join(BASES)}, got {base!r}.")
    return Lamb(params, lr=lr, betas=betas, eps=eps)


def build(
    base_optimizer: Optimizer,
    *,
    rule: Rule,
    rho: float,
    alpha: float,
    model: nn.Module | None = None,
) -> Sharpness:
    """Any row around its base; a row without ascent gives the base its plain gradient."""
    params = [p for group in base_optimizer.param_groups for p in group["params"]]
    return Sharpness(params, base_optimizer, rule=rule, rho=rho, alpha=alpha, model=model)
