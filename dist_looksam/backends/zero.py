"""DeepSpeed ZeRO: perturbing the weights is one more kind of optimizer step.

DeepSpeed calls the client optimizer's `step()` with its flat fp32 masters and their reduced,
unscaled gradients, and then shows the masters to forward. So the client climbs in one such step and
descends in the next; nothing of DeepSpeed is copied or patched, and no gather is spent on going
back: the weights that are shown after the descent are those of the next step.
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError
from ..maths.ascent import Climb, cosine
from ..maths.look import Given
from ..maths.shards import dots, whole
from ..optim.sam import Seen, Sharpness, perturb_seen_in_
from .backend import Loss, Piece, Read
from .plain import KEYS
from .zero_layout import Flat, Layout, check_version


def load_deepspeed() -> Any:
    """The library, told not to compile an op for gloo at its start (2 minutes, and a lock file)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    check_version(deepspeed.__version__)
    if not torch.cuda.is_available():
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    return deepspeed


def open_engine(module: nn.Module, optimizer: Sharpness, config: dict[str, Any]) -> Any:
    """deepspeed.initialize. The process group exists."""
    deepspeed = load_deepspeed()
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


class Zero:
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
        _check_engine(engine)
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
        self._first: dict[int, int] = {}  # for each flat, the number of its first layer
        for f in self.layout.flats:
            self._first[id(f.master)] = sum(
                len(g.pieces) for g in self.layout.flats[: len(self._first)]
            )
        self._descending = False
        self._new: dict[int, Tensor] = {}  # g_v of this look, until the base has stepped
        self._work: Callable[[Flat, int], None] | None = None
        self._lifted: list[tuple[Tensor, Tensor]] | None = None  # (w0, g) per flat
        self._unscale = 1.0
        self._cosines: list[Tensor] = []

    # Sums and means.

    def reduce(self, sums: Tensor) -> Tensor:
        """Add over the ranks that split a layer; nothing at stage 0, where all hold all."""
        if self.replicated:
            return whole(sums)
        sums = sums.to(self.device)
        dist.all_reduce(sums, group=self.layout.group)
        return sums

    def mean(self, numbers: Tensor) -> Tensor:
        """One small all-reduce."""
        numbers = numbers.to(self.device, copy=True)
        dist.all_reduce(numbers)
        return numbers / self.size

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """One all-reduce of whole tensors together (stage 0)."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for t, new in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(new.view_as(t))

    def gather(self, thing: Any) -> list[Any]:
        """See `Backend.gather`."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing)
        return found

    # Passes.

    def evaluate(self, forward: Callable[[nn.Module], Tensor]) -> Tensor:
        """See `Backend.evaluate`."""
        with (
            torch.no_grad(),
            torch.autocast(self.device_type, self.autocast, enabled=self.autocast is not None),
        ):
            return forward(self.module)

    @property
    def device_type(self) -> str:
        """ "cpu" or "cuda"."""
        return torch.device(self.device).type

    def backward(self, batches: Sequence[Any], loss: Loss, *, average: bool = True) -> Tensor:
        """See `Backend.backward`."""
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            self.engine.set_gradient_accumulation_boundary(last and average)
            with torch.autocast(self.device_type, self.autocast, enabled=self.autocast is not None):
                value = loss(self.model, batch)
            self.engine.backward(value / len(batches), scale_wrt_gas=False)
            total += value.detach().float()
        return total / len(batches)

    def _unscaled(self) -> list[Tensor]:
        """Shards of the mean gradient in fp32, for sums."""
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
        for p, e in zip(params, eps, strict=True):
            if self.optimizer.visible_dtype is None:
                p.add_(e)
            else:
                self._cosines.append(perturb_seen_in_(p, e, self.optimizer.visible_dtype))
        self.engine.optimizer.zero_grad()
        return True

    def _perturb_(self, flat: Flat, first: int, climb: Climb) -> None:
        grad = flat.master.grad
        assert grad is not None
        shards = zip(flat.views(flat.master.detach()), flat.views(grad), strict=True)
        for i, (w, g) in enumerate(shards, first):
            eps = climb.eps(i, g)
            if self.optimizer.visible_dtype is None:
                w.add_(eps)
                continue
            self._cosines.append(perturb_seen_in_(w, eps, self.optimizer.visible_dtype))

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
        optimizer = self.optimizer
        lifted, self._lifted = self._lifted, None
        look = lifted is not None
        kept = None
        if lifted is not None:
            grads = [v for flat, (_, g) in self._each(lifted) for v in flat.views(g)]
            sam = self._unscaled()
            given = optimizer.rule.learn(sam, grads, clip=optimizer.clip, reduce=self.reduce)
            if optimizer.probe is not None:
                optimizer.probe(
                    step=optimizer.steps,
                    grads=grads,
                    sam=sam,
                    share=given.size,
                    reduce=self.reduce,
                )
            cosines = self.reduce(torch.stack(self._cosines, -1)) if self._cosines else None
            cosine_seen = None if cosines is None else cosine(cosines)
        else:
            kept = self._kept() if optimizer.rule.keeps else None
            given = optimizer.rule.between(
                self._unscaled(),
                kept,
                alpha=self._column("alpha"),
                clip=optimizer.clip,
                reduce=self.reduce,
            )
            cosine_seen = None
        if not bool(given.finite):
            return self._give_up(lifted, look)
        kept2 = self._apply(given, lifted)
        optimizer.seen = Seen.of(
            given,
            look=look,
            kept2=kept2 if look else (given.kept2 if kept else None),
            eps_cosine=cosine_seen,
        )
        optimizer.steps += 1
        optimizer.owe(None)
        return optimizer.seen

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
        """g_v of a flat, in the memory of g; its padding is 0."""
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
            for flat, (weight, _) in self._each(self._lifted):
                flat.master.detach().copy_(weight)
            self._lifted = None
            self.layout.publish()

    # Checkpoints.

    def pieces(self) -> list[Piece]:
        """This rank's part of every layer."""
        return [p for flat in self.layout.flats for p in flat.pieces]

    def slots(self) -> list[dict[str, Tensor]]:
        """See `Backend.slots`."""
        found = []
        for flat in self.layout.flats:
            state = self.optimizer.state.get(flat.master, {})
            views = {
                key: flat.views(value)
                for key, value in state.items()
                if isinstance(value, Tensor) and value.shape == flat.master.shape
            }
            views["weight"] = flat.views(flat.master.detach())
            found += [{k: v[i] for k, v in views.items()} for i in range(len(flat.pieces))]
        return found

    def counters(self) -> dict[str, Any]:
        """See `Backend.counters`."""
        steps = [float(s["step"]) for s in self.optimizer.state.values() if "step" in s]
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        scale = {}
        if scaler is not None and hasattr(scaler, "cur_iter"):
            good = scaler.cur_iter - scaler.last_overflow_iter - 1
            scale = {"scale": float(scaler.cur_scale), "good": int(good)}
        saved = {"steps": self.optimizer.steps, "owed": self.optimizer.owed()}
        return {**saved, "base_step": max(steps, default=0.0), "loss_scale": scale}

    @torch.no_grad()
    def load(self, read: Read, counters: dict[str, Any]) -> None:
        """See `Backend.load`."""
        for flat in self.layout.flats:
            state = self.optimizer.state[flat.master]
            for i, piece in enumerate(flat.pieces):
                place = (piece.name, piece.start, piece.stop)
                for key in ("weight", *KEYS):
                    values = read(place[0], key, place[1], place[2])
                    if values is None:
                        continue
                    if key == "weight":
                        flat.views(flat.master.detach())[i].copy_(values)
                        continue
                    if key not in state:
                        state[key] = torch.zeros_like(flat.master)
                    flat.views(state[key])[i].copy_(values)
            if "exp_avg" in state:
                state["step"] = torch.tensor(counters["base_step"])
        self.layout.publish()
        self.optimizer.steps = int(counters["steps"])
        self.optimizer.owe(torch.tensor(False) if counters["owed"] else None)
        scaler: Any = getattr(self.engine.optimizer, "loss_scaler", None)
        if counters["loss_scale"] and hasattr(scaler, "cur_iter"):
            scaler.cur_scale = counters["loss_scale"]["scale"]
            scaler.last_overflow_iter = scaler.cur_iter - counters["loss_scale"]["good"] - 1

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor] | None:
        """See `Backend.full_weights`: layer by layer, one reduce each."""
        weights = self.layout.buffers()
        for piece, slot in zip(self.pieces(), self.slots(), strict=True):
            flat = torch.zeros(torch.Size(piece.shape).numel(), device=self.device)
            flat[piece.start : piece.stop] = slot["weight"]
            if not self.replicated:
                dist.reduce(flat, 0, group=self.layout.group)
            weights[piece.name] = flat.view(piece.shape).cpu()
        return weights if self.rank == 0 else None


def _check_engine(engine: Any) -> None:
    client = engine.basic_optimizer
    if not isinstance(client, Sharpness):
        raise ConfigError(
            f"a DeepSpeed engine must be initialised with an optimizer of dist_looksam, got "
            f"{type(client).__name__}; pass optimizer=LookLayerSAM(...) to deepspeed.initialize."
        )
    stage = int(engine.zero_optimization_stage())
    if engine.gradient_clipping() > 0:
        raise ConfigError(
            f"gradient_clipping must be 0 in the DeepSpeed config, got "
            f"{engine.gradient_clipping()} (1.0 is its default); set it to 0 and pass clip here."
        )
    if stage in (1, 2) and engine.zero_round_robin_gradients():
        raise ConfigError(
            "round_robin_gradients must be false, got true, which moves layers about; remove it."
        )
    if stage == 0 and (engine.fp16_enabled() or engine.bfloat16_enabled()):
        raise ConfigError(
            "ZeRO stage 0 must be fp32, got 16 bits, where DeepSpeed unscales wrongly; "
            "use stage 1, 2 or 3."
        )
