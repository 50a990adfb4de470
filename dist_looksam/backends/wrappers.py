"""Which wrappers Engine accepts around a module."""

import os

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's, or itself."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


def in_ddp(module: nn.Module) -> bool:
    """True for a module in DistributedDataParallel, compiled or not."""
    return isinstance(uncompiled(module), DistributedDataParallel)


def several_ranks() -> bool:
    """True if torch's process group has more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_joined() -> None:
    """ConfigError if a launcher has started several ranks that no process group joins: each would
    train alone."""
    ranks = os.environ.get("WORLD_SIZE", "")
    if ranks.isdecimal() and int(ranks) > 1 and not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            f"Engine needs a process group of the {ranks} ranks that WORLD_SIZE names, got none: "
            f"each would train alone; call torch.distributed.init_process_group() before Engine, "
            f"or unset WORLD_SIZE."
        )


def check_wrappers(module: nn.Module) -> None:
    """ConfigError for a wrapper in the wrong place."""
    whole = uncompiled(module)
    if whole is not module and hasattr(whole, "zero_optimization_stage"):
        raise ConfigError(
            "Engine needs the DeepSpeedEngine itself, got torch.compile of it; call compile() of "
            "the DeepSpeedEngine instead."
        )
    for part in module.modules():
        if isinstance(part, DistributedDataParallel) and part is not whole:
            raise ConfigError(
                "DistributedDataParallel must be around the whole module, got it around a part; "
                "leave it out, since Engine wraps the module."
            )
