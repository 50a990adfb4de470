"""What the kernels need to know of lists of tensors, on the device: addresses and blocks.

Everything is a small tensor made from numbers of the host, and cached by these numbers. Uploads
come from pinned memory, so that the host does not wait.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 2048  # entries of a layer that one program works on; sums depend on it in their last bits
_KEPT = 512
_uploads: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


@dataclass(frozen=True)
class Blocks:
    """Blocks of layers of given sizes.

    table  [3, num] int32: layer, position in the layer in blocks, number of entries.
    first  [layers + 1] int32: each layer's first block.
    """

    num: int
    layers: int
    table: Tensor
    first: Tensor


@lru_cache(maxsize=128)
def blocks_of(sizes: tuple[int, ...], device: torch.device) -> Blocks:
    """The blocks of layers of these sizes. Waits for the device at its first call alone."""
    entries = torch.tensor(sizes)
    numbers = (entries + BLOCK - 1) // BLOCK
    first = torch.cat([torch.zeros(1, dtype=torch.int64), numbers.cumsum(0)])
    layer = torch.repeat_interleave(torch.arange(len(sizes)), numbers)
    position = torch.arange(len(layer)) - first[layer]
    count = (entries[layer] - position * BLOCK).clamp(max=BLOCK)
    table = torch.stack([layer, position, count]).to(device, torch.int32)
    return Blocks(len(layer), len(sizes), table, first.to(device, torch.int32))


def uploaded(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor on the device, which must not be written to."""
    cuda = device.type == "cuda"
    key = (values, dtype, device, torch.cuda.current_stream(device).cuda_stream if cuda else 0)
    found = _uploads.get(key)
    if found is None:
        found = torch.tensor(values, dtype=dtype, pin_memory=cuda).to(device, non_blocking=True)
        _uploads[key] = found
        if len(_uploads) > _KEPT:
            _uploads.popitem(last=False)
    else:
        _uploads.move_to_end(key)
    return found


def addresses(lists: Sequence[Sequence[Tensor]], device: torch.device) -> tuple[Tensor, bool]:
    """Addresses of all tensors, [lists x layers] int64; whether all are multiples of 16 bytes."""
    values = tuple(t.data_ptr() for tensors in lists for t in tensors)
    return uploaded(values, torch.int64, device), not any(value % 16 for value in values)
