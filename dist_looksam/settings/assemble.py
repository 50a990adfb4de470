"""From settings to what trains: device, process group, model, optimizer, engine."""

import importlib
import importlib.util
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import models
from ..backends.backend import Backend
from ..backends.ddp import DDP
from ..backends.plain import Plain
from ..backends.zero import config as zero_config
from ..data import Batch, Data, cross_entropy
from ..engine import Engine
from ..errors import ConfigError
from ..maths.schedule import scaled_lr
from ..optim import table
from ..optim.sharpness import Sharpness
from ..record import trackers
from ..world import World
from ..world.roster import Roster
from .config import Settings


def check(settings: Settings, ranks: int) -> None:
    """ConfigError for what the backend cannot do, or lacks here, before anything starts."""
    trackers.check(settings.track)
    if missing := lacking(settings):
        raise ConfigError(missing)
    allowed(settings, ranks)


def lacking(settings: Settings) -> str | None:
    """The sentence that names a library which the backend needs and this machine has not got."""
    library, how = {
        "zero": ("deepspeed", "pip install 'deepspeed>=0.19,<0.20'"),
        "horovod": ("horovod", "bash cluster/horovod/build.sh"),
    }.get(settings.backend, ("", ""))
    if settings.backend == "fsdp2":
        return _lacking_torch(settings)
    if not library or importlib.util.find_spec(library) is not None:
        return None
    return (
        f"backend {settings.backend} needs {library}, which is not installed; "
        f"install it ({how}) or use --backend ddp."
    )


def _lacking_torch(settings: Settings) -> str | None:
    """fully_shard came with torch 2.6; gloo, which CPUs talk by, learnt to average in 2.8."""
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    needed, where = ((2, 8), " on CPUs") if on_cpu else ((2, 6), "")
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) >= needed:
        return None
    return (
        f"backend fsdp2 needs torch >= {needed[0]}.{needed[1]}{where}, got {torch.__version__}; "
        f"install a newer one or use --backend ddp."
    )


def allowed(settings: Settings, ranks: int) -> None:
    """ConfigError for settings that the backend cannot train with, on any machine."""
    if settings.backend == "fsdp2" and settings.ascent == "rank":
        raise ConfigError(
            "ascent rank needs whole gradients on every rank, got backend fsdp2; "
            "use --backend ddp, or --ascent global."
        )
    if settings.backend == "horovod" and (settings.zero_stage in (2, 3) or settings.offload):
        got = "offload" if settings.offload else f"zero_stage {settings.zero_stage}"
        raise ConfigError(
            f"backend horovod shards at zero_stage 1 only, without offload, got {got}; "
            f"use --zero_stage 1 or --backend zero."
        )
    if settings.backend != "horovod" and settings.compression != "none":
        raise ConfigError(
            f"compression {settings.compression} is of backend horovod, got backend "
            f"{settings.backend}; leave it out or use --backend horovod."
        )
    if settings.backend == "zero":
        deepspeed_config(settings, ranks)
        if settings.ascent == "rank" and (settings.zero_stage in (2, 3) or settings.offload):
            raise ConfigError(
                f"ascent rank needs whole gradients on every rank, got ZeRO stage "
                f"{settings.zero_stage}{' with offload' if settings.offload else ''}; "
                f"use --zero_stage 1 without offload, or --ascent global."
            )


def _load_horovod() -> None:
    """ConfigError if Horovod cannot be loaded, which is so after torch was changed."""
    try:
        importlib.import_module("horovod.torch")
    except ImportError as error:
        raise ConfigError(
            f"Horovod must be built for torch {torch.__version__}, got one that does not load "
            f"({str(error).splitlines()[0]}); build it again: bash cluster/horovod/build.sh."
        ) from error


def elastic(settings: Settings) -> bool:
    """True if workers may come and go: horovodrun was given a range of numbers of them.

    ConfigError if Horovod cannot be loaded then.
    """
    asked = settings.backend in ("auto", "horovod") and os.environ.get("HOROVOD_ELASTIC") == "1"
    if asked:
        _load_horovod()
    return asked


