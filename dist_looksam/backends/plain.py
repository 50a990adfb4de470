"""One process, no communication. Also the base class of the backends other than ZeRO."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..maths.together import Groups
from ..optim.checks import check_fp32, check_inside
from ..optim.seen import Seen
from ..optim.sharpness import Sharpness
from .backend import Loss, Piece
from .flat import NO_GROUP, Flat
from .names import name_in
from .stored import StoredLayers

PRECISION_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' entries."""
    return sum(t.numel() * t.element_size() for t in tensors)


def state_bytes(optimizer: Sharpness, weights: int) -> dict[str, int]:
    """Bytes of an optimizer's state, the base's and g_v, and of what a look keeps: w and g, or w
    alone where the method perturbs along the momentum. `weights`: bytes of w."""
    state = optimizer.state.values()
    pairs = [(k, v) for s in state for k, v in s.items() if isinstance(v, Tensor)]
    look = weights if optimizer.rule.along_momentum else 2 * weights
    gv = num_bytes(v for k, v in pairs if k == "g_v")
    return {"base_state": num_bytes(v for _, v in pairs) - gv, "g_v": gv, "look": look}


class LossScale:
    """fp16's loss scale: halved when a step is skipped, doubled after `window` good ones.

    Args:
        start: first scale; a power of two, so that scaling rounds nothing.
        window: good steps before the scale is doubled.
    """

    def __init__(self, start: float = 2.0**16, window: int = 2000) -> None:
        self.scale = start
        self.window = window
        self.good_steps = 0

    def update(self, *, finite: bool) -> None:
        """Called once per optimizer step."""
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.window:
            self.scale, self.good_steps = self.scale * 2, 0


