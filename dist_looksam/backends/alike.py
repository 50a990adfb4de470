"""Whether ranks hold the same bits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def differing(
    named: Sequence[tuple[str, Tensor]], largest: Callable[[Tensor], Tensor]
) -> list[str]:
    """The names of the tensors whose bits differ between ranks; each rank reads its own once.

    Args:
        named: alike on all ranks, but for the tensors' bits.
        largest: the largest over ranks of every entry of an int64 tensor [2, 2 x tensors].
    """
    if not named:
        return []
    sums = torch.cat([_checksum(t) for _, t in named])
    # The largest of s and of -s are equal but for the sign only where s is the same everywhere.
    both = largest(torch.stack([sums, -sums]))
    differ = (both[0] != -both[1]).view(-1, 2).any(-1).tolist()
    return [name for (name, _), differs in zip(named, differ, strict=True) if differs]


def _checksum(tensor: Tensor) -> Tensor:
    """[2] int64 of the bits: their sum, and their sum weighted by place."""
    whole_numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(-1).view(whole_numbers).long()
    place = torch.arange(1, bits.numel() + 1, device=bits.device)
    return torch.stack([bits.sum(), (bits * place).sum()])
