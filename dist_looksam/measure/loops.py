"""The training loops that `dist-looksam bench` compares: ours, bare ones and other libraries'."""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from ..backends.compiled import compile_blocks
from ..backends.plain import PRECISION_DTYPES
from ..engine import Engine
from ..errors import ConfigError
from ..maths.together import groups
from ..optim import table
from ..settings.assemble import optimizer_of
from ..settings.config import Settings
from ..world import World

_CLASSES = 10


@dataclass(frozen=True)
class Peer:
    """A class of another library, and the base that it is compared with."""

    module: str
    kind: str
    base: str
    on_cpu: bool = True

    @property
    def library(self) -> str:
        return self.module.split(".")[0]

    def why_not(self, device: str) -> str | None:
        """What keeps it from this device, as words after its name; None: nothing.

        Classes for GPUs are tried: they compile when first made, for which a machine may lack nvcc.
        """
        if importlib.util.find_spec(self.library) is None:
            return f"needs {self.library}, which is not installed"
        if not self.on_cpu and not device.startswith("cuda"):
            return f"needs a GPU, got device {device}"
        try:
            made = self.load()
            if not self.on_cpu:
                made([nn.Parameter(torch.zeros(1, device=device))])
        except Exception as error:  # of any kind, from compilers, too
            told = (str(error).splitlines() or [""])[0]
            return f"needs {self.library}, which fails here ({type(error).__name__}: {told})"
        return None

    def load(self) -> Any:
        """The class."""
        return getattr(importlib.import_module(self.module), self.kind)


PEERS = {
    "pytorch_optimizer.Lamb": Peer("pytorch_optimizer", "Lamb", "lamb"),
    "pytorch_optimizer.SAM": Peer("pytorch_optimizer", "SAM", "adamw"),
    "pytorch_optimizer.LookSAM": Peer("pytorch_optimizer", "LookSAM", "adamw"),
    "timm.Lamb": Peer("timm.optim", "Lamb", "lamb"),
    "timm.AdamW": Peer("timm.optim", "AdamWLegacy", "adamw"),
    "deepspeed.FusedLamb": Peer("deepspeed.ops.lamb", "FusedLamb", "lamb", on_cpu=False),
    "deepspeed.FusedAdam": Peer("deepspeed.ops.adam", "FusedAdam", "adamw", on_cpu=False),
}
Pairs = list[tuple[Tensor, Tensor]]


class Counted:
    """The loss of one micro-batch, which counts backward calls: in micro-batches, of which a look
    with a small m takes parts.

    Args:
        micro_batch: samples of a whole one; None where none is split.
    """

    def __init__(self, micro_batch: int | None = None) -> None:
        self.backwards, self.micro_batch = 0.0, micro_batch

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        share = len(batch[0]) / (self.micro_batch or len(batch[0]))

        def count(_: Tensor) -> None:
            self.backwards += share

        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.register_hook(count)
        return loss


