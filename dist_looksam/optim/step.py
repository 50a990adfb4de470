"""One step with one gradient or two, in parts that the closure form and all backends share.

Numbers come first, with all that is sent over ranks: `perturbation`, `decide`. They are then
applied to all parameters at once, or to some at a time: `perturb_`, `apply_`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..maths.ascent import Perturbation, cosine, perturb_
from ..maths.look import Update
from ..maths.shards import Reduce, Shards, copies, dots, whole
from .base import Pieces, guarded_step, in_one_piece
from .counters import Counted
from .rule import Rule
from .seen import Probe, Seen


class TwoGradients(Counted):
    """The step of an optimizer around `base_optimizer`, whose groups and state are its own.

    Attributes:
        rule: when to look and what to keep.
        seen: what the last step did.
        clip: maximum norm of the gradient passed to the base; None for none.
        probe: called on looks.
    """

    base_optimizer: Optimizer
    _own: dict[str, float]  # rho and alpha of groups that have none
    _keys: dict[str, str]  # under which the base's groups hold them

    def _begin(self, rule: Rule, model: nn.Module | None) -> None:
        """No step taken, bound to no backend."""
        self.rule, self.model = rule, model
        self.clip: float | None = None
        self.probe: Probe | None = None
        self.seen: Seen | None = None
        self.driver: Callable[[], None] | None = None
        self.pieces: Pieces = in_one_piece
        self.reduce: Reduce = whole
        self.visible_dtype: torch.dtype | None = None
        self._group_of: dict[Tensor, int] | None = None
        self._device: torch.device | None = None
        self._columns: dict[str, tuple[tuple[float, ...], Tensor | float]] = {}
        self._places: dict[Tensor, range] = {}
        self._perturbed: _Perturbed | None = None

    @property
    def perturbed(self) -> bool:
        """Between the two passes of a look, and until it is finished."""
        return self._perturbed is not None

    def bind(
        self,
        *,
        pieces: Pieces = in_one_piece,
        reduce: Reduce = whole,
        visible_dtype: torch.dtype | None = None,
        driver: Callable[[], None] | None = None,
        group_of: dict[Tensor, int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Train on a backend, which looks after running statistics.

        Args:
            pieces: the layers inside one parameter, where several were flattened.
            reduce: adds sums over the ranks that split a layer.
            visible_dtype: dtype in which forward sees the weights, if another; looks then report
                the cosine between applied and intended perturbation.
            driver: what `step` calls from now on.
            group_of: each parameter's group, where `param_groups` does not hold the parameters
                between steps.
            device: of what `reduce` returns, where parameters are on another.
        """
        self.pieces, self.reduce, self.visible_dtype = pieces, reduce, visible_dtype
        self.driver, self._group_of, self._device, self.model = driver, group_of, device, None
        base: Any = self.base_optimizer
        if hasattr(base, "pieces"):
            base.pieces, base.reduce = pieces, reduce

    # What the step works on: parameters, and the layers in them. A parameter without a gradient
    # takes no part.

    def _layers(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _active(self) -> tuple[list[Tensor], list[Tensor]]:
        """(parameters, their gradients), for the parameters that have one."""
        params = [p for p in self._layers() if p.grad is not None]
        for p in params:
            if p.grad.is_sparse:  # type: ignore[union-attr]
                raise ConfigError("gradients must be dense, got a sparse one; use sparse=False.")
        return params, [p.grad for p in params]  # type: ignore[misc]

    def setting(self, group: dict[str, Any], name: str) -> float:
        """rho or alpha of a group; the default where the group came by the base and has none."""
        return group.setdefault(self._keys[name], self._own[name])

    def column(self, name: str, params: Shards) -> Tensor | float:
        """rho or alpha of every layer in `params`: one number if all agree, else [P]."""
        group_of = self._group_of or {
            p: n for n, group in enumerate(self.param_groups) for p in group["params"]
        }
        groups = self.base_optimizer.param_groups
        values = tuple(
            self.setting(groups[group_of[p]], name) for p in params for _ in self.pieces(p, p)
        )
        if len(set(values)) <= 1:
            return values[0] if values else 0.0
        if self._columns.get(name, ((), 0.0))[0] != values:
            column = torch.tensor(
                values, dtype=torch.float64, device=self._device or params[0].device
            )
            self._columns[name] = (values, column)
        return self._columns[name][1]

    def _split(self, params: Shards, like: Shards) -> list[Tensor]:
        """The layers inside parameters, as views of tensors laid out as these."""
        return [v for p, x in zip(params, like, strict=True) for v in self.pieces(p, x)]

    # The second gradient.

    @torch.no_grad()
    def perturb(self, *, average_: Callable[[Shards], None] | None = None) -> Tensor:
        """After the first pass: keep w and g, and put w + eps in place of w.

        Args:
            average_: given, gradients are this rank's own and so is eps; it replaces them by their
                mean over ranks, for the decomposition. A parameter that this rank has not used has
                a gradient of zero, since other ranks may have used it.

        Returns:
            0-dim bool: this rank's g is finite.
        """
        params, grads = self._active()
        if average_ is not None:
            params = [p for p in self._layers() if p.requires_grad]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        perturbation = self.perturbation(params, self._split(params, grads))
        grads = copies(grads)  # DDP may own the memory behind .grad
        self.perturb_(params, grads, perturbation)
        if average_ is not None:
            average_(grads)
        elif self._perturbed is not None:
            self._perturbed.used = params
        return perturbation.finite

    def perturbation(self, params: Shards, layer_grads: Shards) -> Perturbation:
        """How far to perturb each layer of `params`; writes nothing."""
        self._number(params)
        return self.rule.perturbation(
            self._split(params, params),
            layer_grads,
            rho=self.column("rho", params),
            reduce=self.reduce,
        )

    @torch.no_grad()
    def perturb_(self, params: Shards, grads: Shards, perturbation: Perturbation) -> None:
        """Put w + eps in place of w in some or all parameters. Keeps copies of w, and `grads`,
        which `apply_` writes to."""
        self.keep(params, grads)
        sums = perturb_(
            self._split(params, params),
            self._split(params, grads),
            perturbation,
            layers=self._numbers(params),
            visible_dtype=self.visible_dtype,
        )
        if sums is not None and self._perturbed is not None:
            self._perturbed.cosine_sums.append(sums)
        torch.clear_autocast_cache()  # or forward under a caller's autocast would see the old w

    @torch.no_grad()
    def perturb_whole_(self, params: Shards, weights: Shards, grads: Shards) -> Tensor:
        """w + eps from this rank's own gradient, where `params` are its slices of the layers.

        Args:
            weights, grads: the whole layers, one shard each; weights are written to. After `keep`.

        Returns:
            0-dim bool: this rank's g is finite. No collective.
        """
        perturbation = self.rule.perturbation(
            weights, grads, rho=self.column("rho", params), reduce=whole
        )
        sums = perturb_(weights, grads, perturbation, visible_dtype=self.visible_dtype)
        assert self._perturbed is not None
        self._perturbed.eps_cosine = None if sums is None else cosine(sums)
        torch.clear_autocast_cache()
        return perturbation.finite

    def keep(self, params: Shards, grads: Shards) -> None:
        """Keep copies of w, and `grads`, which hold g, until the end of the step."""
        if self._perturbed is None:
            self._perturbed = _Perturbed()
        self._perturbed.weights.update(zip(params, copies(params), strict=True))
        self._perturbed.grads.update(zip(params, grads, strict=True))

    @torch.no_grad()
    def restore(self, params: Shards | None = None) -> None:
        """Put these weights back, or all, bit for bit. Does nothing where they are."""
        kept = self._perturbed.weights if self._perturbed is not None else {}
        moved = [p for p in (list(kept) if params is None else params) if p in kept]
        if moved:
            torch._foreach_copy_(moved, [kept.pop(p) for p in moved])
            torch.clear_autocast_cache()

    def abandon(self) -> None:
        """After an exception: this step has never begun."""
        self.param_groups = self.base_optimizer.param_groups  # DeepSpeed may have shown one of them
        self.restore()
        self._perturbed = None

    def decide(self, params: Shards, layer_grads: Shards) -> Update:
        """After the last pass: what the base gets, in numbers; writes nothing.

        Args:
            layer_grads: shards of the last pass's gradient, one for each layer of `params`.
        """
        self._number(params)
        rule, clip, reduce = self.rule, self.clip, self.reduce
        if self._perturbed is None:
            kept = self._split(params, self._gv(params)) if rule.reuses_gv else None
            alpha = self.column("alpha", params)
            return rule.reuse_step(layer_grads, kept, alpha=alpha, clip=clip, reduce=reduce)
        sam, grads = layer_grads, self._split(params, self._perturbed.grads_of(params))
        update = rule.learn(sam, grads, clip=clip, reduce=reduce)
        if self.probe is not None:
            self.probe(step=self.steps, grads=grads, sam=sam, update=update, reduce=self.reduce)
        if self._perturbed.cosine_sums:
            self._perturbed.eps_cosine = cosine(
                self.reduce(torch.cat(self._perturbed.cosine_sums, -1))
            )
        return update

    @torch.no_grad()
    def apply_(self, params: Shards, update: Update) -> None:
        """In these parameters: restore w, give the base its gradient, let it step, keep g_v."""
        self.restore(params)
        grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        shards, layers = self._split(params, grads), self._numbers(params)
        new: list[Tensor] = []
        if self._perturbed is not None:
            new = self._perturbed.grads_of(params)  # g is not needed after this: g_v's memory
            learnt = self._split(params, new)
            update.learn_(shards, learnt, layers=layers)
            self._perturbed.gv_sums.append(dots(learnt, learnt).sum())
        elif self.rule.reuses_gv:
            update.reuse_(shards, self._split(params, self._gv(params)), layers=layers)
        if self.clip is not None:
            update.clip_(grads)
        if self._step_base(update.finite) and self.rule.reuses_gv and new:
            self._remember(params, new, update.finite)

    def finish(self, update: Update) -> Seen:
        """After `apply_` on all parameters: report the step and count it. One reduce on looks."""
        perturbed, self._perturbed = self._perturbed, None
        if perturbed is None:
            gv = update.gv_sq_norm if self.rule.reuses_gv else None
            return self._count(Seen.of(update, look=False, gv_sq_norm=gv, eps_cosine=None))
        total = sum(perturbed.gv_sums, update.size.new_zeros(()))
        gv = self.reduce(total.view(1))[0]
        cos = perturbed.eps_cosine
        return self._count(Seen.of(update, look=True, gv_sq_norm=gv, eps_cosine=cos))

    @torch.no_grad()
    def update(self) -> Seen:
        """After the last pass, whose gradients are in `.grad`: the rest of the step."""
        self.restore()
        if self._perturbed is not None:
            for p in self._perturbed.used:  # one that the last pass did not use, as below
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
        params, grads = self._active()
        if self._perturbed is not None:
            for p in params:  # one that the first pass did not use had a gradient of zero
                if p not in self._perturbed.grads:
                    self._perturbed.grads[p] = torch.zeros_like(p)
        update = self.decide(params, self._split(params, grads))
        self.apply_(params, update)
        return self.finish(update)

    def skip(self, *, look: bool = True) -> Seen:
        """Give the step up: all as before, and the next step looks if this one would have."""
        self.abandon()
        return self._count(Seen.skipped(look=look))

    def _count(self, seen: Seen) -> Seen:
        self.seen = seen
        self.steps += 1
        self.record_look(seen.finite if seen.look else None)
        return seen

    def _number(self, params: Shards) -> None:
        """Note the number that each layer has in this step's [P]."""
        self._places, at = {}, 0
        for p in params:
            count = len(self.pieces(p, p))
            self._places[p] = range(at, at + count)
            at += count

    def _numbers(self, params: Shards) -> list[int]:
        return [number for p in params for number in self._places[p]]

    def _gv(self, params: Shards) -> list[Tensor]:
        """g_v of every parameter; nothing yet is zero."""
        found = [self.state[p].get("g_v") if p in self.state else None for p in params]
        return [torch.zeros_like(p) if v is None else v for p, v in zip(params, found, strict=True)]

    def _step_base(self, finite: Tensor) -> bool:
        """The base's step on the groups shown at this moment: DeepSpeed may show one at a time."""
        base = self.base_optimizer
        groups, base.param_groups = base.param_groups, self.param_groups
        try:
            return guarded_step(base, finite)
        finally:
            base.param_groups = groups

    def _remember(self, params: Shards, new: Shards, finite: Tensor) -> None:
        """state["g_v"] = new, or what it was where the step is skipped. After the base's step:
        optimizers that fill an empty state at their first step must find it empty."""
        for p, v in zip(params, new, strict=True):
            old = self.state[p].get("g_v")
            if finite.is_cuda:
                v = torch.where(finite, v, 0.0 if old is None else old)
            self.state[p]["g_v"] = v


@dataclass
class _Perturbed:
    """What a look keeps until its end: w of the parameters that are perturbed now, and g."""

    weights: dict[Tensor, Tensor] = field(default_factory=dict)
    grads: dict[Tensor, Tensor] = field(default_factory=dict)
    used: Sequence[Tensor] = ()  # by the first pass, where that is the same on all ranks
    cosine_sums: list[Tensor] = field(default_factory=list)
    eps_cosine: Tensor | None = None
    gv_sums: list[Tensor] = field(default_factory=list)

    def grads_of(self, params: Shards) -> list[Tensor]:
        return [self.grads[p] for p in params]
