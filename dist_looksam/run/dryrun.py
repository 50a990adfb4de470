"""`train.py --dry_run`: checks settings and prints their effect, without data, GPUs or other ranks.

Makes the same checks as a start, on a model without memory. Writes nothing. Hours and memory are
the estimates of `dist-looksam plan`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import models
from ..backends import compiled
from ..data.augment import text
from ..data.blocks import Blocks, parse_shuffle
from ..data.extent import Extent
from ..data.growth import Growth
from ..data.losses import LOSSES
from ..errors import ConfigError
from ..optim.perturbed import ALL
from ..plan import Plan, machine, plan
from ..plan.machines import at_share, with_cores
from ..plan.reading import Reading, reading
from ..settings import assemble, when
from ..settings.config import DEFAULTS, Settings
from ..world import World
from . import pretrained, resume
from .advice import without_effect

GPU = "h200"
LOW, SHARE, HIGH = 0.2, 0.3, 0.4  # of the peak that ViT-B may reach; an H100: 0.2 to 0.26
LEAST_RHO = {"model": 1.0, "layer": 0.005}  # at which bf16 weights of a ViT-S or B keep 90 %
LARGE = 4096  # samples per step
SMALL = 1e9  # operations an image; with fewer a GPU waits for kernel launches


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The effect of valid settings. `settings` are resolved.

    perturbed: (layers, their parameters) that are perturbed, and (layers, parameters) trained.
    `plans` are by share of an H200's peak; where there are none, `unplanned` is the reason.
    lrs: the lowest and the highest peak of the learning rate of a layer.
    init: notes on the weights to start from.
    """

    settings: Settings
    ranks: int
    data: Extent
    model: str
    parameters: int
    perturbed: tuple[tuple[int, int], tuple[int, int]]
    flops: int  # forward, one image
    lrs: tuple[float, float]
    plans: dict[float, Plan]
    unplanned: str = ""
    init: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        assert self.settings.steps is not None
        return self.settings.steps

    @property
    def epochs(self) -> float:
        return self.steps * self.settings.batch_size / self.data.samples

    @property
    def lr(self) -> float:
        """The peak learning rate, after lr_scaling."""
        return float(assemble.base_settings(self.settings)["lr"])

    @property
    def looks(self) -> int:
        return self.settings.rule.num_looks(self.steps)

    @property
    def passes(self) -> int:
        """Forward and backward passes over a global batch, as summary.json counts them; about, if
        looks are adaptive. A look that is skipped for overflow is repeated and adds to them."""
        return self.steps + self.looks

    @property
    def reads(self) -> Reading | None:
        """What a node must read at the middle share."""
        return reading(self.plan, self.data.image_bytes) if self.plan else None

    @property
    def plan(self) -> Plan | None:
        """The plan at the middle share."""
        return self.plans.get(SHARE)


def check(
    settings: Settings,
    *,
    ranks: int,
    launcher: str = "",
    opened: bool = True,
    data: Extent | None = None,
) -> Outcome:
    """Check everything that can be wrong before a start.

    Args:
        ranks, launcher: as in `World`. opened: read the image folder and the weights of --init, if
            they are on this machine.
        data: the size of the data, where it is known already.

    Raises:
        ConfigError: the first mistake, in one sentence.
    """
    assemble.check(settings.for_ranks(ranks=ranks, launcher=launcher))
    data = data or assemble.extent_of(settings, opened=opened)
    asked = settings
    settings = settings.resolved(ranks=ranks, launcher=launcher, samples=data.samples)
    with torch.device("meta"):
        model = assemble.created(settings, data.classes, data.shape)
    if settings.checkpoint_activations:
        models.checkpoint_activations(model)
    if settings.compile != "off":
        compiled.blocks(model)
    assemble.growth_of(settings, data.shape)
    optimizer = assemble.optimizer_of(settings, model)
    lrs = [group["lr"] for group in optimizer.param_groups]
    plans, unplanned = _plans(asked, data, ranks, launcher)
    return Outcome(
        settings=settings,
        ranks=ranks,
        data=data,
        model=models.resolve(settings.model, data.shape),
        parameters=sum(p.numel() for p in model.parameters()),
        perturbed=_perturbed(optimizer.param_groups),
        flops=models.flops_per_image(model, data.shape),
        lrs=(min(lrs), max(lrs)),
        plans=plans,
        unplanned=unplanned,
        init=tuple(pretrained.outlook(settings, model, data)) if opened else (),
    )


