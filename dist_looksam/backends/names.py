"""Names of parameters and buffers, without the prefixes of wrappers."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .wrappers import uncompiled

# Of torch.compile and of torch's activation checkpointing, anywhere in a name.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def clean(name: str) -> str:
    """The name in the unwrapped module."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def name_in(module: nn.Module, name: str) -> str:
    """`clean`, for a name of `module`, which may itself be a data-parallel wrapper."""
    wrapped = isinstance(uncompiled(module), DataParallel | DistributedDataParallel)
    return clean(name).removeprefix("module.") if wrapped else clean(name)
