"""Compares tensors between ranks, bit by bit."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def differing(
    named: Sequence[tuple[str, Tensor]], largest: Callable[[Tensor], Tensor]
) -> list[str]:
    """The names of the tensors whose bits differ between ranks; each rank reads its own once.

    Args:
        named: the same names, shapes and dtypes on all ranks.
        largest: the maximum over ranks of every entry of an int64 tensor [2, 2 x tensors].
    """
    if not named:
        return []
    sums = torch.cat([_checksum(t) for _, t in named])
    # max(s) = -max(-s) = min(s) only where s is the same everywhere.
    extremes = largest(torch.stack([sums, -sums]))
    differ = (extremes[0] != -extremes[1]).view(-1, 2).any(-1).tolist()
    return [name for (name, _), differs in zip(named, differ, strict=True) if differs]


def _checksum(tensor: Tensor) -> Tensor:
    """[2] int64 of the bits: their sum, and their sum weighted by position."""
    int_type = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(-1).view(int_type).long()
    position = torch.arange(1, bits.numel() + 1, device=bits.device)
    return torch.stack([bits.sum(), (bits * position).sum()])
