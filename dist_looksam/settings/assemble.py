"""Makes device, process group, model, optimizer and engine from settings."""

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..backends import compiled
from ..backends.backend import Backend
from ..backends.rows import BACKENDS
from ..data import Batch, Data, TrainLoader, class_weights, load, losses
from ..data.augment import check_repeat, parse
from ..data.extent import Extent, extent
from ..data.growth import Growth
from ..data.loader import check_pairs
from ..data.sets import SETS, data_set
from ..data.stage import progress
from ..engine import Engine
from ..errors import ConfigError, RunError
from ..maths.schedule import scaled_lr
from ..optim import table
from ..optim.sharpness import Sharpness
from ..record import rundir, trackers
from ..world import World
from ..world.roster import Roster
from .config import Settings


def check(settings: Settings) -> None:
    """ConfigError for settings that are wrong on any machine. Reads no data.

    Args:
        settings: the result of `for_ranks` or `resolved`, which check backend and ranks.
    """
    own = data_set(settings.data)
    own.check_dir(settings.data_dir)
    if settings.data_cache and not own.stage:
        staged = " or ".join(name for name, row in SETS.items() if row.stage)
        raise ConfigError(
            f"data_cache is of --data {staged}, got --data {own.name}; leave it out, or pack the "
            f"images: dist-looksam data pack DIR TARGET."
        )
    assert settings.micro_batch is not None
    augment = parse(settings.augment, auto=own.augment, on=settings.augment_on)
    if settings.class_weights is not None:
        class_weights.read(settings.class_weights)
    check_pairs(augment, settings.micro_batch)
    check_repeat(augment, settings.batch_size)
    if settings.mixup_until is not None and not augment.mixes:
        raise ConfigError(
            f"mixup_until needs mixup or cutmix in --augment, got {settings.mixup_until} with "
            f"'{settings.augment}'; add one of them, or leave --mixup_until out."
        )
    if settings.m is not None:
        check_pairs(augment, settings.m, "m")
    known = own.stands_for or not settings.data_dir  # else the shape is read from the files
    models.check(settings.model, own.size(settings.image_size).shape if known else None)


def growth_of(settings: Settings, shape: tuple[int, int, int]) -> Growth | None:
    """How the images of resolved settings grow; None if they do not.

    ConfigError for data, a model or a compiler that takes images of one size, and for wrong sizes.
    """
    first, size = settings.image_size_from, data_set(settings.data).size
    if first is None:
        return None
    patch = models.patch(settings.model, shape)
    why = ""
    if size(16).shape == size(32).shape:
        why = f"data {settings.data}, whose images have one size"
    elif patch is None:
        why = f"model {settings.model}, which takes images of one size"
    elif settings.compile != "off":
        why = f"compile {settings.compile}, which would compile anew for each size"
    if why or patch is None:
        raise ConfigError(f"image_size_from is not for {why}, got {first}; leave it out.")
    assert settings.steps is not None
    return Growth(first=first, last=settings.image_size, patch=patch, steps=settings.steps)


def check_here(settings: Settings) -> None:
    """`check`, and ConfigError for a package or device that this machine lacks."""
    trackers.check(settings.track)
    missing = settings.backend_row.lacking(settings)
    if settings.compile != "off":
        missing = missing or compiled.lacking(settings.device)
    if missing:
        raise ConfigError(missing)
    check(settings)
    rundir.check_place(Path(settings.out))
    rundir.to_resume(Path(settings.out), settings.resume)


def restarting(settings: Settings) -> Callable[..., Any] | None:
    """run(train, settings, world) where workers may join and leave; None elsewhere.

    ConfigError if the backend's library cannot be loaded then.
    """
    for name, row in BACKENDS.items():
        if settings.backend in ("auto", name) and (run := row.restarting()):
            return run
    return None


def data_of(settings: Settings) -> Data:
    """The data, opened, from the cache where there is one. ConfigError as of `data.load`."""
    place = settings.data_dir
    uncached: dict[str, str] = {}
    copy = data_set(settings.data).stage
    if settings.data_cache and copy:
        try:
            place = str(copy(place, settings.data_cache, progress(place)).folder)
        except RunError as error:
            said = f"the data are read from {place}, not from a cache: {error}"
            uncached[socket.gethostname()] = said
    data = load(settings.data, place, **_wanted(settings))
    return replace(data, uncached=uncached)


def extent_of(settings: Settings, *, opened: bool) -> Extent:
    """The size of the data; see `data.extent.extent`."""
    return extent(settings.data, settings.data_dir, **_wanted(settings), opened=opened)