def _perturbed(groups: list[dict[str, Any]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """See `Outcome`; `groups` are the optimizer's."""
    of_all = [p.numel() for group in groups for p in group["params"]]
    moved = [p.numel() for group in groups if group["perturb"] for p in group["params"]]
    return (len(moved), sum(moved)), (len(of_all), sum(of_all))


def _plans(
    settings: Settings, data: Extent, ranks: int, launcher: str
) -> tuple[dict[float, Plan], str]:
    """Plans by share of the peak, on nodes of up to 8 H200; or none, and the reason."""
    per_node = next(n for n in range(8, 0, -1) if ranks % n == 0)
    own = machine(GPU)
    try:
        return {
            share: plan(
                settings,
                gpus=ranks,
                machine=with_cores(replace(own, device=at_share(own.device, share))),
                gpus_per_node=per_node,
                samples=data.samples,
                classes=data.classes,
                launcher=launcher,
            )
            for share in (LOW, SHARE, HIGH)
        }, ""
    except ConfigError as error:  # not covered by plan, or too large for an H200
        return {}, str(error)


def notes(outcome: Outcome) -> list[str]:
    """Notes on settings that are allowed but seldom wanted."""
    s = outcome.settings
    lines = [*outcome.init, *without_effect(s), *_order_note(s, outcome.ranks)]
    ascent = s.rule.ascent
    assert s.rho is not None
    if ascent and s.precision == "bf16" and s.rho < LEAST_RHO[ascent]:
        lines.append(
            f"bf16 weights round much of a perturbation of rho {s.rho:g} ({ascent} scope) away; "
            f"fp16 keeps more, fp32 all"
        )
    if s.clip is None and s.batch_size >= LARGE:
        lines.append(f"no clip at batch {s.batch_size:,}; 1.0 is usual for ViTs")
    if outcome.unplanned:
        lines.append(f"hours and memory are not planned: {outcome.unplanned}")
    if missing := s.backend_row.lacking(s):
        lines.append(f"here, {missing}")
    return lines


def cost(outcome: Outcome) -> str:
    """The planned cost in one line."""
    planned = outcome.plan
    if planned is None:
        return "not planned"
    if outcome.flops < SMALL:
        return "no hours: a model this small waits for kernels to be launched"
    low, high = outcome.plans[HIGH].hours, outcome.plans[LOW].hours
    host = "; the host sets this time, use a larger micro_batch" if planned.host_seconds else ""
    return (
        f"{outcome.ranks} H200 at {SHARE:.0%} ({LOW:.0%}-{HIGH:.0%}) of their peak: "
        f"{planned.hours:.2g} h ({low:.2g}-{high:.2g}), {planned.gpu_hours:.3g} GPU-hours, "
        f"{planned.images_per_s:,.0f} images/s{host}"
    )


def memory(outcome: Outcome) -> str:
    """The planned peak memory of a rank in one line."""
    planned = outcome.plan
    if planned is None:
        return "not planned"
    room = planned.machine.device.memory or 0
    return (
        f"{planned.memory.peak / 1e9:.2g} GB of an H200's {room / 1e9:.0f} at most; "
        f"micro_batch {planned.largest_micro_batch} fits"
    )


def _method(s: Settings) -> str:
    rule = s.rule
    text = f"{s.optimizer} on {s.base}"
    if rule.ascent is not None:
        text += f": rho {s.rho:g} ({rule.ascent} scope)"
    if rule.along_momentum:
        text += ", against the momentum, one pass a step"
    elif rule.ascent is not None:
        text += f", k {rule.k}"
    if rule.reuses_gv or rule.surrogate_gap:
        text += f", alpha {s.alpha:g}"
    if rule.reuses_gv:
        text += f", reuse {s.reuse}"
    return text


def _whom(outcome: Outcome) -> str:
    (layers, parameters), (all_layers, of_all) = outcome.perturbed
    return (
        f"{outcome.settings.perturb}: {layers} of {all_layers} layers, "
        f"{parameters:,} of {of_all:,} parameters"
    )


def _trained(outcome: Outcome) -> dict[str, str]:
    """A row on frozen layers and on other learning rates; {} where there are none."""
    count, lrs = outcome.perturbed[1][1], [f"{lr:.3g}" for lr in outcome.lrs]
    parts = []
    if count < outcome.parameters:
        parts.append(f"{count:,} of {outcome.parameters:,} parameters")
    if lrs[0] != lrs[1]:
        parts.append(f"lr {lrs[0]} to {lrs[1]} by layer")
    return {"trained": "; ".join(parts)} if parts else {}


def _loss(s: Settings) -> str:
    """The training loss; "" for cross-entropy without more."""
    parts = []
    if s.bce_target_thresh is not None:
        parts.append(f"targets above {s.bce_target_thresh:g} are 1, others 0")
    if s.label_smoothing:
        parts.append(f"label smoothing {s.label_smoothing:g}")
    if s.class_weights is not None:
        parts.append(f"class weights {s.class_weights}")
    if s.loss == DEFAULTS["loss"] and not parts:
        return ""
    return ", ".join([LOSSES[s.loss], *parts])


def _order(blocks: Blocks) -> str:
    turn = f"{blocks.turn} of each in turn" if blocks.turn else "all of them permuted"
    return (
        f"blocks of {blocks.rows:,} images, {blocks.window:,} blocks in a window of "
        f"{blocks.rows * blocks.window:,}, {turn}"
    )


def _sizes(growth: Growth) -> str:
    return (
        f"{growth.num_sides}, from {growth.first} to {growth.last} pixels by {growth.patch}, each "
        f"for about {growth.steps / growth.num_sides:,.0f} steps"
    )


def _repeated(s: Settings, data: Extent) -> str:
    times = data.augment.repeat
    return (
        f"{s.batch_size // times:,} images {times} times in a batch, augmented anew; an epoch is "
        f"{data.samples:,} of them, so {times} epochs show every image {times} times"
    )


def _order_note(s: Settings, ranks: int) -> list[str]:
    """Advice where a node would read a window's blocks more often than once."""
    blocks = parse_shuffle(s.shuffle)
    assert s.micro_batch is not None
    at_once = s.micro_batch * ranks
    if blocks is None or ranks == 1 or blocks.window * blocks.turn == at_once:
        return []
    return [
        f"several nodes read the same blocks of --shuffle {s.shuffle}: with W x c = "
        f"micro_batch x ranks = {at_once:,}, each node reads its own"
    ]


def _groups(s: Settings, ranks: int) -> str:
    found = s.groups(ranks)
    if found is None:
        return "the whole batch climbs together"
    number = s.batch_size // (s.m or 1)
    if found.ranks == 1:
        how = "each rank climbs alone and sends nothing for eps"
    else:
        how = f"{found.ranks} ranks climb together, one group after the other"
    return f"{s.m:,}: {number:,} groups a look, {found.rounds} for each rank; {how}"


def summary(outcome: Outcome) -> str:
    """The printed lines, without a line feed at the end."""
    s, data = outcome.settings, outcome.data
    assert s.micro_batch is not None and s.warmup_steps is not None
    accumulation = s.batch_size // (s.micro_batch * outcome.ranks)
    stage = "" if s.zero_stage is None else f" stage {s.zero_stage}"
    size = "x".join(map(str, data.shape))
    decay = "constant" if s.schedule == "constant" else f"{s.schedule} to 0"
    begins, start_notes = resume.outlook(s, data)
    growth = assemble.growth_of(s, data.shape)
    about = "about " if s.rule.looks == "adaptive" else ""
    rows = {
        "method": _method(s),
        **({"perturbed": _whom(outcome)} if s.rule.ascent and s.perturb != ALL else {}),
        "model": f"{outcome.model}, {outcome.parameters:,} parameters, "
        f"{outcome.flops / 1e9:.3g} GFLOP forward per image",
        **_trained(outcome),
        "data": f"{data.said}: {data.samples:,} images of {size}, {data.classes:,} classes",
        **({"order": _order(blocks)} if (blocks := parse_shuffle(s.shuffle)) else {}),
        **({"sizes": _sizes(growth)} if growth else {}),
        **({"augmented": done} if (done := text(data.augment, s.mixup_until)) else {}),
        **({"repeated": _repeated(s, data)} if data.augment.repeat > 1 else {}),
        **({"loss": loss} if (loss := _loss(s)) else {}),
        "batch": f"{s.batch_size:,} = {s.micro_batch} x {outcome.ranks} ranks x {accumulation}",
        "length": f"{outcome.steps:,} steps, {outcome.epochs:.4g} epochs",
        "begins": begins,
        "lr": f"{outcome.lr:.3g} after {s.warmup_steps:,} steps of warm-up, then {decay}",
        **({"averages": f"of the weights, decay {s.ema:g} after a warm-up"} if s.ema else {}),
        "decay, clip": f"weight decay {s.weight_decay:g}, clip {s.clip or 'none'}",
        **({"m": _groups(s, outcome.ranks)} if s.m and s.rule.two_passes else {}),
        **({"rho": when.rho_text(s), "looks": when.looks_text(s)} if s.rule.ascent else {}),
        "passes": f"{about}{outcome.passes:,}, {outcome.looks:,} of them for looks",
        "backend": f"{s.backend}{stage}, {s.precision}",
        "memory": memory(outcome),
        "planned": cost(outcome),
        **({"to read": str(reads)} if (reads := outcome.reads) else {}),
    }
    lines = [f"  {name:<12}{value}" for name, value in rows.items()]
    lines += [f"note: {note}" for note in [*start_notes, *notes(outcome)]]
    return "\n".join(["the settings are good; nothing was trained", *lines])


def main(settings: Settings, world: World) -> None:
    """Check for settings.ranks, by default for the started ranks; rank 0 prints the result."""
    ranks = settings.ranks or world.size
    outcome = check(settings, ranks=ranks, launcher=world.launcher)
    if world.rank == 0:
        print(summary(outcome))
