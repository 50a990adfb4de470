"""Base optimizers: LAMB and LARS with exact layer norms, and how any of them skips a step."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from ..maths.shards import Reduce, Shards, clones, scalars, whole
from ..maths.trust import trust_ratio
from . import at_once
from .checks import check_real, check_whole
from .rule import check_number

Pieces = Callable[[Tensor, Tensor], list[Tensor]]


def in_one_piece(param: Tensor, like: Tensor) -> list[Tensor]:
    """The layers inside `param`, as views of `like`, which is laid out as `param`: one layer."""
    return [like]


class _Trusted(Optimizer):
    """w_i -= lr ratio_i u_i,  u = direction + weight_decay w,  ratio_i = ||w_i|| / ||u_i||.

    The ratio is 1 where either norm is 0, and in groups without weight decay. One reduce a step.

    Attributes a sharded backend sets:
        reduce: adds [2, P] partial sums over the ranks that split a layer.
        pieces: the layers inside one flat parameter.

    `found_inf`, a 0-dim tensor that a caller may set around `step`: 1 leaves weights and state
    untouched with no host synchronisation, as torch's fused optimizers do.
    """

    # On the class, since torch's copying of an optimizer keeps its groups and state only.
    found_inf: Tensor | None = None
    reduce: Reduce = staticmethod(whole)
    pieces: Pieces = staticmethod(in_one_piece)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            check_number(name, defaults[name], 0.01)
            if not 0 <= defaults[name] < float("inf"):
                raise ConfigError(f"{name} must be >= 0 and finite, got {defaults[name]}.")
        super().__init__(params, defaults)
        check_real(p for group in self.param_groups for p in group["params"])
        if not any(group["weight_decay"] for group in self.param_groups):
            warnings.warn(
                f"{type(self).__name__} scales the step of a layer by ||w||/||u|| in groups with "
                f"weight decay alone, got none in any group, so that all ratios are 1; give the "
                f"matrices' group weight_decay > 0.",
                stacklevel=3,
            )

    def _directions(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any], alive: Any
    ) -> list[Tensor]:
        """u before weight decay, new tensors; updates the states, unless `alive` is 0."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from `.grad`; with a closure, the loss it returns."""
        check_whole([p for group in self.param_groups for p in group["params"]])
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._step_at_once():
            return loss
        parts = [
            self._part(params, group) for group in self.param_groups for params in _by_kind(group)
        ]
        self._descend([part for part in parts if part.weights])
        return loss

    def states(self, params: Shards) -> at_once.States | None:
        """For the kernels of `at_once`; None if there are none of this optimizer."""
        return None

    def _step_at_once(self) -> bool:
        """The step by a few kernels for all layers, where that is possible."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads: list[Any] = [p.grad for p in params]
        if any(g.is_sparse for g in grads):
            return False
        finite = None if self.found_inf is None else self.found_inf == 0
        parts = at_once.Parts(xs=self._split(params, grads), finite=finite)
        groups = self.param_groups
        work = at_once.work_of(self, params, parts, groups=groups, split=self._split)
        if work is not None:
            work()
        return work is not None

    def _split(self, params: Shards, like: Shards) -> list[Tensor]:
        return [v for p, x in zip(params, like, strict=True) for v in self.pieces(p, x)]

    def _part(self, params: list[Tensor], group: dict[str, Any]) -> "_Part":
        alive: Any = 1.0
        grads: list[Any] = [p.grad for p in params]
        if self.found_inf is not None:
            alive = 1.0 - self.found_inf.to(params[0].device, torch.float64)
            zero = alive.new_zeros(())
            for g in grads:  # in place: the step spends it
                torch.where(alive > 0, g, zero.to(g.dtype), out=g)
        updates = self._directions(params, grads, group, alive)
        decay = group["weight_decay"]
        if decay != 0:
            torch._foreach_add_(updates, params, alpha=decay)
        return _Part(
            weights=self._split(params, params),
            updates=self._split(params, updates),
            lr=group["lr"] * alive,
            trusted=decay != 0,
        )

    def _descend(self, parts: list["_Part"]) -> None:
        trusted = [part for part in parts if part.trusted]
        ratios: list[Tensor] = []
        if trusted:
            weights = [w for part in trusted for w in part.weights]
            updates = [u for part in trusted for u in part.updates]
            lengths = [len(part.weights) for part in trusted]
            ratios = list(trust_ratio(weights, updates, reduce=self.reduce).split(lengths))
        for part in parts:
            updates = part.updates
            if part.trusted:
                column = ratios.pop(0).to(updates[0].device) * part.lr
                torch._foreach_mul_(updates, scalars(column, updates))
            else:
                torch._foreach_mul_(updates, _factor(part.lr, updates))
            torch._foreach_sub_(part.weights, updates)

    def _slots(self, params: Shards, name: str) -> list[Tensor]:
        """One state tensor per parameter, zeros where there was none."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]

    def _steps(self, params: Shards) -> list[Tensor]:
        """Steps taken with each parameter; 0-dim float64, on its device."""
        for p in params:
            step = self.state[p].get("step", 0.0)
            if not isinstance(step, Tensor) or step.dtype != torch.float64:
                step = torch.as_tensor(step, dtype=torch.float64)
            self.state[p]["step"] = step.to(p.device)
        return [self.state[p]["step"] for p in params]

    def _counts(self, params: Shards, alive: Any) -> Tensor:
        """[len(params)] steps taken with each parameter, this one included, at least 1; float64."""
        steps = self._steps(params)
        if isinstance(alive, Tensor):  # with alpha, or torch reads it as a number, and waits
            torch._foreach_add_(steps, alive, alpha=1)
        else:
            torch._foreach_add_(steps, alive)
        return torch.stack(steps).clamp(min=1)


