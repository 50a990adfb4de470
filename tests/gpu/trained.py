"""Engines and loops of a ViT on images that are on the device, for speed and profile."""

import os
from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lines import ON_GPU
from torch import Tensor, nn

from dist_looksam import models
from dist_looksam.backends.compiled import compile_blocks
from dist_looksam.data import Batch
from dist_looksam.engine import Engine
from dist_looksam.optim import table
from dist_looksam.settings import assemble, config
from dist_looksam.settings.config import Settings
from dist_looksam.world import World

DEVICE = torch.device("cuda:0" if ON_GPU else "cpu")
if not ON_GPU:  # the same calls, without other threads' noise and minutes of a compiler
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
K = 5
CLASSES = 1000 if ON_GPU else 10
SHAPE = (3, 224, 224) if ON_GPU else (1, 8, 8)
HAS_FLAG = any(f.name == "compile" for f in fields(Settings))
DATA: Any = SimpleNamespace(num_classes=CLASSES, shape=SHAPE)


def name_of(model: str) -> str:
    """The model, or on a CPU a tiny one in its place."""
    return model if ON_GPU else "vit_8"


def settings_of(backend: str, optimizer: str, model: str, images: int, compiled: str) -> Settings:
    """train.py's settings; backend "zero2" is stage 2."""
    argv = ["--model", name_of(model), "--optimizer", optimizer, "--precision", "bf16"]
    argv += ["--batch_size", str(images), "--micro_batch", str(images), "--device", DEVICE.type]
    if table.method(optimizer).settable_k:
        argv += ["--k", str(K)]
    if backend.startswith("zero"):
        argv += ["--backend", "zero", "--zero_stage", backend.removeprefix("zero")]
    else:
        argv += ["--backend", backend]
    if HAS_FLAG:
        argv += ["--compile", compiled]
    return config.parse(argv).resolved(ranks=1, launcher="torchrun", samples=10**6)


def join(backend: str) -> None:
    """A process group of this rank alone, for the backends that need one."""
    if backend == "plain" or dist.is_initialized():
        return
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", str(World.from_env({}).master_port))
    dist.init_process_group("nccl" if ON_GPU else "gloo", rank=0, world_size=1)


def engine_of(backend: str, optimizer: str, model: str, images: int, compiled: str) -> Engine:
    """As train.py makes it."""
    settings = settings_of(backend, optimizer, model, images, compiled)
    if HAS_FLAG or compiled == "off":
        return assemble.engine_of(settings, DATA, DEVICE)
    net = assemble.model_of(settings, DATA)
    compile_blocks(net)
    made = settings.backend_row.make(
        settings, net, lambda inner: assemble.optimizer_of(settings, inner), DEVICE
    )
    return Engine(made, loss=assemble.loss_of(settings, DATA, DEVICE))


def batch_of(images: int) -> Batch:
    """Noise, and labels, on the device."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, *SHAPE), generator=draw, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (images,), generator=draw)
    mean = (0.5,) * SHAPE[0]
    return Batch(
        images=pixels.to(DEVICE),
        labels=labels.to(DEVICE),
        keys=torch.arange(images, device=DEVICE),
        mean=mean,
        std=mean,
    )


def bare_loop(model: str, images: int, compiled: str, batch: Batch) -> Callable[[], Any]:
    """A step of torch's AdamW without this package's engine."""
    settings = settings_of("plain", "adamw", model, images, "off")
    net: nn.Module = assemble.model_of(settings, DATA).to(DEVICE)
    if compiled != "off":
        compile_blocks(net)
    groups = table.groups(net, settings.weight_decay or 0.0)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    loss = assemble.loss_of(settings, DATA, DEVICE)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = loss(net, batch)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def flops_of(model: str) -> int:
    """Of the forward of an image."""
    with torch.device("meta"):
        net = models.create(name_of(model), num_classes=CLASSES, image_shape=SHAPE)
    return models.flops_per_image(net, SHAPE)
