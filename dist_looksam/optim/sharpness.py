"""A base optimizer, plus which gradient it gets.

The optimizer that the user gives does the update; this one decides which gradient it gets. Both
share `param_groups` and `state`, so a scheduler on either reaches both, and the second gradient's
memory g_v is saved with the base's own state, as `state[param]["g_v"]`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..maths.ascent import Climb, cosine
from ..maths.shards import Reduce, Shards, copies, dots, each, whole
from . import groups
from .around import AroundBase
from .base import Pieces, guarded_step, in_one_piece
from .checks import check_base, check_real, check_same, check_whole, warn_of_halves
from .closure import with_cleared_gradients
from .replay import Replay
from .rule import Rule, check_alpha, check_rho
from .seen import Probe, Seen, climb_seen_


class Sharpness(AroundBase):
    """A base optimizer plus a `Rule` of which gradient it gets. Users take one of the subclasses.

    Args:
        params: the parameters, or group dictionaries, which may carry their own `rho`, `alpha`.
        base_optimizer: an instance over the same parameters.
        rule: when to look and what to keep.
        rho, alpha: defaults for groups that name none.
        model: whose buffers (BatchNorm statistics) one step leaves as one pass would.

    Attributes:
        seen: what the last step did.
        clip: limit of the norm of what the base gets; None for none.
        visible_dtype: dtype in which forward sees the weights; if set, looks report the cosine
            between applied and intended perturbation.
        module: the one that Engine trains, which must have the parameters of groups added later.
        pieces: the layers inside one flat parameter, where a backend has flattened several.

    Raises:
        ConfigError: a setting is out of range, or `params` are not those of the base.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Optimizer,
        *,
        rule: Rule,
        rho: float = 0.0,
        alpha: float = 0.0,
        model: nn.Module | None = None,
    ) -> None:
        check_rho(rho)
        check_alpha(alpha)
        self.rule = rule
        self.model = model
        self.clip: float | None = None
        self.visible_dtype: torch.dtype | None = None
        self.probe: Probe | None = None
        self.driver: Callable[[], None] | None = None
        self.module: nn.Module | None = None
        self.pieces: Pieces = in_one_piece
        self._steps = 0
        self.seen: Seen | None = None
        self._owed: Tensor | None = None
        self._columns: dict[str, tuple[tuple[float, ...], Tensor | float]] = {}
        self._lifted: _Lifted | None = None
        self._settings_before: list[dict[str, float]] = []
        check_base(base_optimizer)
        super().__init__(groups.copied(params), {})
        check_same(self, base_optimizer)
        check_real(self._layers())
        self._own = {"rho": rho, "alpha": alpha}
        self._keys = groups.keys_of(base_optimizer)
        defaults = {key: self._own[name] for name, key in self._keys.items()}
        self.defaults = {**base_optimizer.defaults, **defaults}  # some schedulers read them
        groups.place(self.param_groups, base_optimizer, defaults=self._own)
        self.base_optimizer = base_optimizer
        self._follow_base()

    def _follow_base(self) -> None:
        self._share_with_base()
        self.base_optimizer.register_load_state_dict_post_hook(self._share_with_base)
        self.base_optimizer.register_load_state_dict_pre_hook(self._take_counters)
        self.base_optimizer.register_load_state_dict_pre_hook(self._keep_settings)
        self.base_optimizer.register_state_dict_pre_hook(self._take_counters)

    # What the step works on: parameters, and the layers in them. A parameter without a gradient
    # takes no part.

    def _active(self) -> tuple[list[Tensor], list[Tensor]]:
        """(parameters, their gradients), for the parameters that have one."""
        params = [p for p in self._layers() if p.grad is not None]
        for p in params:
            if p.grad.is_sparse:  # type: ignore[union-attr]
                raise ConfigError("gradients must be dense, got a sparse one; use sparse=False.")
        return params, [p.grad for p in params]  # type: ignore[misc]

    def _split(self, params: Shards, like: Shards) -> list[Tensor]:
        """The layers inside parameters, as views of tensors laid out as these."""
        return [v for p, x in zip(params, like, strict=True) for v in self.pieces(p, x)]

    # Where the run is.

    def _take_counters(self, *_: Any) -> None:
        """Take over the counters that came in the groups, if any did, and clear them from there.

        DeepSpeed's loader of universal checkpoints fills groups, knows no other place, and tells
        nobody. So whoever reads or writes a counter comes here first, and what is written stays.
        """
        brought = [group.pop("sharpness") for group in self.param_groups if "sharpness" in group]
        if brought:
            self._count_from(brought[0])

    @property
    def steps(self) -> int:
        """Steps taken, skipped ones included; the next one is step number `steps`."""
        self._take_counters()
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._take_counters()
        self._steps = steps

    # One step, in the parts that the closure form and the engine share.

    def looks(self) -> bool:
        """True if the step about to begin computes the second gradient.

        Reads one number from the device if the last step looked, to know if it was skipped.
        """
        remembers = any("g_v" in state for state in self.state.values())
        return self.rule.looks(self.steps, remembers=remembers, owed=self.owed())

    def owed(self) -> bool:
        """True if the last step looked and was skipped. May read one number from the device."""
        self._take_counters()
        return self._owed is not None and not bool(self._owed)

    def owe(self, finite: Tensor | None) -> None:
        """Note whether the look that has just ended was finite (0-dim bool); None: no look."""
        self._take_counters()
        self._owed = finite

    @torch.no_grad()
    def climb(
        self, *, reduce: Reduce = whole, average_: Callable[[Shards], None] | None = None
    ) -> Tensor:
        """After the first pass: keep w and g, and put w + eps in place of w.

        Args:
            average_: given, gradients are this rank's own and so is eps; it replaces them by their
                mean over ranks, for the decomposition.

        Returns:
            0-dim bool: this rank's g is finite.
        """
        params, grads = self._active()
        weights, slopes = self._split(params, params), self._split(params, grads)
        climb = self.rule.climb(weights, slopes, rho=self.column("rho"), reduce=reduce)
        backup = copies(params)
        seen_cosine = self.perturb_(weights, slopes, climb, reduce)
        kept = copies(grads)  # DDP may own the memory behind .grad
        if average_ is not None:
            average_(kept)
        self.lift(params, backup, kept, seen_cosine)
        return torch.isfinite(climb.grad2.sum())

    def lift(
        self, params: Shards, backup: Shards, grads: Shards, eps_cosine: Tensor | None
    ) -> None:
        """Note that the weights are at w + eps: what `climb` does last, for backends that climb by
        themselves. `backup` is w, `grads` g; both are kept and written to."""
        self._lifted = _Lifted(list(params), list(backup), list(grads), eps_cosine)
        torch.clear_autocast_cache()  # or forward under a caller's autocast would see the old w

    def perturb_(
        self, params: Shards, grads: Shards, climb: Climb, reduce: Reduce
    ) -> Tensor | None:
        """w += eps; the cosine between what 16-bit weights show of eps and eps itself."""
        sums = climb_seen_(params, grads, climb, self.visible_dtype) if params else None
        return None if sums is None else cosine(reduce(sums))

    @torch.no_grad()
    def lower(self) -> None:
        """Put the weights back, bit for bit, as before `climb`. Does nothing if they are."""
        if self._lifted is None or self._lifted.lowered:
            return
        if self._lifted.params:
            torch._foreach_copy_(self._lifted.params, self._lifted.backup)
        self._lifted.lowered = True
        torch.clear_autocast_cache()

    @torch.no_grad()
    def descend(self, *, reduce: Reduce = whole) -> Seen:
        """After the last pass: restore w, give the base its gradient, let it step, remember g_v."""
        self.lower()
        lifted, self._lifted = self._lifted, None
        self.seen = self._after_look(lifted, reduce) if lifted else self._between(reduce)
        self.steps += 1
        self._owed = self.seen.finite if self.seen.look else None
        return self.seen

    @torch.no_grad()
    def skip(self) -> Seen:
        """The step is given up after the first pass: all as before, and the next step looks."""
        self.lower()
        self._lifted = None
        nothing = torch.tensor(torch.nan)
        self.seen = Seen(True, torch.tensor(False), nothing, nothing)
        self.steps += 1
        self._owed = self.seen.finite
        return self.seen

    def _after_look(self, lifted: "_Lifted", reduce: Reduce) -> Seen:
        pairs = [
            (p, g) for p, g in zip(lifted.params, lifted.grads, strict=True) if p.grad is not None
        ]
        params, grads = [p for p, _ in pairs], [g for _, g in pairs]
        sam: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        slopes, steeper = self._split(params, grads), self._split(params, sam)
        given = self.rule.learn(steeper, slopes, clip=self.clip, reduce=reduce)
        if self.probe is not None:
            self.probe(step=self.steps, grads=slopes, sam=steeper, share=given.size, reduce=reduce)
        new = grads  # g is not needed after this: its memory becomes g_v's
        for g, s, size in zip(slopes, steeper, each(given.size, slopes), strict=True):
            torch.addcmul(s, g, size, value=-1, out=g)
        kept2 = reduce(dots(slopes, slopes)).sum()
        if self.clip is not None:
            for s in sam:
                s.mul_(given.scale.to(s.dtype))
        stepped = guarded_step(self.base_optimizer, given.finite)
        if stepped and self.rule.keeps:
            self._remember(params, new, given.finite)
        return Seen.of(given, look=True, kept2=kept2, eps_cosine=lifted.eps_cosine)

    def _remember(self, params: Shards, new: Shards, finite: Tensor) -> None:
        """state["g_v"] = new, or what it was where the step is skipped. After the base's step:
        optimizers that fill an empty state at their first step must find it empty."""
        for p, v in zip(params, new, strict=True):
            old = self.state[p].get("g_v")
            if old is None:
                self.state[p]["g_v"] = torch.where(finite, v, 0.0)
            else:
                torch.where(finite, v, old, out=old)

    def _between(self, reduce: Reduce) -> Seen:
        params, grads = self._active()
        slopes, kept = self._split(params, grads), None
        if self.rule.keeps:
            found = [self.state[p].get("g_v") for p in params]
            whole_kept = [torch.zeros_like(p) if v is None else v for p, v in zip(params, found)]
            kept = self._split(params, whole_kept)
        given = self.rule.between(
            slopes, kept, alpha=self.column("alpha"), clip=self.clip, reduce=reduce
        )
        if kept is not None:
            for g, v, size in zip(slopes, kept, each(given.size, slopes), strict=True):
                g.addcmul_(v, size)
        if self.clip is not None:
            for g in grads:
                g.mul_(given.scale.to(g.dtype))
        guarded_step(self.base_optimizer, given.finite)
        return Seen.of(given, look=False, kept2=given.kept2 if kept else None, eps_cosine=None)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Returns the loss of the first pass.

        Args:
            closure: zeroes the gradients, computes the loss, calls backward, returns the loss.
                Called twice on looks, once otherwise; both calls draw the same random numbers
                (see `Replay`). Gradients of earlier micro-batches cannot be added up here: `Engine`
                accumulates.

        Raises:
            ConfigError: no closure, or one that added to gradients that were there before; then
                weights and state are as they were, and gradients are to be zeroed.
        """
        if self.driver is not None:  # called by DeepSpeed, for which its backend has work
            self.driver()
            return None
        if hasattr(self.base_optimizer, "skip_synchronize"):  # its hooks may still be reducing
            raise ConfigError(
                "step needs a base optimizer of its own, got hvd.DistributedOptimizer; give both "
                "to Engine, which waits for the reduced gradients of each pass."
            )
        if closure is None:
            raise ConfigError(
                f"{type(self).__name__}.step needs a closure, got none; "
                "pass a function that zeroes, computes, calls backward and returns the loss."
            )
        check_whole(self._layers())
        if self.steps == 0:
            warn_of_halves(self._layers())
        replay = Replay(self.model)
        look = self.looks()
        with torch.enable_grad():
            loss = with_cleared_gradients(closure, self._layers())
        if look:
            self.climb()
            try:
                self.zero_grad()  # for a closure that does not, and was given none to zero
                with torch.enable_grad(), replay.again():
                    closure()
            finally:
                self.lower()  # also if the closure raised: the user's weights are never left moved
        replay.undo_buffers(unless=self.descend().finite)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters. Not by the base: Horovod's takes no argument."""
        super().zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base's state with g_v in it, in torch's form, plus the counters."""
        counters = {"steps": self.steps, "owed": self.owed()}
        return {**self.base_optimizer.state_dict(), "sharpness": counters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as saved; mid-cycle too. A state without g_v looks on its next step."""
        state_dict = dict(state_dict)
        counters = state_dict.pop("sharpness", {"steps": 0, "owed": False})
        self.base_optimizer.load_state_dict(state_dict)
        self._count_from(counters)

    def _count_from(self, counters: dict[str, Any]) -> None:
        self._steps = int(counters["steps"])
        self._owed = torch.tensor(False) if counters["owed"] else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "module": None}  # a copy of the optimizer copies no network

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "base_optimizer" in state:  # a copy; torch's copy of the base has lost its hooks
            self._follow_base()


@dataclass
class _Lifted:
    """What `climb` keeps until `descend`."""

    params: list[Tensor]
    backup: list[Tensor]
    grads: list[Tensor]
    eps_cosine: Tensor | None
    lowered: bool = False