@dataclass(frozen=True)
class _Part:
    """Layers of one group, one device and one dtype. lr: a number, or 0-dim float64."""

    weights: list[Tensor]
    updates: list[Tensor]
    lr: Any
    trusted: bool


def _by_kind(group: dict[str, Any]) -> list[list[Tensor]]:
    """A group's parameters with a gradient, by device and dtype, as torch._foreach needs them."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in group["params"]:
        if p.grad is not None:
            if p.grad.is_sparse:
                raise ConfigError("gradients must be dense, got a sparse one; use sparse=False.")
            by_kind.setdefault((p.device, p.dtype), []).append(p)
    return list(by_kind.values())


def _factor(number: Any, like: Shards) -> Any:
    """A number for torch._foreach: of the tensors' dtype, if it is a tensor."""
    return number.to(like[0].dtype) if isinstance(number, Tensor) else number


class Lamb(_Trusted):
    """LAMB: Adam's direction, decoupled weight decay, one trust ratio per layer.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  u = m' / (sqrt(v') + eps) + weight_decay w,
    with m', v' corrected for bias;  w_i -= lr (||w_i|| / ||u_i||) u_i. (The ratio: `_Trusted`.)

    Args:
        params: iterable of parameters or of group dictionaries.
        lr, betas, eps: as in Adam; lr is relative to ||w_i||.
        weight_decay: decoupled. A group where it is 0 (biases, norms) has trust ratios of 1.

    Source: You et al., arXiv:1904.00962, Algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        pair = isinstance(betas, tuple | list) and len(betas) == 2
        if not pair or not all(isinstance(b, Real) and 0 <= b < 1 for b in betas):
            raise ConfigError(
                f"betas must be two numbers in [0, 1), got {betas}. The usual are 0.9 and 0.999."
            )
        check_number("eps", eps, 1e-6)
        if not 0 <= eps < float("inf"):
            raise ConfigError(f"eps must be >= 0 and finite, got {eps}. The usual is 1e-6.")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def states(self, params: Shards) -> at_once.States | None:
        if type(self) is not Lamb:  # a subclass may have other formulas
            return None
        ms, vs = self._slots(params, "exp_avg"), self._slots(params, "exp_avg_sq")
        return at_once.States(ms=ms, vs=vs, steps=self._steps(params))

    def _directions(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any], alive: Any
    ) -> list[Tensor]:
        ms, vs = self._slots(params, "exp_avg"), self._slots(params, "exp_avg_sq")
        steps = self._counts(params, alive)
        b1, b2 = group["betas"]
        # Where alive is 0 the gradient is 0 as well, so that m * 1 + 0 is m, bit for bit.
        torch._foreach_mul_(ms, _factor(1 - (1 - b1) * alive, ms))
        torch._foreach_add_(ms, grads, alpha=1 - b1)
        torch._foreach_mul_(vs, _factor(1 - (1 - b2) * alive, vs))
        torch._foreach_addcmul_(vs, grads, grads, value=1 - b2)
        denominators = list(torch._foreach_div(vs, scalars(1 - b2**steps, vs)))
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        directions = list(torch._foreach_div(ms, scalars(1 - b1**steps, ms)))
        torch._foreach_div_(directions, denominators)
        return directions


class Lars(_Trusted):
    """LARS: SGD's momentum direction, decoupled weight decay, one trust ratio per layer.

    m = momentum m + g;  u = m + weight_decay w;  w_i -= lr (||w_i|| / ||u_i||) u_i.

    Args:
        params: iterable of parameters or of group dictionaries.
        lr: relative to ||w_i||. momentum: in [0, 1).
        weight_decay: decoupled. A group where it is 0 (biases, norms) has trust ratios of 1.

    Source: You et al., arXiv:1708.03888, with the layer rule of arXiv:1904.00962.
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, momentum: float = 0.9, weight_decay: float = 5e-4
    ) -> None:
        check_number("momentum", momentum, 0.9)
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum must be in [0, 1), got {momentum}. The usual one is 0.9.")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _directions(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any], alive: Any
    ) -> list[Tensor]:
        ms = self._slots(params, "momentum_buffer")
        torch._foreach_mul_(ms, _factor(1 - (1 - group["momentum"]) * alive, ms))
        torch._foreach_add_(ms, grads)
        return clones(ms)


_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


def skips_on_device(base: Optimizer) -> bool:
    """True if base.step() with `found_inf` of 1 leaves weights and state as they are.

    That holds for Lamb, Lars and torch's own fused optimizers, all of whose groups are fused. SGD
    makes its momentum buffer without filling it when it skips, so that it must have one before.
    """
    if isinstance(base, _Trusted):
        return True
    if type(base) not in _FUSED or not all(group.get("fused") for group in base.param_groups):
        return False
    return not isinstance(base, torch.optim.SGD) or all(
        p.grad is None or base.state.get(p, {}).get("momentum_buffer") is not None
        for group in base.param_groups
        for p in group["params"]
        if group["momentum"]
    )


def guarded_step(base: Optimizer, finite: Tensor) -> bool:
    """base.step(), unless a gradient was not finite; `finite` is 0-dim bool, the same on all ranks.

    Bases of `skips_on_device` skip there. Any other costs one host read, which is free on the CPU.
    Returns whether base.step was called, so that its state exists.
    """
    if finite.is_cuda and skips_on_device(base):
        step_unless(base, (~finite).float())
        return True
    if not bool(finite):
        return False
    base.step()
    return True


def step_unless(base: Any, found_inf: Tensor) -> None:
    """base.step(), which the device skips where `found_inf`, 0-dim, is 1."""
    base.found_inf = found_inf
    try:
        base.step()
    finally:
        base.found_inf = None
