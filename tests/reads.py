"""How often the host asks for a value that a device computes, counted without a device."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_looksam.optim.later import Later


class Reads(TorchDispatchMode):
    """Counts tensors whose value is asked for: bool(t), float(t), t.item(), t.tolist() of one.

    count: of all. later: those of `Later`, which was copied to the host before it was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.later = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self._read = read = Later.read

        def counted(later: Later) -> torch.Tensor:
            self.later += 1
            return read(later)

        Later.read = counted
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Later.read = self._read
        super().__exit__(*error)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, CPU tensors tell this package that they are on a GPU, so that its code does what it
    does there."""

    def is_cuda(tensor: torch.Tensor) -> bool:
        caller = sys._getframe(1).f_globals["__name__"]
        return caller.startswith("dist_looksam.")

    torch.Tensor.is_cuda = property(is_cuda)
    try:
        yield
    finally:
        del torch.Tensor.is_cuda
