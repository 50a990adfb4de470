"""Names of parameters and buffers, without what wrappers put before or into them."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Of torch.compile and of torch's activation checkpointing, wherever in a name they are.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def clean(name: str) -> str:
    """The name that the module has for it that was wrapped."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def name_in(module: nn.Module, name: str) -> str:
    """`clean`, for a name of `module`, which may itself be a data-parallel wrapper."""
    inner = getattr(module, "_orig_mod", module)
    wrapped = isinstance(inner, DataParallel | DistributedDataParallel)
    return clean(name).removeprefix("module.") if wrapped else clean(name)
