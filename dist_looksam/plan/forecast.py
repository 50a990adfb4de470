"""A plan: memory, communication and time of a run, estimated before it is started."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .. import models
from ..data.sets import data_set
from ..data.subset import left
from ..errors import ConfigError
from ..maths.together import possible
from ..settings import assemble
from ..settings.config import Settings
from . import machines
from .machines import Device, Machine, Network
from .memory import Memory, memory
from .network import Call, Topology, wire_bytes
from .run import PlannedRun, check
from .sent import sent
from .times import Time, host_time, pass_time, step_time
from .workload import workload

MOST_GPUS = 8192
_ROOM = 0.92  # usable share of a GPU's memory; CUDA and fragmentation take the rest


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory, communication and time of a run on each rank, in bytes, seconds and images.

    micro_batch          that of the settings, or the largest of train.py's default that fits.
    largest_micro_batch  that fits; None if memory is not known. 0 if none does.
    wire                 bytes that one rank sends in a step: "base" of the base optimizer alone,
                         "reuse" and "look" where there are such steps, "mean" over the run.
    times                the same keys: a `Time` each; where images grow, the mean over their sizes,
                         while memory is that of the last size.
    host_seconds         time of the host to launch the kernels of one pass, where that is longer
                         than they run; else 0.
    hours                of training, without evaluations, checkpoints and waiting for images.
    """

    settings: Settings
    machine: Machine
    gpus: int
    gpus_per_node: int
    model: str
    parameters: int
    steps: int
    micro_batch: int
    largest_micro_batch: int | None
    accumulation: int
    memory: Memory
    wire: dict[str, float]
    times: dict[str, Time]
    host_seconds: float
    images_per_s: float
    hours: float

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus

    @property
    def step_seconds(self) -> float:
        """Averaged over the run."""
        return self.times["mean"].total


def plan(
    settings: Settings,
    *,
    gpus: int,
    machine: str | Device | Machine = "h200",
    network: str | Network = "infiniband-400",
    gpus_per_node: int = 8,
    samples: int | None = None,
    classes: int | None = None,
    launcher: str = "torchrun",
) -> Plan:
    """Plan a run of train.py with these settings.

    Args:
        settings: as `config.parse` or `Settings(...)` makes them; not resolved.
        gpus: number of ranks, at most 8,192. gpus_per_node: how many of them share a node.
        machine: a Machine, or a Device or its name, to which `network` is added.
        samples, classes: of the training data; default by settings.data, ImageNet-1k for folder.
        launcher: as in `World`; "deepspeed" makes --backend auto ZeRO.

    Raises:
        ConfigError: the settings cannot run so, with the nearest that can.
    """
    if not isinstance(machine, Machine):
        machine = machines.machine(machine, network)
    _check_numbers(gpus, gpus_per_node)
    size = data_set(settings.data).size(settings.image_size)
    samples = samples or left(size.samples, settings.holdout, settings.train_images)
    resolved = settings.resolved(ranks=gpus, launcher=launcher, samples=samples)
    check(resolved)
    kind = (models.resolve(resolved.model, size.shape), classes or size.classes)
    rules = (resolved.perturb, resolved.freeze)
    work = workload(*kind, size.shape, *rules)
    assert resolved.micro_batch is not None and resolved.steps is not None
    ranks = Topology(total=gpus, per_node=gpus_per_node)
    run = PlannedRun(settings=resolved, work=work, ranks=ranks, micro_batch=resolved.micro_batch)
    largest = largest_micro_batch(run, machine.device.memory)
    run = _fitted(run, largest, machine.device, asked=settings.micro_batch is not None)
    growth = assemble.growth_of(resolved, size.shape)
    shapes = growth.shapes(size.shape) if growth else [size.shape]
    sizes = [replace(run, work=workload(*kind, shape, *rules)) for shape in shapes]
    return _plan(run, sizes, machine, largest)


