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
    the last group has ended; then one all-reduce of each leaves this rank the means of its shards.
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

    def held_flats(self) -> Sequence[Flat]:
        """The shards that the optimizer has."""
        raise NotImplementedError

    def average_(self, tensors: Sequence[Tensor], neighbours: int | None = None) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def perturb_whole(self, groups: Groups) -> None:
        """`Backend.perturb_group`."""
        layers, grads = self.own_layers()
        if groups.ranks > 1:
            self.average_(grads, groups.ranks)
        shards = [flat.master for flat in self.held_flats()]
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
        if groups.ranks < self.size:  # else it is the same on all ranks already
            self.average_(g)
        means = self._shards(g, groups.rounds)
        self.optimizer.set_group_means([flat.master for flat in self.held_flats()], means)
        del g
        self.average_(sums)
        return self._shards(sums, groups.rounds)

    def _shards(self, layers: list[Tensor], rounds: int) -> list[Tensor]:
        """This rank's shards of whole layers, divided by the number of groups that it had."""
        remaining, shards = iter(layers), []
        for flat in self.held_flats():
            shard = torch.zeros_like(flat.master, dtype=torch.float32)
            for piece, view in zip(flat.pieces, flat.views(shard), strict=True):
                view.copy_(next(remaining).reshape(-1)[piece.start : piece.stop])
            shards.append(shard.div_(rounds))
        return shards
