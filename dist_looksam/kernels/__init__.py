"""Triton kernels that work on all layers at once, for CUDA.

The formulas are those of `maths` and `optim`, which use these kernels where `fit` says so and are
their reference elsewhere. A step by one torch operator per layer or per operation launches some
1,000 kernels and reads and writes its tensors 3 times as often.

DIST_LOOKSAM_KERNELS=off in the environment turns the kernels off. TRITON_INTERPRET=1 makes them
work on CPU tensors, slowly, for tests.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


def fit(*lists: Sequence[Tensor]) -> ModuleType | None:
    """`kernels.launch` if the kernels can work on these lists, else None: they can on contiguous
    fp32 tensors on one CUDA device."""
    if not lists[0] or not usable(lists[0][0].device):
        return None
    device = lists[0][0].device
    fitting = all(
        t.dtype == torch.float32 and t.device == device and t.is_contiguous()
        for tensors in lists
        for t in tensors
    )
    return import_module(".launch", __name__) if fitting else None


_not_on_all_ranks: set[torch.device] = set()


def agree(device: torch.device, gather: Callable[[bool], list[bool]]) -> None:
    """Use the kernels on all ranks or on none: replicas would round differently, and drift apart.

    `gather` returns the values of all ranks. Every rank must make this call.
    """
    if device.type == "cuda" and not all(gather(usable(device))):
        _not_on_all_ranks.add(device)


def usable(device: torch.device) -> bool:
    """Whether kernels run on this device; if they ought to and do not, says so once."""
    if os.environ.get("DIST_LOOKSAM_KERNELS", "on") == "off" or device in _not_on_all_ranks:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" and _compiles(device)


@cache
def _compiles(device: torch.device) -> bool:
    """Whether Triton is there and can compile for this device."""
    try:
        import_module(".launch", __name__).sums([torch.ones(3, device=device)])
    except Exception as error:  # of an import, of Triton's compiler, or of a missing C compiler
        logging.getLogger(__name__).warning(
            "Triton does not work here (%s: %s), so that the optimizer launches a kernel for each "
            "operation: its step takes longer, and computes the same.",
            type(error).__name__,
            error,
        )
        return False
    return True
