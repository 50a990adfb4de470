"""The table of optimizer names, and how a row becomes an optimizer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError
from .bases import BASES, Base
from .perturbed import ALL, perturbed
from .rule import Rule, check_k
from .sharpness import Sharpness

RHO = {"model": 0.02, "layer": 0.0005}  # by measurement on small data: docs/methods.md
ALPHA = 0.7  # of the LookSAM paper


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row: the ascent, whether k can be set and g_v is reused between looks, the default base.

    along_momentum, surrogate_gap: see `Rule`.
    rho: default of the flag --rho; None: that of the ascent's scope.
    alpha: default of the flag --alpha; None: the method does not use it.
    """

    ascent: str | None
    settable_k: bool = False
    reuses_gv: bool = False
    along_momentum: bool = False
    surrogate_gap: bool = False
    base: str
    rho: float | None = None
    alpha: float | None = None

    @property
    def two_passes(self) -> bool:
        """Whether some steps compute a second gradient."""
        return self.ascent is not None and not self.along_momentum

    @property
    def default_rho(self) -> float:
        """Default of the flag --rho; 0 without ascent."""
        return RHO.get(self.ascent or "", 0.0) if self.rho is None else self.rho

    @property
    def default_alpha(self) -> float:
        """Default of the flag --alpha, also where it has no effect."""
        return ALPHA if self.alpha is None else self.alpha


# Every base is a method of its own name, without ascent. New methods stand at the end, since
# pictures give colours by the place. gsam's alpha is that of its authors' ViT-B/32 (big_vision),
# msam's rho is by measurement on digits; its authors take 3 for ViT-S/32, after the warm-up.
METHODS = {name: Method(ascent=None, base=name) for name in BASES} | {
    "sam": Method(ascent="model", base="adamw"),
    "sam_k": Method(ascent="model", settable_k=True, base="adamw"),
    "look_sam": Method(ascent="model", settable_k=True, reuses_gv=True, base="adamw", alpha=ALPHA),
    "layer_sam": Method(ascent="layer", base="lamb"),
    "look_layer_sam": Method(
        ascent="layer", settable_k=True, reuses_gv=True, base="lamb", alpha=ALPHA
    ),
    "gsam": Method(ascent="model", surrogate_gap=True, base="adamw", alpha=0.6),
    "msam": Method(ascent="model", along_momentum=True, base="adamw", rho=0.3),
}


def method(name: str) -> Method:
    """The row of a name. ConfigError lists the names."""
    if name not in METHODS:
        raise ConfigError(f"optimizer must be one of {', '.join(METHODS)}, got {name!r}.")
    return METHODS[name]


def base_row(name: str) -> Base:
    """The row of a base's name. ConfigError lists the names."""
    if name not in BASES:
        raise ConfigError(f"base must be one of {', '.join(BASES)}, got {name!r}.")
    return BASES[name]


def base_of(name: str, base: str | None) -> str:
    """The base of a method: its default, or `base` where it has a choice."""
    row = method(name)
    if base is None:
        return row.base
    base_row(base)
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
    looks: str = "periodic",
    look_from: int = 0,
    look_until: int | None = None,
) -> Rule:
    """The rule of a method; k has an effect only where the row lets it be set."""
    row = method(name)
    check_k(k)
    if looks != "periodic" and not row.settable_k:
        able = [other for other, its in METHODS.items() if its.settable_k]
        raise ConfigError(
            f"looks {looks} needs a method that has k, got optimizer {name}; use one of "
            f"{', '.join(able)}, or leave looks out."
        )
    return Rule(
        ascent=row.ascent,
        k=k if row.settable_k else 1,
        reuses_gv=row.reuses_gv,
        along_momentum=row.along_momentum,
        surrogate_gap=row.surrogate_gap,
        p=p,
        layer_ascent=layer_ascent,
        decompose=decompose,
        reuse=reuse,
        looks=looks,
        look_from=look_from,
        look_until=look_until,
    )


def unused(name: str, base: str) -> list[str]:
    """Settings without effect for this method on this base."""
    row, flags = method(name), []
    if row.ascent is None:
        flags += ["rho", "p", "perturb", "look_from", "look_until"]
        flags += ["rho_schedule", "rho_end", "rho_warmup_steps"]
    if not row.two_passes:
        flags += ["ascent", "m"]
    if row.ascent != "layer":
        flags += ["layer_ascent"]
    if not row.settable_k:
        flags += ["k"]
    if row.alpha is None:
        flags += ["alpha", "decompose"]
    if not row.reuses_gv:
        flags += ["reuse"]
    return flags + [flag for flag in ("betas", "momentum", "eps") if flag not in BASES[base].uses]


def groups(
    model: nn.Module,
    weight_decay: float,
    perturb: str = ALL,
    lrs: Mapping[int, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups of trainable parameters: matrices with weight decay; biases and norms without.

    perturb: of `perturbed`. Layers that it leaves out have groups of their own, with perturb False.
    lrs: the learning rate of every parameter by its id, one to a group; else it is the base's.
    """
    moved = perturbed(model, perturb)
    parts: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            is_matrix = len(getattr(p, "ds_shape", p.shape)) > 1
            lr = lrs[id(p)] if lrs else 0.0
            parts.setdefault((is_matrix, id(p) in moved, lr), []).append(p)
    return [
        {
            "params": part,
            "weight_decay": weight_decay if is_matrix else 0.0,
            "perturb": may_move,
            **({"lr": lr} if lrs else {}),
        }
        for (is_matrix, may_move, lr), part in sorted(parts.items(), reverse=True)
    ]


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
    """A base optimizer by name; ConfigError lists the names.

    `fused`: with torch's kernels that can skip a step on the device, where the base has such.
    """
    row = base_row(base)
    flags = {"betas": betas, "eps": eps, "momentum": momentum}
    how: dict[str, Any] = {name: flags[name] for name in row.uses}
    return row.make(params, lr=lr, **how, **({"fused": fused} if row.fused else {}))


def build(
    base_optimizer: Optimizer,
    *,
    rule: Rule,
    rho: float,
    alpha: float,
    model: nn.Module | None = None,
) -> Sharpness:
    """The optimizer of a rule around its base; without ascent the base gets its plain gradient."""
    params = [p for group in base_optimizer.param_groups for p in group["params"]]
    return Sharpness(params, base_optimizer, rule=rule, rho=rho, alpha=alpha, model=model)