def _check_numbers(gpus: int, per_node: int) -> None:
    if not 1 <= gpus <= MOST_GPUS:
        raise ConfigError(f"gpus must be in [1, {MOST_GPUS:,}], got {gpus:,}.")
    if per_node < 1:
        raise ConfigError(f"gpus_per_node must be >= 1, got {per_node}.")
    if gpus > per_node and gpus % per_node:
        near = [n for n in (gpus // per_node * per_node, -(-gpus // per_node) * per_node) if n]
        raise ConfigError(
            f"gpus must fill whole nodes of {per_node}, got {gpus}; "
            f"use {' or '.join(map(str, near))}, or another --gpus_per_node."
        )


def largest_micro_batch(run: PlannedRun, room: float | None) -> int | None:
    """The largest that fits and divides a rank's share of the batch; 0 if even 1 does not fit."""
    if room is None:
        return None
    share = run.settings.batch_size // run.ranks.total
    m = run.settings.m if run.row.ascent else None
    for n in _divisors(share):
        if m is not None and not _makes_up(run, n, m):
            continue
        if memory(run.at(n)).peak <= _ROOM * room:
            return n
    return 0


def _makes_up(run: PlannedRun, micro_batch: int, m: int) -> bool:
    ranks = run.ranks.total
    count = {"accumulation": run.settings.batch_size // (ranks * micro_batch), "ranks": ranks}
    climbing = run.settings.backend_row.climbing_ranks(run.settings, ranks)
    return m in possible(micro_batch=micro_batch, **count, climbing=climbing)


def _divisors(n: int) -> Sequence[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)}, reverse=True)


def _fitted(run: PlannedRun, largest: int | None, device: Device, *, asked: bool) -> PlannedRun:
    """The run at a micro-batch that fits. ConfigError names one where the user's does not."""
    if largest is None or run.micro_batch <= largest:
        return run
    need, room = memory(run).peak / 1e9, (device.memory or 0) / 1e9
    if largest == 0:
        need = memory(run.at(1)).peak / 1e9
        raise ConfigError(
            f"memory must hold micro_batch 1, which needs {need:.1f} GB of {device.name}'s "
            f"{room:.0f} GB (8 % stay free); use a higher --zero_stage, more --gpus or "
            f"--precision bf16."
        )
    if asked:
        raise ConfigError(
            f"micro_batch must fit {device.name}'s {room:.0f} GB (8 % stay free), got "
            f"{run.micro_batch}, which needs {need:.1f} GB; use --micro_batch {largest}."
        )
    return run.at(largest)


def _plan(
    run: PlannedRun, sizes: Sequence[PlannedRun], machine: Machine, largest: int | None
) -> Plan:
    """sizes: the run at each size of its images, all of which have the same number of steps."""
    s = run.settings
    kinds = list(dict.fromkeys(["base", *run.shares]))
    wire = {k: _bytes(sent(run, look=k == "look").calls(), run, machine) for k in kinds}
    times = {
        k: Time.mixed([(1 / len(sizes), step_time(each, machine, kind=k)) for each in sizes])
        for k in kinds
    }
    wire["mean"] = sum(share * wire[kind] for kind, share in run.shares.items())
    times["mean"] = Time.mixed([(share, times[kind]) for kind, share in run.shares.items()])
    host = host_time(run, machine.device)
    assert s.steps is not None
    return Plan(
        settings=s,
        machine=machine,
        gpus=run.ranks.total,
        gpus_per_node=run.ranks.per_node,
        model=run.work.name,
        parameters=run.work.parameters + run.work.frozen,
        steps=s.steps,
        micro_batch=run.micro_batch,
        largest_micro_batch=largest,
        accumulation=run.accumulation,
        memory=memory(run),
        wire=wire,
        times=times,
        host_seconds=host if host > pass_time(run, machine.device) else 0.0,
        images_per_s=s.batch_size / times["mean"].total,
        hours=s.steps * times["mean"].total / 3600,
    )


def _bytes(calls: Sequence[Call], run: PlannedRun, machine: Machine) -> float:
    gloo = machine.network.gloo
    return sum(wire_bytes(call, run.ranks.total, gloo=gloo) for call in calls)


def to_dict(planned: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    made = asdict(planned)
    made["memory"] = planned.memory.to_dict()
    made["times"] = {k: t.to_dict() for k, t in planned.times.items()}
    return {**made, "gpu_hours": planned.gpu_hours, "step_seconds": planned.step_seconds}
