"""A few numbers of a device that the host reads later, without waiting for work queued since."""

from typing import Any

import torch
from torch import Tensor


class Later:
    """A copy of a small tensor for the host, ready when the device gets there.

    On a GPU the copy goes to page-locked memory and does not make the host wait. Reading waits for
    the work that was queued before the copy; `bool(tensor)` would wait for the work queued after
    it, too. Elsewhere it is the tensor itself.
    """

    def __init__(self, value: Tensor) -> None:
        self._copied: Any = None
        self._value = value
        if value.device.type == "cuda":
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Tensor:
        """The tensor, on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value

    def __bool__(self) -> bool:
        return bool(self.read())

    def __reduce__(self) -> tuple[Any, ...]:
        return Later, (self.read().clone(),)
