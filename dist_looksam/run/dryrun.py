"""`train.py --dry_run`: what settings mean, checked without data, GPUs or other ranks.

Everything is checked that a start checks before it trains, in the same places, on a model without
memory. Nothing is written. Hours and memory are `dist-looksam plan`'s: computed, not measured.
"""

from dataclasses import dataclass
from math import ceil

import torch

from .. import models
from ..data.extent import Extent
from ..errors import ConfigError
from ..plan import Plan, machine, plan
from ..plan.machines import MFU, at_share
from ..settings import assemble
from ..settings.config import Settings
from ..world import World
from . import resume
from .advice import without_effect

GPU = "h200"
LOW, SHARE, HIGH = 0.2, MFU, 0.4  # of its peak that ViT-B may reach; an H100: 0.2 to 0.26
LEAST_RHO = {"model": 1.0, "layer": 0.005}  # that bf16 weights of a ViT-S or B show to 90 %
LARGE = 4096  # samples per step
SMALL = 1e9  # operations of one image, under which a GPU is not kept busy


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What good settings come to. `settings` are resolved.

    `plans` are by share of an H200's peak; where none can be made, `unplanned` says why.
    """

    settings: Settings
    ranks: int
    data: Extent
    model: str
    parameters: int
    flops: int  # forward, one image
    plans: dict[float, Plan]
    unplanned: str = ""

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
        rule = self.settings.rule
        return 0 if rule.ascent is None else ceil(self.steps / rule.k)

    @property
    def passes(self) -> int:
        """Forward and backward passes over a global batch, as summary.json counts them."""
        return self.steps + self.looks

    @property
    def plan(self) -> Plan | None:
        """The middle one."""
        return self.plans.get(SHARE)


def check(settings: Settings, *, ranks: int, launcher: str = "", opened: bool = True) -> Outcome:
    """Everything that can be wrong before a start.

    Args:
        ranks, launcher: as of `World`. opened: look into the image folder, where it is here.

    Raises:
        ConfigError: the first thing found, in one sentence.
    """
    assemble.check(settings.for_ranks(ranks=ranks, launcher=launcher))
    data = assemble.extent_of(settings, opened=opened)
    asked = settings
    settings = settings.resolved(ranks=ranks, launcher=launcher, samples=data.samples)
    with torch.device("meta"):
        model = models.create(
            settings.model,
            num_classes=data.classes,
            image_shape=data.shape,
            drop_path=settings.drop_path,
        )
    assemble.optimizer_of(settings, model)
    plans, unplanned = _plans(asked, data, ranks, launcher)
    return Outcome(
        settings=settings,
        ranks=ranks,
        data=data,
        model=models.resolve(settings.model, data.shape),
        parameters=sum(p.numel() for p in model.parameters()),
        flops=models.flops_per_image(model, data.shape),
        plans=plans,
        unplanned=unplanned,
    )


def _plans(
    settings: Settings, data: Extent, ranks: int, launcher: str
) -> tuple[dict[float, Plan], str]:
    """By share of the peak, on nodes of up to 8 H200; or none, and why."""
    per_node = next(n for n in range(8, 0, -1) if ranks % n == 0)
    try:
        return {
            share: plan(
                settings,
                gpus=ranks,
                machine=at_share(machine(GPU).device, share),
                gpus_per_node=per_node,
                samples=data.samples,
                classes=data.classes,
                launcher=launcher,
            )
            for share in (LOW, SHARE, HIGH)
        }, ""
    except ConfigError as error:  # what plan does not count, or an H200 does not hold
        return {}, str(error)


def notes(outcome: Outcome) -> list[str]:
    """What is allowed, but seldom meant."""
    s = outcome.settings
    found = without_effect(s)
    ascent = s.rule.ascent
    assert s.rho is not None
    if ascent and s.precision == "bf16" and s.rho < LEAST_RHO[ascent]:
        found.append(
            f"bf16 weights round much of a perturbation of rho {s.rho:g} ({ascent} scope) away; "
            f"fp16 keeps more, fp32 all"
        )
    if s.clip is None and s.batch_size >= LARGE:
        found.append(f"no clip at batch {s.batch_size:,}; 1.0 is usual for ViTs")
    if outcome.unplanned:
        found.append(f"hours and memory are not planned: {outcome.unplanned}")
    if missing := s.backend_row.lacking(s):
        found.append(f"here, {missing}")
    return found


def cost(outcome: Outcome) -> str:
    """The planned cost in one line."""
    found = outcome.plan
    if found is None:
        return "not planned"
    if outcome.flops < SMALL:
        return "no hours: a model this small waits for kernels to be launched"
    low, high = outcome.plans[HIGH].hours, outcome.plans[LOW].hours
    host = "; the host sets this time, use a larger micro_batch" if found.host_seconds else ""
    return (
        f"{outcome.ranks} H200 at {SHARE:.0%} ({LOW:.0%}-{HIGH:.0%}) of their peak: "
        f"{found.hours:.2g} h ({low:.2g}-{high:.2g}), {found.gpu_hours:.3g} GPU-hours, "
        f"{found.images_per_s:,.0f} images/s{host}"
    )


def memory(outcome: Outcome) -> str:
    """The most that a rank holds, as planned."""
    found = outcome.plan
    if found is None:
        return "not planned"
    room = found.machine.device.memory or 0
    return (
        f"{found.memory.peak / 1e9:.2g} GB of an H200's {room / 1e9:.0f} at most; "
        f"micro_batch {found.largest_micro_batch} fits"
    )


def _method(s: Settings) -> str:
    rule = s.rule
    text = f"{s.optimizer} on {s.base}"
    if rule.ascent is not None:
        text += f": rho {s.rho:g} ({rule.ascent} scope), k {rule.k}"
    if rule.reuses_gv:
        text += f", alpha {s.alpha:g}, reuse {s.reuse}"
    return text


def summary(outcome: Outcome) -> str:
    """A few lines for a reader, without a line feed at the end."""
    s, data = outcome.settings, outcome.data
    assert s.micro_batch is not None and s.warmup_steps is not None
    accumulation = s.batch_size // (s.micro_batch * outcome.ranks)
    stage = "" if s.zero_stage is None else f" stage {s.zero_stage}"
    size = "x".join(map(str, data.shape))
    falls = "stays" if s.schedule == "constant" else f"{s.schedule} to 0"
    begins, told = resume.outlook(s, data)
    rows = {
        "method": _method(s),
        "model": f"{outcome.model}, {outcome.parameters:,} parameters, "
        f"{outcome.flops / 1e9:.3g} GFLOP forward per image",
        "data": f"{data.said}: {data.samples:,} images of {size}, {data.classes:,} classes",
        "batch": f"{s.batch_size:,} = {s.micro_batch} x {outcome.ranks} ranks x {accumulation}",
        "length": f"{outcome.steps:,} steps, {outcome.epochs:.4g} epochs",
        "begins": begins,
        "lr": f"{outcome.lr:.3g} after {s.warmup_steps:,} steps of warm-up, then {falls}",
        "decay, clip": f"weight decay {s.weight_decay:g}, clip {s.clip or 'none'}",
        "passes": f"{outcome.passes:,}, {outcome.looks:,} of them for looks",
        "backend": f"{s.backend}{stage}, {s.precision}",
        "memory": memory(outcome),
        "planned": cost(outcome),
    }
    lines = [f"  {name:<12}{text}" for name, text in rows.items()]
    lines += [f"note: {note}" for note in [*told, *notes(outcome)]]
    return "\n".join(["the settings are good; nothing was trained", *lines])


def main(settings: Settings, world: World) -> None:
    """Check for settings.ranks, or else for those that were started; rank 0 tells."""
    ranks = settings.ranks or world.size
    outcome = check(settings, ranks=ranks, launcher=world.launcher)
    if world.rank == 0:
        print(summary(outcome))
