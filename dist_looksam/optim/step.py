"""One step with one gradient or two, in parts that the closure form and all backends share.

A look, with its calls in order: first pass, `perturbation`, `perturb_`, second pass, `decide`,
`apply_`, `finish`. Any other step: pass, `decide`, `apply_`, `finish`. `perturbation` and `decide`
compute numbers per layer, with all collectives. `perturb_` and `apply_` then write to all
parameters at once, or to some at a time. `perturb` and `update` make these calls for all.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..maths.ascent import Perturbation, cosine, perturb_
from ..maths.look import Update
from ..maths.shards import Reduce, Shards, clones, dots, whole
from . import at_once
from .base import Pieces, guarded_step, in_one_piece
from .counters import StepCounters
from .groups import CHECKS
from .look import Look, add
from .rule import Rule
from .seen import Probe, Seen
from .sharded_groups import ShardedGroups


class TwoGradients(ShardedGroups, StepCounters):
    """The step of an optimizer around `base_optimizer`; both have the same groups and state.

    Attributes:
        rule: when to look, and which gradient the base gets.
        seen: statistics of the last step.
        clip: maximum norm of the gradient passed to the base; None for no clipping.
        probe: called at looks.
    """

    base_optimizer: Optimizer
    _own: dict[str, float]  # rho, alpha and perturb of groups that have none
    _keys: dict[str, str]  # under which the base's groups hold them

    def _begin(self, rule: Rule, model: nn.Module | None) -> None:
        """Attributes before the first step, without a backend."""
        self.rule, self.model, self.decider = rule, model, rule.decider()
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
        self._perturbed: Look | None = None

    @property
    def perturbed(self) -> bool:
        """True while a look is not finished."""
        return self.looking

    @property
    def looking(self) -> bool:
        """True from the first pass of a look until it is finished."""
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
        """Train on a backend, which restores running statistics itself.

        Args:
            pieces: the layers inside one parameter, where several were flattened.
            reduce: adds sums over the ranks that split a layer.
            visible_dtype: dtype in which forward sees the weights, if another; looks then report
                the cosine between applied and intended perturbation.
            driver: `step` calls this from now on.
            group_of: each parameter's group, where `param_groups` does not hold the parameters
                between steps.
            device: of the sums that `reduce` returns, where parameters are on another.
        """
        self.pieces, self.reduce, self.visible_dtype = pieces, reduce, visible_dtype
        self.driver, self._group_of, self._device, self.model = driver, group_of, device, None
        base: Any = self.base_optimizer
        if hasattr(base, "pieces"):
            base.pieces, base.reduce = pieces, reduce

    # Parameters and the layers in them. A parameter without a gradient takes no part in a step.

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
        """A setting of a group; the default if the group was added to the base without one."""
        return group.setdefault(self._keys[name], self._own[name])

    def climbs(self) -> bool:
        """Whether rho is above 0 in any group: else g_s is g, and groups of samples would only add
        them up in another order, whose rounding the reuse would enlarge."""
        groups = self.base_optimizer.param_groups
        return any(self.setting(g, "rho") * self.rho_scale > 0 for g in groups)

    def column(self, name: str, params: Shards) -> Tensor | float:
        """A setting of every layer in `params`: one number if all agree, else [P]. rho is times
        `rho_scale`, perturb is 1 or 0."""
        scale = self.rho_scale if name == "rho" else 1.0
        group_of = self._group_of or {
            p: n for n, group in enumerate(self.param_groups) for p in group["params"]
        }
        groups = self.base_optimizer.param_groups
        settings = [self.setting(group, name) for group in groups]
        for value in settings:  # a schedule, or the caller, may have changed it
            CHECKS[name](value)
        values = tuple(settings[group_of[p]] for p in params for _ in self.pieces(p, p))
        if len(set(values)) <= 1:
            return values[0] * scale if values else 0.0
        if self._columns.get(name, ((), 0.0))[0] != values:
            column = torch.tensor(
                values, dtype=torch.float64, device=self._device or params[0].device
            )
            self._columns[name] = (values, column)
        return self._columns[name][1] * scale

    def _split(self, params: Shards, like: Shards) -> list[Tensor]:
        """The layers inside parameters, as views of tensors laid out as these."""
        return [v for p, x in zip(params, like, strict=True) for v in self.pieces(p, x)]

    # The second gradient.

    @torch.no_grad()
    def perturb(self) -> Tensor:
        """After the first pass: keep copies of w and g, and replace w by w + eps.

        Returns:
            0-dim bool: g is finite.
        """
        params, grads = self._active()
        perturbation = self.perturbation(params, self._split(params, grads))
        self.perturb_(params, clones(grads), perturbation)  # DDP may own the memory behind .grad
        if self._perturbed is not None:
            self._perturbed.used = {p: p.requires_grad for p in params}
        return perturbation.finite

    def perturbation(
        self, params: Shards, layer_grads: Shards, *, reduce: Reduce | None = None
    ) -> Perturbation:
        """How far to perturb each layer of `params`; writes nothing. `reduce`: if not `bind`'s."""
        self._number(params)
        return self.rule.perturbation(
            self._split(params, params),
            layer_grads,
            rho=self.column("rho", params),
            mask=self.column("perturb", params),
            reduce=reduce or self.reduce,
        )

    @torch.no_grad()
    def perturb_(self, params: Shards, grads: Shards, perturbation: Perturbation) -> None:
        """Replace w by w + eps in some or all parameters. Keeps copies of w, and `grads` itself,
        which `apply_` writes to."""
        self.keep(params, grads)
        assert self._perturbed is not None
        self._perturb_kept_(self._perturbed, params, grads, perturbation)

    def _perturb_kept_(
        self, look: Look, params: Shards, grads: Shards, perturbation: Perturbation
    ) -> None:
        sums = perturb_(
            self._split(params, params),
            self._split(params, grads),
            perturbation,
            layers=self._numbers(params),
            visible_dtype=self.visible_dtype,
        )
        if sums is not None:
            look.cosine_sums.append(sums)
        torch.clear_autocast_cache()  # else forward under a caller's autocast would see the old w

    # Several groups, one after the other: first pass, `perturb_group`, second pass, `end_group`.

    @torch.no_grad()
    def perturb_group(
        self, *, average_: Callable[[Shards], None] | None = None, reduce: Reduce | None = None
    ) -> None:
        """After a group's first pass: add its g to the sum of g, replace w by w + eps of the group.

        Args:
            average_: replaces tensors by their mean over the ranks of the group, if `.grad` is this
                rank's own gradient.
            reduce: adds sums over the ranks that split a layer within the group, if not `bind`'s.
        """
        params = [p for p in self._layers() if p.grad is not None or p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        if average_ is not None:
            average_(grads)
        perturbation = self.perturbation(params, self._split(params, grads), reduce=reduce)
        self.perturb_group_(params, grads, perturbation)

    @torch.no_grad()
    def end_group(self, *, last: bool) -> None:
        """After a group's second pass: restore w. Unless `last`, add its gradient to a sum, which
        the last group's second pass must begin with: see `take_sum`."""
        assert self._perturbed is not None
        self._perturbed.restore(free=last)
        if not last:
            add(self._perturbed.sums, *self._active())

    def take_sum(self) -> dict[Tensor, Tensor]:
        """The sum of the gradients of second passes so far, by parameter; it is not kept here."""
        assert self._perturbed is not None
        return self._perturbed.take_sum()

    @torch.no_grad()
    def mean_of_groups(
        self, number: int, *, average_: Callable[[Shards], None] | None = None
    ) -> None:
        """After the last group: `.grad` and the kept g, which are sums, become means.

        Args:
            average_: over ranks, where the kept g is this rank's own.
        """
        assert self._perturbed is not None
        kept = list(self._perturbed.grads.values())
        for tensors in (kept, self._active()[1]):
            if tensors:
                torch._foreach_mul_(tensors, 1 / number)
        if average_ is not None:
            average_(kept)

    def keep(self, params: Shards, grads: Shards) -> None:
        """Keep copies of w, and `grads` itself, which holds g, until the end of the step."""
        look = self._perturbed = self._perturbed or Look()
        look.keep(params)
        look.grads.update(zip(params, grads, strict=True))

    @torch.no_grad()
    def restore(self, params: Shards | None = None) -> None:
        """Restore w of these parameters, or of all, bit for bit; of those that are perturbed."""
        if self._perturbed is not None:
            self._perturbed.restore(params)

    def abandon(self) -> None:
        """After an exception: weights and groups as before the step."""
        self.param_groups = self.base_optimizer.param_groups  # DeepSpeed may have shown one of them
        self.restore()
        self._perturbed = None

    def decide(self, params: Shards, layer_grads: Shards) -> Update:
        """After the last pass: the update of this step; writes nothing.

        Args:
            layer_grads: shards of the last pass's gradient, one for each layer of `params`.
        """
        self._number(params)
        rule, clip, reduce, look = self.rule, self.clip, self.reduce, self._perturbed
        alpha = self.column("alpha", params)
        if look is None:
            gv = self._split(params, self._gv(params)) if self._reuses else None
            return rule.reuse_step(layer_grads, gv, alpha=alpha, clip=clip, reduce=reduce)
        sam, grads = layer_grads, self._split(params, look.grads_of(params))
        update = rule.learn(sam, grads, alpha=alpha, clip=clip, reduce=reduce)
        if self.probe is not None:
            self.probe(step=self.steps, grads=grads, sam=sam, update=update, reduce=reduce)
        if look.cosine_sums:
            look.eps_cosine = cosine(reduce(torch.cat(look.cosine_sums, -1)))
        return update

    @torch.no_grad()
    def apply_(self, params: Shards, update: Update) -> None:
        """In these parameters: restore w, pass the gradient to the base, step it, store g_v."""
        self.restore(params)
        if at_once.apply_(self, params, update):
            return
        grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        shards, layers = self._split(params, grads), self._numbers(params)
        kept: list[Tensor] = []
        if self._perturbed is not None:
            kept = self._perturbed.grads_of(params)
        elif self._reuses:
            kept = self._gv(params)
        new = kept if update.new_kept is not None else []  # g_v is written over g
        if kept:
            update.combine_(shards, self._split(params, kept), layers=layers)
        if self._perturbed is not None:
            gv = self._split(params, new)
            self._perturbed.gv_sums.append(dots(gv, gv).sum())
        if self.clip is not None:
            update.clip_(grads)
        if self._step_base(update.finite) and self.rule.reuses_gv and new:
            self._remember(params, new, update.finite)

    def finish(self, update: Update) -> Seen:
        """After `apply_` on all parameters: report the step and count it. One reduce on looks."""
        look, self._perturbed = self._perturbed, None
        if look is None:
            gv, cos = update.gv_sq_norm if self._reuses else None, None
        else:
            total = sum(look.gv_sums, torch.zeros_like(update.scale))
            gv, cos = self.reduce(total.view(1))[0], look.eps_cosine
        return self._count(Seen.of(update, look=look is not None, gv_sq_norm=gv, eps_cosine=cos))

    @torch.no_grad()
    def update(self) -> Seen:
        """After the last pass, whose gradients are in `.grad`: the rest of the step."""
        self.restore()
        if self._perturbed is not None:
            for p, required in self._perturbed.used.items():
                if p.grad is None and p.requires_grad == required:  # not used up there: g_s is 0
                    p.grad = torch.zeros_like(p)
        params, grads = self._active()
        if self._perturbed is not None:
            for p in params:  # the first pass did not use all: their g is zero
                if p not in self._perturbed.grads:
                    self._perturbed.grads[p] = torch.zeros_like(p)
        update = self.decide(params, self._split(params, grads))
        self.apply_(params, update)
        return self.finish(update)

    def skip(self, *, look: bool = True) -> Seen:
        """Skip the step: weights and state as before; with `look` the next step looks again."""
        self.abandon()
        return self._count(Seen.skipped(look=look))

    def _count(self, seen: Seen) -> Seen:
        self.seen = seen
        self.decider.record(self.steps, seen)
        self.steps += 1
        self.record_look(seen.finite if seen.look else None)
        return seen

    def _number(self, params: Shards) -> None:
        """Store each layer's index into this step's [P]."""
        self._places, start = {}, 0
        for p in params:
            stop = start + len(self.pieces(p, p))
            self._places[p] = range(start, stop)
            start = stop

    def _numbers(self, params: Shards) -> list[int]:
        return [number for p in params for number in self._places[p]]

    @property
    def _reuses(self) -> bool:
        """True if this step reuses g_v, unless it looks."""
        return self.rule.reuses_gv and self.rule.in_window(self.steps)

    def _gv(self, params: Shards) -> list[Tensor]:
        """g_v of every parameter; zero where there is none yet."""
        old = [self.state[p].get("g_v") if p in self.state else None for p in params]
        return [torch.zeros_like(p) if v is None else v for p, v in zip(params, old, strict=True)]

    def _step_base(self, finite: Tensor) -> bool:
        """The base's step on this optimizer's groups, of which DeepSpeed may show one at a time."""
        base = self.base_optimizer
        groups, base.param_groups = base.param_groups, self.param_groups
        try:
            return guarded_step(base, finite)
        finally:
            base.param_groups = groups

    def _remember(self, params: Shards, new: Shards, finite: Tensor) -> None:
        """state["g_v"] = new, or the old one where the step is skipped. Call it after the base's
        step: optimizers that fill an empty state at their first step must find it empty."""
        for p, v in zip(params, new, strict=True):
            old = self.state[p].get("g_v")
            if finite.is_cuda:
                v = torch.where(finite, v, 0.0 if old is None else old)
            self.state[p]["g_v"] = v
