"""DeepSpeed ZeRO: perturbing the weights is one more kind of optimizer step.

DeepSpeed calls the client optimizer's `step()` with its flat fp32 masters and their reduced,
unscaled gradients, and then shows the masters to forward. So the client climbs in one such step and
descends in the next; nothing of DeepSpeed is copied or patched, and no gather is spent on going
back: the weights that are shown after the descent are those of the next step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...maths.ascent import Climb, cosine
from ...maths.look import Given
from ...maths.shards import dots, whole
from ...optim.seen import Seen, climb_seen_, perturb_seen_in_
from ...optim.sharpness import Sharpness
from ..backend import Loss
from ..flat import Flat
from ..stored import watch_first_step
from .layout import Layout
from .library import check_engine
from .state import ZeroState


class Zero(ZeroState):
    """A DeepSpeedEngine whose client optimizer is one of ours.

    Args:
        engine: from deepspeed.initialize(model=..., optimizer=<SAM, LookSAM, ...>, config=...).
        autocast: dtype of arithmetic where the engine's weights are fp32; None for none.

    Raises:
        ConfigError: the engine's optimizer is not ours, or its configuration is one that would
            give wrong gradients without an error.
    """

    name = "zero"
    replicated = False

    def __init__(self, engine: Any, *, autocast: torch.dtype | None = None) -> None:
        check_engine(engine)
        self.engine = engine
        self.model = engine
        self.module: nn.Module = engine.module
        self.optimizer: Sharpness = engine.basic_optimizer
        self.stage = int(engine.zero_optimization_stage())
        self.replicated = self.stage == 0
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.layout = Layout(engine, self.optimizer, self.stage)
        self.device = engine.device
        self.dtype = next(self.module.parameters()).dtype
        if self.dtype != torch.float32:
            self.optimizer.visible_dtype = self.dtype
        self.autocast = autocast
        if autocast is not None:
            self.optimizer.visible_dtype = autocast
        self.optimizer.model = None
        self.optimizer.driver = self._client_step
        base = self.optimizer.base_optimizer
        self._flat_of = {id(f.master): f for f in self.layout.flats}
        if hasattr(base, "pieces"):
            base.pieces = lambda param, like: self._flat_of[id(param)].views(like)
            base.reduce = self.reduce
        watch_first_step(self)
        self._first: dict[int, int] = {}  # for each flat, the number of its first layer
        for f in self.layout.flats:
            self._first[id(f.master)] = sum(
                len(g.pieces) for g in self.layout.flats[: len(self._first)]
            )
        on_gpu = torch.device(self.device).type == "cuda"
        self._offloaded = on_gpu and any(not f.master.is_cuda for f in self.layout.flats)
        self._descending = False
        self._new: dict[int, Tensor] = {}  # g_v of this look, until the base has stepped
        self._work: Callable[[Flat, int], None] | None = None
        self._lifted: list[tuple[Tensor, Tensor]] | None = None  # (w0, g) per flat
        self._unscale = 1.0
        self._cosines: list[Tensor] = []

    # Passes.

    def evaluate(self, forward: Callable[[nn.Module], Tensor]) -> Tensor:
        """See `Backend.evaluate`."""
        with torch.no_grad(), self._arithmetic():
            return forward(self.module)

    def _arithmetic(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, self.autocast, enabled=self.autocast is not None)

    def backward(self, batches: Sequence[Any], loss: Loss, *, average: bool = True) -> Tensor:
        """See `Backend.backward`."""
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            self.engine.set_gradient_accumulation_boundary(last and average)
            with self._arithmetic():
                value = loss(self.model, batch)
            self.engine.backward(value / len(batches), scale_wrt_gas=False)
            total += value.detach().float()
        return total / len(batches)

    def _wait_for_host(self) -> None:
        """With offload, DeepSpeed's copies of gradients to the host and of weights from it may be
        under way, and touching either end would be a race."""
        if self._offloaded:
            torch.cuda.synchronize(self.device)

    def _unscaled(self) -> list[Tensor]:
        """Shards of the mean gradient in fp32, for sums."""
        self._wait_for_host()
        scale = self.layout.scale()
        grads = [g.float() for g in self.layout.gradients()]
        return grads if scale == 1.0 else [g / scale for g in grads]

    # The client optimizer, called by DeepSpeed once per group, sub-group or step.

    def _client_step(self) -> None:
        if self._work is None:
            return  # a step that must change nothing
        groups = self.optimizer.param_groups
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        for param in params:
            self._rescale_(param.grad)
            self._work(self._flat_of[id(param)], self._first[id(param)])
        if self._descending:
            self._base_step()
        for param in params:
            if id(param) in self._new:
                self.optimizer.state[param]["g_v"] = self._new.pop(id(param))

    def _rescale_(self, grad: Tensor) -> None:
        """DeepSpeed may change the loss scale between backward and unscaling by the new one."""
        now = self.layout.scale()
        if now != self._unscale:
            grad.mul_(now / self._unscale)

    def _column(self, name: str) -> Tensor:
        """rho or alpha, [P]."""
        groups = self.optimizer.param_groups
        values = [groups[f.group][name] for f in self.layout.flats for _ in f.pieces]
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def _masters(self) -> list[Tensor]:
        return [v for flat in self.layout.flats for v in flat.views(flat.master.detach())]

    @torch.no_grad()
    def climb(self, *, local: bool) -> bool:
        """See `Backend.climb`: one all-gather at stages 1 and 2, as after any step."""
        if local:
            return self._climb_locally()
        grads = self._unscaled()
        climb = self.optimizer.rule.climb(
            self._masters(), grads, rho=self._column("rho"), reduce=self.reduce
        )
        if not bool(torch.isfinite(climb.grad2.sum())):
            return False
        self._unscale, self._cosines = self.layout.scale(), []
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def work(flat: Flat, first: int) -> None:
            assert flat.master.grad is not None
            kept[id(flat.master)] = (flat.master.detach().clone(), flat.master.grad.clone())
            self._perturb_(flat, first, climb)

        frozen = self.layout.freeze_scale()
        self._run(work)
        self.layout.thaw_scale(frozen)
        self._lifted = [kept[id(f.master)] for f in self.layout.flats]
        return True

    def _climb_locally(self) -> bool:
        """Every rank moves the weights that forward sees along its own gradient, and no master."""
        params, own = self.layout.visible()
        scale = self.layout.scale()
        grads = [g.float() / scale for g in own]
        climb = self.optimizer.rule.climb(
            [p.float() for p in params], grads, rho=self._column("rho"), reduce=whole
        )
        eps = [climb.eps(i, g) for i, g in enumerate(grads)]
        self.average_(grads)
        if not bool(torch.isfinite(torch.stack([g.sum() for g in grads]).sum())):
            return False
        self._lifted, at = [], 0
        for flat in self.layout.flats:
            mean = torch.zeros_like(flat.master)
            for piece, view in zip(flat.pieces, flat.views(mean), strict=True):
                view.copy_(grads[at].view(-1)[piece.start : piece.stop])
                at += 1
            self._lifted.append((flat.master.detach().clone(), mean))
        self._cosines = []
        if self.optimizer.visible_dtype is None:
            torch._foreach_add_(params, eps)
        else:
            self._cosines.append(perturb_seen_in_(params, eps, self.optimizer.visible_dtype))
        self.engine.optimizer.zero_grad()
        return True

    def _perturb_(self, flat: Flat, first: int, climb: Climb) -> None:
        grad = flat.master.grad
        assert grad is not None
        weights, grads = flat.views(flat.master.detach()), flat.views(grad)
        sums = climb_seen_(weights, grads, climb, self.optimizer.visible_dtype, first=first)
        if sums is not None:
            self._cosines.append(sums)

    def _run(self, work: Callable[[Flat, int], None]) -> None:
        """One step of DeepSpeed's optimizer that does `work`, and no step of its engine."""
        self._work = work
        try:
            self.engine.optimizer.step()
        finally:
            self._work = None
        self.engine.optimizer.zero_grad()

    @torch.no_grad()
    def descend(self) -> Seen:
        """See `Backend.descend`: the step of DeepSpeed's engine."""
        lifted, self._lifted = self._lifted, None
        return self._between() if lifted is None else self._after_look(lifted)

    def _after_look(self, lifted: list[tuple[Tensor, Tensor]]) -> Seen:
        optimizer = self.optimizer
        grads = [v for flat, (_, g) in self._each(lifted) for v in flat.views(g)]
        sam = self._unscaled()
        given = optimizer.rule.learn(sam, grads, clip=optimizer.clip, reduce=self.reduce)
        if optimizer.probe is not None:
            share = given.size
            optimizer.probe(
                step=optimizer.steps, grads=grads, sam=sam, share=share, reduce=self.reduce
            )
        cosines = self.reduce(torch.cat(self._cosines, -1)) if self._cosines else None
        if not bool(given.finite):
            return self._give_up(lifted, look=True)
        kept2 = self._apply(given, lifted)
        seen = None if cosines is None else cosine(cosines)
        return self._done(Seen.of(given, look=True, kept2=kept2, eps_cosine=seen))

    def _between(self) -> Seen:
        optimizer = self.optimizer
        given = optimizer.rule.between(
            self._unscaled(),
            self._kept() if optimizer.rule.keeps else None,
            alpha=self._column("alpha"),
            clip=optimizer.clip,
            reduce=self.reduce,
        )
        if not bool(given.finite):
            return self._give_up(None, look=False)
        self._apply(given, None)
        kept2 = given.kept2 if optimizer.rule.keeps else None
        return self._done(Seen.of(given, look=False, kept2=kept2, eps_cosine=None))

    def _done(self, seen: Seen) -> Seen:
        self.optimizer.seen = seen
        self.optimizer.steps += 1
        self.optimizer.owe(None)
        return seen

    def _each(self, lifted: list[tuple[Tensor, Tensor]]) -> list[tuple[Flat, tuple]]:
        return list(zip(self.layout.flats, lifted, strict=True))

    def _kept(self) -> list[Tensor]:
        """g_v per layer; nothing yet is zero."""
        state, flats = self.optimizer.state, self.layout.flats
        whole_flats = [state.get(f.master, {}).get("g_v") for f in flats]
        return [
            v
            for f, kept in zip(flats, whole_flats, strict=True)
            for v in f.views(torch.zeros_like(f.master) if kept is None else kept)
        ]

    def _apply(self, given: Given, lifted: list[tuple[Tensor, Tensor]] | None) -> Tensor | None:
        """DeepSpeed's step, where the base gets what `given` says. On a look, returns ||g_v||^2."""
        self._unscale = self.layout.scale()
        before = {} if lifted is None else {id(f.master): b for f, b in self._each(lifted)}
        sums: list[Tensor] = []

        def work(flat: Flat, first: int) -> None:
            grad = flat.master.grad
            assert grad is not None
            if before:
                weight, g = before[id(flat.master)]
                flat.master.detach().copy_(weight)
                new = self._learn_(flat, first, grad, g, given)
                sums.append(dots([new], [new]))
                if self.optimizer.rule.keeps:
                    self._new[id(flat.master)] = new
            elif self.optimizer.rule.keeps:
                self._reuse_(flat, first, grad, given)
            if self.optimizer.clip is not None:
                grad.mul_(given.scale.to(grad.device, grad.dtype))

        self._work, self._descending = work, True
        try:
            self.engine.step()
        finally:
            self._work, self._descending = None, False
        if not before:
            return None
        device = self.device
        return self.reduce(torch.stack(sums).sum().to(device).view(1)).sum()

    def _learn_(self, flat: Flat, first: int, sam: Tensor, g: Tensor, given: Given) -> Tensor:
        """g_v of a flat, in memory of its own, where padding is 0."""
        new = torch.zeros_like(g)
        parts = (flat.views(new), flat.views(sam), flat.views(g))
        for i, (v, s, old) in enumerate(zip(*parts, strict=True), first):
            torch.addcmul(s, old, given.size[i].to(g.device, g.dtype), value=-1, out=v)
        return new

    def _reuse_(self, flat: Flat, first: int, grad: Tensor, given: Given) -> None:
        kept = self.optimizer.state.get(flat.master, {}).get("g_v")
        if kept is None:
            return
        pairs = zip(flat.views(grad), flat.views(kept), strict=True)
        for i, (g, v) in enumerate(pairs, first):
            g.addcmul_(v, given.size[i].to(g.device, g.dtype))

    def _base_step(self) -> None:
        """The base's step on the groups that DeepSpeed shows its client at this moment."""
        base = self.optimizer.base_optimizer
        groups, base.param_groups = base.param_groups, self.optimizer.param_groups
        try:
            base.step()
        finally:
            base.param_groups = groups

    @torch.no_grad()
    def skip(self) -> Seen:
        """See `Backend.skip`."""
        return self._give_up(None, look=True)

    def _give_up(self, lifted: list[tuple[Tensor, Tensor]] | None, look: bool) -> Seen:
        """A step with a gradient that is not finite: DeepSpeed counts it, nothing else changes."""
        if lifted is not None:
            for flat, (weight, _) in self._each(lifted):
                flat.master.detach().copy_(weight)
        self.engine.step()  # with no work for the client; in fp16 it lowers the scale
        self.engine.optimizer.zero_grad()
        if lifted is not None:
            self.layout.publish()
        nothing = torch.tensor(torch.nan)
        self.optimizer.seen = Seen(look, torch.tensor(False), nothing, nothing)
        self.optimizer.steps += 1
        self.optimizer.owe(self.optimizer.seen.finite if look else None)
        return self.optimizer.seen

    @torch.no_grad()
    def lower(self) -> None:
        """See `Backend.lower`."""
        if self._lifted is not None:
            self._wait_for_host()
            for flat, (weight, _) in self._each(self._lifted):
                flat.master.detach().copy_(weight)
            self._lifted = None
            self.layout.publish()