def _wanted(settings: Settings) -> dict[str, Any]:
    names = ("image_size", "augment", "augment_on", "seed", "holdout", "train_images", "shuffle")
    return {name: getattr(settings, name) for name in names}


def device_of(settings: Settings, world: World) -> torch.device:
    """The device of this rank; sets the current CUDA device."""
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ConfigError("device cuda was asked for, got no CUDA device; use --device cpu.")
    if settings.device == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = (
        world.local_rank if count > 1 else 0
    )  # a launcher may make one device visible to each rank
    if count > 1 and world.local_size > count:  # on all ranks of the node, one of which prints it
        raise ConfigError(
            f"ranks per node must be <= its {count} CUDA devices, got {world.local_size}; "
            f"start fewer ranks per node."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def join(settings: Settings, world: World, device: torch.device) -> Roster | None:
    """Connect this rank to the others; None where lost ranks are not detected."""
    return settings.backend_row.join(world, device, settings.timeout)


def start(settings: Settings, world: World) -> tuple[Settings, torch.device, Data, Roster | None]:
    """Check the settings on this machine, open the data, resolve the settings, connect the ranks.

    Returns (resolved settings, this rank's device, data, as `join`). Raises ConfigError.
    """
    check_here(settings.for_ranks(ranks=world.size, launcher=world.launcher))
    device = device_of(settings, world)
    data = data_of(settings)
    settings = settings.resolved(ranks=world.size, launcher=world.launcher, samples=len(data.train))
    return settings, device, data, join(settings, world, device)


def train_loader(settings: Settings, data: Data, backend: Backend) -> TrainLoader:
    """The training images of this rank. `settings` are resolved."""
    assert settings.micro_batch is not None
    assert not isinstance(settings.mixup_until, float)  # a share until the settings are resolved
    return TrainLoader(
        data.train,
        seed=settings.seed,
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        rank=backend.rank,
        ranks=backend.size,
        workers=settings.workers,
        shuffle=settings.shuffle,
        mixup_until=settings.mixup_until,
        growth=growth_of(settings, data.shape),
    )


def loss_of(settings: Settings, data: Data, device: torch.device) -> Any:
    """loss(model, batch): mean loss of one micro-batch. Raises as `class_weights.scaled`."""
    smoothing, threshold = settings.label_smoothing, settings.bce_target_thresh
    weights = None
    if settings.class_weights is not None:
        weights = class_weights.scaled(settings.class_weights, data.train).to(device)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        batch = batch.to(device)
        logits = models.call(model, batch.images, batch.keys)
        if settings.loss == "bce":
            return losses.binary_cross_entropy(logits, batch, smoothing, threshold)
        return losses.cross_entropy(logits, batch, smoothing, weights)

    return loss


def model_of(settings: Settings, data: Data) -> nn.Module:
    """The network, the same on every rank."""
    torch.manual_seed(settings.seed)
    return created(settings, data.num_classes, data.shape)


def created(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """A network for so many classes and images of (C, H, W); what --freeze fits has no gradient."""
    model = models.create(
        settings.model, num_classes=classes, image_shape=shape, drop_path=settings.drop_path
    )
    models.freeze(model, settings.freeze)
    return model


def base_settings(settings: Settings) -> dict[str, Any]:
    """The arguments of `table.build_base` besides parameters."""
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
    assert settings.base is not None and settings.weight_decay is not None
    assert settings.rho is not None and settings.alpha is not None
    how = base_settings(settings)
    scales = models.lr_scales(model, layer_decay=settings.layer_decay, head_lr=settings.head_lr)
    lrs = {number: how["lr"] * scale for number, scale in scales.items()}
    groups = table.groups(model, settings.weight_decay, settings.perturb, lrs)
    base = table.build_base(settings.base, groups, **how)
    return table.build(base, rule=settings.rule, rho=settings.rho, alpha=settings.alpha)


def engine_of(
    settings: Settings,
    data: Data,
    device: torch.device,
    init: Callable[[nn.Module, Data], None] | None = None,
) -> Engine:
    """The engine on the chosen backend. `settings` are resolved.

    init: writes the weights to start from into each rank's whole network, before it is sharded.
    """
    model = model_of(settings, data)
    if init is not None:
        init(model, data)
    if settings.checkpoint_activations:
        models.checkpoint_activations(model)
    if settings.compile == "blocks":
        compiled.compile_blocks(model)
    backend = settings.backend_row.make(
        settings, model, lambda model: optimizer_of(settings, model), device
    )
    return Engine(
        backend,
        loss=loss_of(settings, data, device),
        clip=settings.clip,
        ascent=settings.ascent,
        m=settings.m if settings.rule.two_passes else None,
        ema=settings.ema or None,
    )
