"""Base optimizers: LAMB and LARS with exact layer norms, and how any of them skips a step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from ..maths.shards import Reduce, Shards, whole
from ..maths.trust import trust_ratio

Pieces = Callable[[Tensor, Tensor], list[Tensor]]


def in_one_piece(param: Tensor, like: Tensor) -> list[Tensor]:
    """The layers inside `param`, as views of `like`: one, unless a backend flattened several."""
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
    skips_on_device = True
    found_inf: Tensor | None = None
    reduce: Reduce = staticmethod(whole)
    pieces: Pieces = staticmethod(in_one_piece)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            if not 0 <= defaults[name] < float("inf"):
                raise ConfigError(f"{name} must be >= 0 and finite, got {defaults[name]}.")
        super().__init__(params, defaults)

    def _direction(self, param: Tensor, grad: Tensor, group: dict[str, Any], alive: Any) -> Tensor:
        """u before weight decay, a new tensor; updates the state, unless `alive` is 0."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from `.grad`; with a closure, the loss it returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights: list[Tensor] = []
        updates: list[Tensor] = []
        sizes: list[tuple[float, bool]] = []
        for group, param in self._with_gradient():
            alive: Any = 1.0
            grad: Any = param.grad
            if self.found_inf is not None:
                alive = 1.0 - self.found_inf.to(param.device, torch.float64)
                grad = torch.where(alive > 0, grad, 0.0)
            update = self._direction(param, grad, group, alive)
            decay = group["weight_decay"]
            if decay != 0:
                update.add_(param, alpha=decay)
            pieces = self.pieces(param, param)
            weights += pieces
            updates += self.pieces(param, update)
            sizes += [(group["lr"] * alive, decay != 0)] * len(pieces)
        self._descend(weights, updates, sizes)
        return loss

    def _with_gradient(self) -> Iterable[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    yield group, param

    def _descend(self, weights: Shards, updates: Shards, sizes: list[tuple[Any, bool]]) -> None:
        trusted = [i for i, (_, decayed) in enumerate(sizes) if decayed]
        ratios = {}
        if trusted:
            ws, us = [weights[i] for i in trusted], [updates[i] for i in trusted]
            ratios = dict(zip(trusted, trust_ratio(ws, us, reduce=self.reduce), strict=True))
        for i, (weight, update) in enumerate(zip(weights, updates, strict=True)):
            size = sizes[i][0] * ratios.get(i, 1.0)
            if isinstance(size, Tensor):
                size = size.to(weight.device, weight.dtype)
            weight.sub_(update.mul_(size))

    def _count(self, param: Tensor, alive: Any) -> Tensor:
        """The steps this parameter has taken, this one included; float64 on its own device."""
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float64, device=param.device)
        state["step"] = state["step"].to(param.device, torch.float64)
        state["step"] += alive
        return state["step"].clamp(min=1)


class Lamb(_Trusted):
    """LAMB: Adam's direction, decoupled weight decay, one trust ratio per layer.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  u = m' / (sqrt(v') + eps) + weight_decay w,
    with m', v' corrected for bias;  w_i -= lr (||w_i|| / ||u_i||) u_i. (The ratio: `_Trusted`.)

    Args:
        params: iterable of parameters or of group dictionaries.
        lr, betas, eps, weight_decay: as in Adam; lr is relative to ||w_i||.

    Source: You et al., arXiv:1904.00962, Algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0 <= b < 1 for b in betas):
            raise ConfigError(f"betas must be in [0, 1), got {betas}. The usual are 0.9 and 0.999.")
        if not eps >= 0:
            raise ConfigError(f"eps must be >= 0, got {eps}.")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def _direction(self, param: Tensor, grad: Tensor, group: dict[str, Any], alive: Any) -> Tensor:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        step = self._count(param, alive)
        b1, b2 = group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        # Where alive is 0 the gradient is 0 as well, so that m * 1 + 0 is m, bit for bit.
        m.mul_(1 - (1 - b1) * alive).add_(grad, alpha=1 - b1)
        v.mul_(1 - (1 - b2) * alive).addcmul_(grad, grad, value=1 - b2)
        below = (v / (1 - b2**step)).sqrt_().add_(group["eps"])
        return (m / (1 - b1**step)).div_(below)


class Lars(_Trusted):
    """LARS: SGD's momentum direction, decoupled weight decay, one trust ratio per layer.

    m = momentum m + g;  u = m + weight_decay w;  w_i -= lr (||w_i|| / ||u_i||) u_i.

    Args:
        params: iterable of parameters or of group dictionaries.
        lr: relative to ||w_i||. momentum: in [0, 1). weight_decay: decoupled.

    Source: You et al., arXiv:1708.03888, with the layer rule of arXiv:1904.00962.
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum must be in [0, 1), got {momentum}. The usual one is 0.9.")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _direction(self, param: Tensor, grad: Tensor, group: dict[str, Any], alive: Any) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        m = state["momentum_buffer"]
        m.mul_(1 - (1 - group["momentum"]) * alive).add_(grad)
        return m.clone()


def guarded_step(base: Optimizer, finite: Tensor) -> bool:
    """base.step(), unless a gradient was not finite; `finite` is 0-dim bool, the same on all ranks.

    Lamb, Lars and torch's fused optimizers skip on the device. Any other base costs one host read.
    Returns whether base.step was called, so that its state has been made.
    """
    fused = any(group.get("fused") for group in base.param_groups)
    if fused or getattr(base, "skips_on_device", False):
        base.found_inf = (~finite).float()  # type: ignore[attr-defined]
        try:
            base.step()
        finally:
            base.found_inf = None  # type: ignore[attr-defined]
        return True
    if not bool(finite):
        return False
    base.step()
    return True