class Plain(StoredLayers):
    """fp32 weights in one process; 16-bit arithmetic by autocast. Methods: see `Backend`.

    Args:
        module: already on its device.
        optimizer: around a base over the module's parameters.
        precision: "fp32", "bf16" or "fp16" (with a loss scale).
    """

    name = "plain"
    rank = 0
    ranks_may_join = False
    size = 1

    def __init__(self, module: nn.Module, optimizer: Sharpness, *, precision: str = "fp32") -> None:
        self.module = module
        self.optimizer = optimizer
        self.model = self.wrap(module)
        self.dtype = PRECISION_DTYPES[precision]
        self.scaler = LossScale() if precision == "fp16" else None
        self.device = next(module.parameters()).device
        self.replicas = (self.size, self.rank)
        self._checked = 0  # number of parameters that are known to be the module's
        self.bind()

    # Backends with several ranks override these.

    def bind(self) -> None:
        """Call the optimizer's `bind`."""
        self.optimizer.bind(visible_dtype=self.dtype)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that forward is called on."""
        return module

    def no_sync(self) -> AbstractContextManager[Any]:
        """Inside, backward accumulates this rank's own gradients, without communication."""
        return nullcontext()

    def finish_gradients(self, *, average: bool) -> None:
        """After the last micro-batch of a pass; with `average`, complete the reduction."""

    def gradients(self) -> list[Tensor]:
        """The gradients of a pass, in tensors that may be written to."""
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def average_(self, tensors: Sequence[Tensor], neighbours: int | None = None) -> None:
        """Replace whole tensors by their mean over ranks, or over a block of `neighbours` ranks."""

    def mean(self, numbers: Tensor) -> Tensor:
        return numbers

    # The two-gradient step.

    def arithmetic(self) -> torch.autocast:
        """Inside, forward computes in `precision`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(
        self,
        batches: Sequence[Any],
        loss: Loss,
        *,
        average: bool = True,
        onto: dict[Tensor, Tensor] | None = None,
    ) -> Tensor:
        self._check_params()
        self.optimizer.zero_grad()
        scale = self.scaler.scale if self.scaler else 1.0
        self._begin_with(onto or {}, scale)
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last and average else self.no_sync():
                with self.arithmetic():
                    value = loss(self.model, batch)
                (value * (scale / len(batches))).backward()
            total += value.detach().float()
        self.finish_gradients(average=average)
        if self.scaler:
            torch._foreach_mul_(self.gradients(), 1.0 / scale)
        return total / len(batches)

    def _begin_with(self, sums: dict[Tensor, Tensor], scale: float) -> None:
        """Let backward add to these, so that the last micro-batch's reduction is that of all."""
        for p, total in sums.items():
            p.grad = total.mul_(scale)

    def averages(self, groups: Groups) -> bool:
        """See `Backend.ema`: all ranks share the group."""
        return groups.ranks == self.size

    def perturb_group(self, groups: Groups) -> None:
        """See `Backend.perturb_group`."""
        whole = groups.ranks in (1, self.size)  # own gradients, or means over all ranks
        mean = partial(self.average_, neighbours=groups.ranks)
        self.optimizer.perturb_group(average_=None if whole else mean)

    def end_group(self, groups: Groups, *, last: bool) -> None:
        """See `Backend.end_group`."""
        self.optimizer.end_group(last=last)
        if last:
            own = groups.ranks < self.size
            self.optimizer.mean_of_groups(groups.rounds, average_=self.average_ if own else None)

    def take_sum(self) -> dict[Tensor, Tensor]:
        """See `Backend.take_sum`."""
        return self.optimizer.take_sum()

    def climbing_ranks(self) -> list[int]:
        """See `Backend.climbing_ranks`."""
        return [n for n in range(1, self.size + 1) if self.size % n == 0]

    def perturb(self) -> bool:
        """See `Backend.perturb`. From a GPU it reads the overflow flag in fp16 only."""
        finite = self.optimizer.perturb()
        if self.scaler is None and finite.is_cuda:
            return True
        return bool(self.mean(finite.float()) == 1 if self.scaler else finite)

    def perturb_ahead(self) -> None:
        """See `Backend.perturb_ahead`."""
        self.optimizer.perturb_ahead()

    def update(self) -> Seen:
        return self._scaled(self.optimizer.update())

    def skip(self) -> Seen:
        return self._scaled(self.optimizer.skip())

    def abandon(self) -> None:
        """See `Backend.abandon`. Gradients are cleared by the next pass."""
        self.optimizer.abandon()

    def _check_params(self) -> None:
        """ConfigError for what may have come since the last step: module.half(), and groups that
        were added to the base itself."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        check_fp32(params)
        if self.optimizer.module is not None and len(params) != self._checked:
            check_inside(params, self.optimizer.module)
            self._checked = len(params)

    def _scaled(self, seen: Seen) -> Seen:
        if self.scaler:
            self.scaler.update(finite=bool(seen.finite))
        return seen

    # For checkpoints.

    def _named(self) -> list[tuple[str, Tensor]]:
        return [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]

    def group_numbers(self) -> dict[int, int]:
        """The param group of each of the optimizer's parameters, by its id."""
        groups = self.optimizer.param_groups
        return {id(p): n for n, group in enumerate(groups) for p in group["params"]}

    def held(self) -> Sequence[Flat]:
        """Every layer, whole."""
        group_of, flats = self.group_numbers(), []
        for name, p in self._named():
            piece = Piece(name_in(self.module, name), tuple(p.shape), 0, p.numel())
            flats.append(Flat(p, group_of.get(id(p), NO_GROUP), (piece,), (0,)))
        return flats

    @torch.no_grad()
    def evaluate(self, forward: Callable[[nn.Module], Tensor]) -> Tensor:
        with self.arithmetic():
            return forward(self.module)

    def memory(self) -> dict[str, int]:
        weights = num_bytes(p for _, p in self._named())
        ema = 0 if self.ema is None else self.ema.num_bytes()
        own = {"weights": weights, "masters": 0, "ema": ema}
        return {**own, **state_bytes(self.optimizer, weights)}

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def read_scale(self) -> dict[str, Any]:
        """See `StoredLayers.read_scale`."""
        scaler = self.scaler
        return {"scale": scaler.scale, "good": scaler.good_steps} if scaler else {}

    def write_scale(self, saved: dict[str, Any]) -> None:
        """See `StoredLayers.write_scale`."""
        if self.scaler and saved:
            self.scaler.scale, self.scaler.good_steps = saved["scale"], saved["good"]
