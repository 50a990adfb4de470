"""Measure this machine: passes and updates of a model on all ranks at once, and the network.

Start it as the training will be started: the same launcher, nodes, ranks per node and threads.
A single rank is faster than ranks that share cores.
"""

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import models
from ..backends.plain import PRECISION_DTYPES
from ..data.sets import data_set
from ..errors import ConfigError
from ..optim import table
from ..settings import assemble, config
from ..settings.config import Settings
from ..settings.fields import of_backends
from ..world import World
from . import machines
from .machines import Device, Machine, Network
from .network import messages

_TURNS = 7
_LONG = 0.05  # seconds of a collective whose latency can be neglected
_MOST = 2**26  # bytes of one collective
_ENDLESS = 1e30  # bytes a second


def calibrate(settings: Settings, path: Path, *, classes: int | None = None) -> int:
    """Measure with the settings' model, micro_batch, precision and base; rank 0 writes `path`.

    Returns the exit code. Raises ConfigError.
    """
    world = World.from_env(local_rank=settings.local_rank)
    size = data_set(settings.data).size(settings.image_size)
    reset: dict[str, Any] = {n: config.DEFAULTS[n] for n in ("backend", *of_backends())}
    images = settings.micro_batch or max(1, min(256, settings.batch_size // world.size))
    settings = replace(
        settings,
        micro_batch=images,
        batch_size=images * world.size,
        **reset,
    ).resolved(ranks=world.size, launcher="", samples=size.samples)
    device = assemble.device_of(settings, world)
    assemble.join(settings, world, device)
    try:
        computes = measure_device(settings, size.shape, classes or size.classes, device)
        machine = Machine(device=computes, network=measure_network(device))
        if world.rank == 0:
            machines.save(machine, path)
            print(_report(machine, path))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _report(machine: Machine, path: Path) -> str:
    device, network = machine.device, machine.network
    (precision, rate), *_ = device.flops.items()
    lines = [
        f"{device.name}: {rate / 1e9:,.1f} GFLOP/s in {precision}, {device.pass_seconds * 1e3:.2f} "
        f"ms a pass, {device.memory_bandwidth / 1e9:.2f} GB/s in updates",
        f"between nodes: {network.latency * 1e6:.0f} us, {network.bandwidth / 1e9:.3f} GB/s a node",
        f"inside a node: {network.inner_latency * 1e6:.0f} us, "
        f"{network.inner_bandwidth / 1e9:.3f} GB/s a rank",
        f"({network.source})",
        f"written: {path}",
    ]
    return "\n".join(lines)


# Computing.


def measure_device(
    settings: Settings, shape: tuple[int, int, int], classes: int, on: Any
) -> Device:
    """Time passes and updates, on all ranks at once.

    `settings` are resolved, `on` is the torch.device.
    """
    torch.manual_seed(0)
    model = models.create(settings.model, num_classes=classes, image_shape=shape).to(on)
    assert settings.base is not None and settings.micro_batch is not None
    groups = table.groups(model, 0.05)
    base = table.build_base(settings.base, groups, **assemble.base_settings(settings))
    few = max(1, settings.micro_batch // 4)
    passes = [_pass(model, settings, shape, n, on) for n in (few, settings.micro_batch)]
    short, long, update = _seconds([*passes, base.step], on)
    flops = 3 * models.flops_per_image(model, shape)
    each = (long - short) / (settings.micro_batch - few) if settings.micro_batch > few else long
    each = max(each, 0.5 * long / settings.micro_batch)  # where noise slowed the pass of few images
    count = sum(p.numel() for p in model.parameters())
    gpu = on.type == "cuda"
    return Device(
        name=torch.cuda.get_device_name(on) if gpu else "CPU",
        flops={settings.precision: flops / each},
        memory=float(torch.cuda.get_device_properties(on).total_memory) if gpu else None,
        memory_bandwidth=4 * count * table.base_row(settings.base).traffic / update,
        pass_seconds=max(0.0, long - each * settings.micro_batch),
        streams=gpu,
        source=f"measured with {models.resolve(settings.model, shape)}, micro_batch {few} and "
        f"{settings.micro_batch}, {settings.base}, {_size()} ranks at once, "
        f"{torch.get_num_threads()} threads each, torch {torch.__version__}",
    )


def _pass(
    model: nn.Module, settings: Settings, shape: tuple[int, int, int], images: int, on: Any
) -> Callable[[], None]:
    dtype = PRECISION_DTYPES[settings.precision]
    batch = torch.randn(images, *shape, device=on)
    labels = torch.zeros(images, dtype=torch.long, device=on)

    def run() -> None:
        with torch.autocast(on.type, dtype, enabled=dtype is not None):
            logits = model(batch)
        nn.functional.cross_entropy(logits.float(), labels).backward()

    return run


def _seconds(works: list[Callable[[], Any]], on: Any) -> list[float]:
    """Median seconds of each work on the slowest rank; all ranks start each work together."""
    taken: list[list[float]] = [[] for _ in works]
    for turn in range(_TURNS + 1):
        for times, work in zip(taken, works, strict=True):
            took = _timed(work, on)
            if turn:  # the first makes state and connections
                times.append(took)
    medians = torch.tensor([statistics.median(times) for times in taken], dtype=torch.float64)
    return _slowest(medians.to(on)).tolist()


def _timed(work: Callable[[], Any], on: Any) -> float:
    if dist.is_initialized():
        dist.barrier()
    began = time.perf_counter()
    work()
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.perf_counter() - began


def _slowest(numbers: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# The network.


def measure_network(on: Any) -> Network:
    """Measure inside all nodes at once, then between them, by all ranks of a node at once."""
    if _size() == 1:
        return Network(
            name="none",
            latency=0.0,
            bandwidth=_ENDLESS,
            inner_latency=0.0,
            inner_bandwidth=_ENDLESS,
            source="one rank: no network was measured, and none is counted",
        )
    hosts: list[Any] = [None] * _size()
    dist.all_gather_object(hosts, socket.gethostname())
    places = {host: [r for r, h in enumerate(hosts) if h == host] for host in dict.fromkeys(hosts)}
    sizes = sorted({len(ranks) for ranks in places.values()})
    if len(sizes) > 1:
        raise ConfigError(
            f"calibrate needs as many ranks on each node, got {sizes[0]} to {sizes[-1]}; start it "
            f"with the same number everywhere."
        )
    inner = _speed(list(places.values()), on, apart=False)
    outer = _speed([list(ranks) for ranks in zip(*places.values(), strict=True)], on, apart=True)
    parts = [f"{len(places)} nodes of {sizes[0]} ranks"]
    if outer is None:
        parts.append("between nodes as inside: there was one")
    if inner is None:
        parts.append("inside nodes as between: one rank on each")
    own, among = outer or inner, inner or outer
    assert own is not None and among is not None
    return Network(
        name="measured",
        latency=own[0],
        bandwidth=own[1] * (sizes[0] if outer else 1),
        inner_latency=among[0],
        inner_bandwidth=among[1],
        gloo=on.type != "cuda",
        source=f"all-reduces measured over {', '.join(parts)}",
    )


def _speed(groups: list[list[int]], on: Any, *, apart: bool) -> tuple[float, float] | None:
    """(seconds a message, bytes a second of a rank) of the all-reduces of all groups at once.

    apart: each rank of a group is on another node.
    """
    made = [dist.new_group(ranks) for ranks in groups]
    size = max(map(len, groups))
    if size == 1:
        return None
    own = next(g for g, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)
    short = _all_reduce(own, 64, on)
    count = 2**16
    long = _all_reduce(own, count, on)
    while long < _LONG and count < _MOST:
        count *= 2
        long = _all_reduce(own, count, on)
    moved = 2 * count * (size - 1) / size
    waits = messages("all_reduce", size, gloo=on.type != "cuda", apart=apart)
    return short / waits, moved / max(long - short, 1e-9)


def _all_reduce(group: Any, count: int, on: Any) -> float:
    """Median seconds of an all-reduce of `count` bytes, on the slowest rank."""
    numbers = torch.ones(count // 4, device=on)

    def send() -> None:
        dist.all_reduce(numbers, group=group)

    return _seconds([send], on)[0]
