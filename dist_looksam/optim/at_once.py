"""LAMB's or AdamW's step on all layers by a few kernels, which also compute the base's gradient.

Elsewhere the gradient is written first, by `Update.combine_` and `clip_`, and the base's own step
follows. The formulas, states and results are the same, but for rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from .. import kernels
from ..maths.look import Update
from ..maths.shards import Shards


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Of which the base's gradient is made, with an entry per layer: see `Update`.

    xs       gradient of the last pass.
    ys       g on a look, g_v in other steps; empty if it is not used.
    gvs      where a look stores g_v; empty if nowhere.
    numbers  each layer's number in the columns of `update`.
    update   None: the gradient is xs.
    clips    it is multiplied by the scale of `update`.
    finite   0-dim bool on the device: where false, nothing changes; None: known to be true.
    """

    xs: Shards
    ys: Shards = ()
    gvs: Shards = ()
    numbers: Sequence[int] = ()
    update: Update | None = None
    clips: bool = False
    finite: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class States:
    """Of a base: m and v of every parameter, and its steps, 0-dim."""

    ms: Shards
    vs: Shards
    steps: Shards


Split = Callable[[Shards, Shards], list[Tensor]]  # layers of parameters, in tensors laid out alike


def work_of(
    base: Any, params: Shards, parts: Parts, *, groups: Sequence[dict[str, Any]], split: Split
) -> Callable[[], Tensor | None] | None:
    """The base's step on these parameters, if kernels can make it, else None.

    Args:
        groups: with the base's settings; every parameter is in one.

    Returns:
        A function that makes the step, and returns [layers] local ||g_v||^2 if it computes g_v.
    """
    usable = params and kernels.usable(params[0].device)
    states = _states_of(base, params) if usable else None
    made = None if states is None else _job(params, states, parts, groups, split)
    if made is None:
        return None
    kernel, job = made
    if type(base) is AdamW:
        return partial(kernel.adamw_, job)
    return partial(kernel.lamb_, job, reduce=base.reduce)


def apply_(optimizer: Any, params: Shards, update: Update) -> bool:
    """What `TwoGradients.apply_` does after it has restored w; False if no kernels can do it."""
    base, look, on_device = optimizer.base_optimizer, optimizer._perturbed, update.finite.is_cuda
    if not (params and kernels.usable(params[0].device) and _is_itself(base)):
        return False
    if not (on_device or bool(update.finite)):
        return False
    kept: list[Tensor] = []
    if update.kept is not None or update.new_kept is not None:
        kept = optimizer._gv(params) if look is None else look.grads_of(params)
    stores = update.new_kept is not None and optimizer.rule.reuses_gv
    new = optimizer._gv(params) if stores else []
    split = optimizer._split
    parts = Parts(
        xs=split(params, [p.grad for p in params]),
        ys=split(params, kept) if kept else [],
        gvs=split(params, new) if new else [],
        numbers=optimizer._numbers(params),
        update=update,
        clips=optimizer.clip is not None,
        finite=update.finite if on_device else None,
    )
    work = work_of(base, params, parts, groups=optimizer.param_groups, split=split)
    if work is None:
        return False
    base._opt_called = True  # for schedulers, which see no call of base.step
    gv_sums = Optimizer.profile_hook_step(lambda _: work())(base)
    if look is not None and gv_sums is not None:
        look.gv_sums.append(gv_sums.sum())
    for p, gv in zip(params, new, strict=False):
        optimizer.state[p]["g_v"] = gv
    return True


def _is_itself(base: Optimizer) -> bool:
    """Whether `base.step` is that of its class and nothing is to run before it."""
    own = base.__dict__.get("step")
    before = base._optimizer_step_pre_hooks or torch_optimizer._global_optimizer_pre_hooks
    return not before and (own is None or hasattr(own, "_wrapped_by_lr_sched"))


def _states_of(base: Any, params: Shards) -> States | None:
    """None for any base but LAMB and torch's fused AdamW, after its first step."""
    if type(base) is not AdamW:
        states: States | None = base.states(params) if hasattr(base, "states") else None
        return states
    rows = [base.state.get(p) or {} for p in params]
    if not all(map(_is_usual, base.param_groups)) or not all("exp_avg_sq" in row for row in rows):
        return None
    ms, vs = [row["exp_avg"] for row in rows], [row["exp_avg_sq"] for row in rows]
    return States(ms=ms, vs=vs, steps=[row["step"] for row in rows])


def _is_usual(group: dict[str, Any]) -> bool:
    numbers = all(isinstance(b, float | int) for b in group["betas"])
    return bool(group["fused"]) and numbers and not (group["amsgrad"] or group["maximize"])


def _job(
    params: Shards, states: States, parts: Parts, groups: Sequence[dict[str, Any]], split: Split
) -> tuple[Any, Any] | None:
    """(`kernels.launch`, its Job); None if the tensors do not fit."""
    ws, ms, vs = split(params, params), split(params, states.ms), split(params, states.vs)
    kernel = kernels.fit(ws, parts.xs, parts.ys, parts.gvs, ms, vs)
    steps_on = {(t.dtype, t.device) for t in states.steps}
    if kernel is None or len(steps_on) > 1 or states.steps[0].device != ws[0].device:
        return None
    group_of = {p: n for n, group in enumerate(groups) for p in group["params"]}
    owners = [n for n, p in enumerate(params) for _ in split([p], [p])]
    update = parts.update
    return kernel, kernel.Job(
        ws=ws, xs=parts.xs, ys=parts.ys, gvs=parts.gvs, ms=ms, vs=vs, steps=states.steps,
        owners=owners,
        places=parts.numbers or range(len(ws)),
        groups=[group_of[params[n]] for n in owners],
        settings=[(g["lr"], *g["betas"], g["eps"], g["weight_decay"]) for g in groups],
        last=update.last if update else None,
        kept=update.kept if update else None,
        new_kept=update.new_kept if update else None,
        scale=update.scale if update and parts.clips else None,
        finite=parts.finite,
    )  # fmt: skip
