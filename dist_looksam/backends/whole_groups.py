"""Groups of samples where every rank has its own gradient of whole layers, and shards of state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..maths.together import Groups
from ..optim.sharpness import Sharpness
from .flat import Flat


class WholeGroups:
    """ZeRO 0 and 1, and sharded Horovod: perturbs the weights that forward sees, whole.

    Nothing is sent for eps of a group that one rank has. The sums of g and of g_s stay whole until
    the last group has ended; then one reduction of each leaves this rank the means of its shards.
    """

    optimizer: Sharpness
    size: int

    def own_layers(self) -> tuple[list[Tensor], list[Tensor]]:
        """(layers that forward sees, this rank's own fp32 gradients), in the order of the flats'
        pieces. The same layers at every call; gradients unscaled, and of the layers' shapes."""
        raise NotImplementedError

    def clear_own(self) -> None:
        """Clear the gradients of a pass that was not averaged."""
        raise NotImplementedError

    def held(self) -> Sequence[Flat]:
        """The shards that the optimizer has: see `StoredLayers.held`."""
        raise NotImplementedError

    def average_(self, tensors: Sequence[Tensor], neighbours: int | None = None) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def perturb_whole(self, groups: Groups) -> None:
        """`Backend.perturb_group`."""
        layers, grads = self.own_layers()
        if groups.ranks > 1:
            self.average_(grads, groups.ranks)
        shards = [flat.master for flat in self.held()]
        self.optimizer.perturb_whole_group(shards, layers, grads)
        self.clear_own()

    @torch.no_grad()
    def end_whole(self, groups: Groups, *, last: bool) -> list[Tensor]:
        """`Backend.end_group`. Returns after the last group: the mean g_s of every shard, fp32."""
        layers, grads = self.own_layers()
        sums = self.optimizer.close_group(layers, grads, last=last)
        del grads
        self.clear_own()
        if not last:
            return []
        g = self.optimizer.sum_of_g(layers)
        shared = groups.ranks == self.size  # then g is the same on all ranks already
        kept = self.shards_of(g) if shared else self.mean_shards(g)
        self.optimizer.set_group_means([flat.master for flat in self.held()], kept)
        del g
        means = self.mean_shards(sums)
        for shards in (kept, means):
            torch._foreach_mul_(shards, 1 / groups.rounds)
        return means

    def mean_shards(self, layers: list[Tensor]) -> list[Tensor]:
        """This rank's shards of the mean of whole layers over ranks. Layers may be written to."""
        self.average_(layers)
        return self.shards_of(layers)

    def shards_of(self, layers: list[Tensor]) -> list[Tensor]:
        """This rank's shards of whole layers, each as the optimizer has it; copies."""
        remaining, shards = iter(layers), []
        for flat in self.held():
            shard = torch.zeros_like(flat.master, dtype=torch.float32)
            for piece, view in zip(flat.pieces, flat.views(shard), strict=True):
                view.copy_(next(remaining).reshape(-1)[piece.start : piece.stop])
            shards.append(shard)
        return shards
