"""The block order: nearly as mixed as a full permutation, but read in long pieces.

For data on a network disk whose rows were mixed when they were packed. A block is a run of
neighbouring rows; W blocks, chosen at random over the whole data set, make a window, and the stream
takes c rows of each block of the window in turn. With W c = batch_size, each node reads W / nodes
blocks from end to end.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .order import Order

FULL = "full"
_CACHED_WINDOWS = 4
_MOST_ROWS = 2**26  # of a window, which is sorted in memory
_GOLDEN = 0x9E3779B97F4A7C15  # makes other numbers of a seed for rows than for blocks


@dataclass(frozen=True)
class Blocks:
    """Rows in a block, blocks in a window, rows of a block in turn (0: the window is permuted)."""

    rows: int
    window: int
    turn: int


def parse_shuffle(text: str) -> Blocks | None:
    """The value of --shuffle; None for the full permutation. ConfigError if it is neither."""
    if text == FULL:
        return None
    found = re.fullmatch(r"block:(\d+),(\d+),(\d+)", text)
    if found is None:
        raise ConfigError(
            f"shuffle must be full or block:B,W,c (rows in a block, blocks in a window, rows of a "
            f"block in turn), got {text}; on a network disk try block:128,512,8."
        )
    blocks = Blocks(*map(int, found.groups()))
    if not (blocks.rows and blocks.window and blocks.rows * blocks.window <= _MOST_ROWS):
        raise ConfigError(
            f"shuffle must have B and W of 1 or more and B x W of {_MOST_ROWS:,} or less, got "
            f"{text}; try block:128,512,8."
        )
    return blocks


def order_of(shuffle: str, size: int, seed: int) -> "Order | BlockOrder":
    """The order that a value of --shuffle names."""
    blocks = parse_shuffle(shuffle)
    return Order(size, seed) if blocks is None else BlockOrder(size, seed, blocks)


class BlockOrder:
    """An endless stream of sample indices like `order.Order`, in blocks.

    Of N rows, n = ceil(N / B) blocks: block b is rows [b N // n, (b + 1) N // n). Window w of an
    epoch is the blocks with places [w W, (w + 1) W) in a permutation of the blocks, by Philox with
    the key (seed, epoch). A row of the window in slot s has the rank r among the rows of its block,
    by Philox with the key (seed ^ GOLDEN, epoch 2^32 + w); the stream is sorted by (r // c, s, r).
    """

    def __init__(self, size: int, seed: int, blocks: Blocks) -> None:
        self.size, self.seed, self.blocks = size, seed % 2**64, blocks
        self._count = -(-size // blocks.rows)
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As `Order.at`."""
        epochs, offsets = (positions // self.size).numpy(), (positions % self.size).numpy()
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            starts = self._epoch(int(epoch))[1]
            in_epoch = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(starts, offsets[in_epoch], side="right") - 1
            for window in np.unique(windows):
                here = in_epoch[windows == window]
                rows = self._window(int(epoch), int(window))
                indices[here] = rows[offsets[here] - starts[window]]
        return torch.from_numpy(indices), torch.from_numpy(epochs)

    def permutation(self, epoch: int) -> Tensor:
        """The order of one epoch, int64 [size]."""
        first = epoch * self.size
        return self.at(torch.arange(first, first + self.size))[0]

    def _starts_of(self, blocks: np.ndarray) -> np.ndarray:
        return blocks * self.size // self._count

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted blocks of an epoch, and the first position of each window."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            raw = np.random.Philox(key=[self.seed, epoch]).random_raw(self._count)
            blocks = np.argsort(raw, kind="stable")
            sizes = self._starts_of(blocks + 1) - self._starts_of(blocks)
            before = np.cumsum(sizes) - sizes
            return blocks, before[:: self.blocks.window]

        return _cached(self._epochs, epoch, make)

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """The rows of a window in the order of the stream."""

        def make() -> np.ndarray:
            size = self.blocks.window
            blocks = self._epoch(epoch)[0][window * size : (window + 1) * size]
            sizes = self._starts_of(blocks + 1) - self._starts_of(blocks)
            before = np.cumsum(sizes) - sizes
            slots = np.repeat(np.arange(len(blocks)), sizes)
            places = np.arange(len(slots)) - before[slots]  # of rows in their blocks
            rows = self._starts_of(blocks)[slots] + places
            key = np.array([self.seed ^ _GOLDEN, epoch * 2**32 + window], dtype=np.uint64)
            raw = np.random.Philox(key=key).random_raw(len(rows))
            turn = self.blocks.turn
            if not turn:
                return rows[np.argsort(raw, kind="stable")]
            # Sorted by slot and number, the place in the block is the rank.
            return rows[np.lexsort((raw, slots))[np.lexsort((places, slots, places // turn))]]

        return _cached(self._windows, (epoch, window), make)


def _cached(cache: OrderedDict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    if key not in cache:
        cache[key] = make()
    cache.move_to_end(key)
    while len(cache) > _CACHED_WINDOWS:
        cache.popitem(last=False)
    return cache[key]


def check_mixed(labels: Tensor, shuffle: str) -> None:
    """ConfigError if neighbours are of one class more often than in rows mixed at random.

    Twice as often is too much, and so are 10 % of all neighbours more, where classes are few; three
    standard deviations of chance are allowed on top.
    """
    if len(labels) < 2:
        return
    share = torch.bincount(labels).double() / len(labels)
    chance = float(share.square().sum())
    deviation = (chance * (1 - chance) / len(labels)) ** 0.5
    found = float((labels[1:] == labels[:-1]).double().mean())
    in_order = bool((labels[1:] >= labels[:-1]).all())
    if in_order or found > min(2 * chance, chance + 0.1) + 3 * deviation:
        raise ConfigError(
            f"shuffle {shuffle} needs images mixed when they were packed, got neighbours of one "
            f"class in {found:.2%} of all places ({chance:.2%} by chance); pack them again (dist-"
            f"looksam data pack SOURCE TARGET --shuffle 0), or use --shuffle full."
        )
