"""What a look keeps from its first pass to its end: copies of w, g, and sums over groups."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..maths.shards import Shards, clones


@dataclass
class Look:
    """The tensors of a look, by parameter.

    copies: w of the parameters that were perturbed. weights: those of them that are so now.
    grads: g, or its sum over groups. sums: g_s summed over groups.
    used: the parameters that the first pass gave a gradient, where these are the same on all
        ranks, and whether they required it then: shards of FSDP2 do not.
    """

    copies: dict[Tensor, Tensor] = field(default_factory=dict)
    weights: dict[Tensor, Tensor] = field(default_factory=dict)
    grads: dict[Tensor, Tensor] = field(default_factory=dict)
    sums: dict[Tensor, Tensor] = field(default_factory=dict)
    cosine_sums: list[Tensor] = field(default_factory=list)
    eps_cosine: Tensor | None = None
    gv_sums: list[Tensor] = field(default_factory=list)
    used: dict[Tensor, bool] = field(default_factory=dict)

    def keep(self, params: Shards) -> None:
        """Copies of w of these parameters, which are then perturbed; made once a look."""
        new = [p for p in params if p not in self.copies]
        self.copies.update(zip(new, clones(new), strict=True))
        self.weights.update((p, self.copies[p]) for p in params)

    def restore(self, params: Shards | None = None, *, free: bool = True) -> None:
        """Restore w of these parameters, or of all, bit for bit; of those that are perturbed.

        `free`: give up the copies of w.
        """
        moved = [p for p in (list(self.weights) if params is None else params) if p in self.weights]
        if moved:
            torch._foreach_copy_(moved, [self.weights.pop(p) for p in moved])
            torch.clear_autocast_cache()  # else forward under a caller's autocast sees the old w
        for p in moved if free else ():
            del self.copies[p]

    def take_sum(self) -> dict[Tensor, Tensor]:
        """The sums of g_s, which are then not kept here."""
        sums, self.sums = self.sums, {}
        return sums

    def grads_of(self, params: Shards) -> list[Tensor]:
        """The kept g, in the order of the parameters."""
        return [self.grads[p] for p in params]


def add(sums: dict[Tensor, Tensor], params: Sequence[Tensor], new: Shards) -> None:
    """sums[p] += new; a copy at first."""
    later = [i for i, p in enumerate(params) if p in sums]
    if later:
        torch._foreach_add_([sums[params[i]] for i in later], [new[i] for i in later])
    first = [i for i, p in enumerate(params) if p not in sums]
    copies = clones([new[i] for i in first])
    sums.update((params[i], copy) for i, copy in zip(first, copies, strict=True))
