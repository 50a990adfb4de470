"""The order of samples: an endless stream of indices that depends on the seed only."""

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

_CACHED_EPOCHS = 3


def places(positions: Tensor, *, batch_size: int, repeat: int) -> Tensor:
    """The places in the order of samples, int64 [n], of stream positions, int64 [n].

    Repeated augmentation (Hoffer et al. 2019, arXiv:1901.09335; Berman et al. 2019,
    arXiv:1902.05509): a global batch holds batch_size / repeat samples `repeat` times, each time
    augmented anew, batch_size / repeat positions apart, so that mixing seldom joins a sample with
    itself. A place for each position without repetition.
    """
    num_samples = batch_size // repeat
    return positions // batch_size * num_samples + positions % batch_size % num_samples


class Order:
    """The endless stream of sample indices: one permutation of range(size) after the other.

    Stream position p belongs to epoch p // size and is entry p % size of that epoch's permutation.
    The permutation is the stable argsort of `size` raw 64-bit numbers of Philox with the key
    (seed, epoch). Philox is a counter-based generator: every key is a stream of its own, so epoch
    1000 needs no epoch before it. Its raw output is fixed by its publication and by NumPy's
    compatibility policy, which does not hold for `Generator.permutation`; so machines and NumPy
    versions agree, and a resumed run needs (seed, epoch, position) only.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed % 2**64
        self._permutations: OrderedDict[int, Tensor] = OrderedDict()

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Sample indices and epochs, int64 [n] each, of stream positions, int64 [n] >= 0."""
        epochs = positions // self.size
        offsets = positions % self.size
        indices = torch.empty_like(positions)
        by_epoch = epochs.argsort(stable=True)
        present, counts = torch.unique_consecutive(epochs[by_epoch], return_counts=True)
        for epoch, where in zip(present.tolist(), by_epoch.split(counts.tolist())):
            indices[where] = self.permutation(epoch)[offsets[where]]
        return indices, epochs

    def permutation(self, epoch: int) -> Tensor:
        """The order of one epoch, int64 [size]."""
        if epoch not in self._permutations:
            raw = np.random.Philox(key=[self.seed, epoch]).random_raw(self.size)
            self._permutations[epoch] = torch.from_numpy(np.argsort(raw, kind="stable"))
        self._permutations.move_to_end(epoch)
        while len(self._permutations) > _CACHED_EPOCHS:
            self._permutations.popitem(last=False)
        return self._permutations[epoch]