@dataclass(frozen=True, kw_only=True)
class CycleTime:
    """Seconds a step over one cycle: on the clock, of processor time, and until the host had asked
    for all of it, which on a GPU is sooner than the end."""

    seconds: float
    cpu_seconds: float
    host_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A training loop on fixed micro-batches."""

    name: str
    base: str
    step: Callable[[], Any]
    counted: Counted

    def cycle(self, steps: int, device: torch.device) -> CycleTime:
        """Seconds a step, over `steps` steps."""
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        host = time.perf_counter() - began
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cpu, seconds = time.process_time() - cpu_began, time.perf_counter() - began
        return CycleTime(
            seconds=seconds / steps, cpu_seconds=cpu / steps, host_seconds=host / steps
        )


class Problem:
    """Makes loops with the same initial weights and the same micro-batches.

    Args:
        batch_size: of all ranks.
        backend: a rank's settings of train.py for a method, resolved, with the backend to run it
            on; bases then run in the engine, too. None: one rank, and bases in a bare loop.
    """

    def __init__(
        self,
        *,
        model: str,
        batch_size: int,
        micro_batch: int,
        k: int,
        precision: str,
        device: str,
        compiled: str = "off",
        m: int | None = None,
        backend: Callable[[str], Settings] | None = None,
        world: World | None = None,
    ) -> None:
        world = world or World()
        once = micro_batch * world.size
        if micro_batch < 1 or batch_size < 1 or batch_size % once:
            raise ConfigError(
                f"batch_size must be micro_batch {micro_batch} x ranks {world.size} x a whole "
                f"number, got {batch_size}."
            )
        self.model, self.k, self.precision, self.m = model, k, precision, m
        self.backend, self.ranks = backend, world.size
        if backend is None:
            groups(m, micro_batch=micro_batch, accumulation=batch_size // once, ranks=1)
        self.device, self.compiled = torch.device(device), compiled
        side = models.gray_side(model)
        self.shape = (3, 224, 224) if side is None else (1, side, side)
        _check_room(batch_size // world.size, self.shape, self.device)
        torch.manual_seed(world.rank)
        self.batches: Pairs = []
        for _ in range(batch_size // once):
            images = torch.randn(micro_batch, *self.shape, device=self.device)
            labels = torch.randint(_CLASSES, (micro_batch,), device=self.device)
            self.batches.append((images, labels))

    def _network(self) -> nn.Module:
        torch.manual_seed(0)
        model = models.create(self.model, num_classes=_CLASSES, image_shape=self.shape)
        if self.compiled != "off":
            compile_blocks(model)
        return model

    def _new(self, base: str, **how: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = self._network().to(self.device)
        row = table.base_row(base)
        groups = table.groups(model, row.weight_decay)
        return model, table.build_base(base, groups, lr=row.lr, **how)

    def _pass(self, model: nn.Module, loss: Counted) -> Tensor:
        """Forward and backward of all micro-batches, for loops without the engine."""
        dtype = PRECISION_DTYPES[self.precision]
        total = torch.zeros((), device=self.device)
        for batch in self.batches:
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                value = loss(model, batch)
            (value / len(self.batches)).backward()
            total += value.detach()
        return total / len(self.batches)

    def flops(self) -> float:
        """Operations of a forward and backward of all micro-batches."""
        with torch.device("meta"):
            net = models.create(self.model, num_classes=_CLASSES, image_shape=self.shape)
        images = sum(len(labels) for _, labels in self.batches)
        return 3.0 * images * models.flops_per_image(net, self.shape)

    def bare(self, base: str) -> Loop:
        """The base optimizer without the engine; on a backend of several ranks in it."""
        if self.backend is not None:
            return self.ours(base)
        model, optimizer = self._new(base)
        return self._plain_loop(base, base, model, optimizer)

    def _plain_loop(self, name: str, base: str, model: nn.Module, optimizer: Any) -> Loop:
        loss = Counted()

        def step() -> None:
            optimizer.zero_grad()
            self._pass(model, loss)
            optimizer.step()

        return Loop(name=name, base=base, step=step, counted=loss)

    def ours(self, name: str) -> Loop:
        """A method of the table, in the engine."""
        base = table.base_of(name, None)
        loss = Counted(len(self.batches[0][0]))
        if self.backend is not None:
            engine = self._on_backend(self.backend(name), loss)
        else:
            model, inner = self._new(base)
            rule = table.rule_of(name, k=self.k)
            row = table.method(name)
            optimizer = table.build(inner, rule=rule, rho=row.default_rho, alpha=row.default_alpha)
            m = self.m if rule.two_passes else None
            engine = Engine(model, optimizer, loss, precision=self.precision, m=m)
        return Loop(name=name, base=base, step=lambda: engine.step(self.batches), counted=loss)

    def _on_backend(self, settings: Settings, loss: Counted) -> Engine:
        made = settings.backend_row.make(
            settings, self._network(), lambda net: optimizer_of(settings, net), self.device
        )
        return Engine(made, loss=loss, m=settings.m if settings.rule.two_passes else None)

    def peer(self, name: str) -> Loop:
        """An optimizer of another library, used as its documentation shows. ConfigError where it
        cannot be had."""
        peer = PEERS[name]
        if reason := peer.why_not(self.device.type):
            raise ConfigError(f"{name} {reason}; leave it out.")
        make = peer.load()
        kind, base = peer.kind, peer.base
        model, _ = self._new(base)
        row = table.base_row(base)
        groups = table.groups(model, row.weight_decay)
        if "SAM" not in kind:
            return self._plain_loop(name, base, model, make(groups, lr=row.lr))
        settings: dict[str, Any] = {"lr": row.lr, "fused": True}
        if kind == "LookSAM":
            settings |= {"k": self.k, "alpha": 0.7}
        optimizer = make(groups, torch.optim.AdamW, rho=table.RHO["model"], **settings)
        loss = Counted()

        def closure() -> Tensor:
            optimizer.zero_grad()
            return self._pass(model, loss)

        def step() -> None:
            closure()
            optimizer.step(closure)

        return Loop(name=name, base=base, step=step, counted=loss)


def _check_room(images: int, shape: tuple[int, int, int], device: torch.device) -> None:
    """ConfigError if the images alone do not fit into memory."""
    needed = 4 * images * shape[0] * shape[1] * shape[2]
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[1]
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > room:
        raise ConfigError(
            f"batch_size must fit into {room / 1e9:,.0f} GB of memory, got {images:,} images of "
            f"{needed / 1e9:,.0f} GB; use a smaller one."
        )