def device_of(settings: Settings, world: World) -> torch.device:
    """The device of this rank; sets the current CUDA device."""
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ConfigError("device cuda was asked for, got no CUDA device; use --device cpu.")
    if settings.device == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = world.local_rank if count > 1 else 0  # launchers may show each rank one device
    if count > 1 and world.local_size > count:  # on all ranks of the node, so that one of them says
        raise ConfigError(
            f"ranks per node must be <= its {count} CUDA devices, got {world.local_size}; "
            f"start fewer ranks per node."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def join(settings: Settings, world: World, device: torch.device) -> Roster | None:
    """Meet the other ranks and make the process group; None where the backend needs neither."""
    if settings.backend == "horovod":
        _load_horovod()
        from ..backends.horovod import whole as horovod

        horovod.start(world.size)
        return None
    if settings.backend == "plain" or dist.is_initialized():
        return None
    roster = Roster(world, timeout=settings.timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", roster.store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=settings.timeout),
    )
    return roster


def loss_of(settings: Settings, device: torch.device) -> Any:
    """loss(model, batch): mean cross-entropy of one micro-batch."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        batch = batch.to(device)
        logits = models.call(model, batch.images, batch.keys)
        return cross_entropy(logits, batch, settings.label_smoothing)

    return loss


def model_of(settings: Settings, data: Data) -> nn.Module:
    """The network, the same on every rank."""
    torch.manual_seed(settings.seed)
    return models.create(
        settings.model,
        num_classes=data.num_classes,
        image_shape=data.shape,
        drop_path=settings.drop_path,
    )


def base_settings(settings: Settings) -> dict[str, Any]:
    """What `table.build_base` needs besides parameters."""
    assert settings.lr is not None and settings.eps is not None
    lr = scaled_lr(
        settings.lr,
        batch_size=settings.batch_size,
        base_batch=settings.lr_base_batch,
        scaling=settings.lr_scaling,
    )
    return {
        "lr": lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "momentum": settings.momentum,
    }


def optimizer_of(settings: Settings, model: nn.Module) -> Sharpness:
    """The optimizer of the table around its base, over the model's parameters."""
    assert settings.base is not None and settings.rho is not None
    assert settings.weight_decay is not None
    groups = table.groups(model, settings.weight_decay)
    base = table.build_base(settings.base, groups, **base_settings(settings))
    return table.build(base, rule=settings.rule, rho=settings.rho, alpha=settings.alpha)


def engine_of(settings: Settings, data: Data, device: torch.device) -> Engine:
    """Everything put together on the chosen backend. `settings` are resolved."""
    return Engine(
        _backend(settings, model_of(settings, data), device),
        loss=loss_of(settings, device),
        clip=settings.clip,
        ascent=settings.ascent,
    )


def _backend(settings: Settings, model: nn.Module, device: torch.device) -> Backend:
    if settings.backend in ("plain", "ddp"):
        model.to(device)
        kind = DDP if settings.backend == "ddp" else Plain
        return kind(model, optimizer_of(settings, model), precision=settings.precision)
    if settings.backend == "zero":
        return _zero(settings, model, device)
    if settings.backend == "horovod":
        return _horovod(settings, model.to(device))
    return _fsdp2(settings, model, device)


def _fsdp2(settings: Settings, model: nn.Module, device: torch.device) -> Backend:
    from ..backends import fsdp2, fsdp2_units

    fsdp2_units.shard(model, device, precision=settings.precision)
    return fsdp2.FSDP2(model, optimizer_of(settings, model), precision=settings.precision)


def _zero(settings: Settings, model: nn.Module, device: torch.device) -> Backend:
    from ..backends.zero import library as zero_library
    from ..backends.zero import step as zero

    assert settings.zero_stage is not None
    made = deepspeed_config(settings, dist.get_world_size())
    engine = zero_library.open_engine(model.to(device), optimizer_of(settings, model), made)
    half = settings.precision == "bf16" and settings.zero_stage == 0
    return zero.Zero(engine, autocast=torch.bfloat16 if half else None)


def _horovod(settings: Settings, model: nn.Module) -> Backend:
    from ..backends.horovod.sharded import HorovodSharded
    from ..backends.horovod.whole import Horovod

    kind = HorovodSharded if settings.zero_stage == 1 else Horovod
    how = {"precision": settings.precision, "compression": settings.compression}
    return kind(model, optimizer_of(settings, model), **how)


def deepspeed_config(settings: Settings, ranks: int) -> dict[str, Any]:
    """What deepspeed.initialize gets; ConfigError if the user's file and the flags disagree."""
    assert settings.zero_stage is not None and settings.micro_batch is not None
    return zero_config.make(
        zero_config.read(settings.deepspeed_config),
        stage=settings.zero_stage,
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        ranks=ranks,
        precision=settings.precision,
        offload=settings.offload,
    )
