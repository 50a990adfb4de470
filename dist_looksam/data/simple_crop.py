"""Simple random crop (Touvron et al. 2022, DeiT III, arXiv:2204.07118; `--src` of its code).

The shorter side is resized to the image size, and a square is cut out at random after 4 pixels of
reflection were put all round.
"""

import numpy as np

from .decode import Box

_PAD = 4


class SimpleCrop:
    """The crop of one picture to side x side pixels; draws: two numbers in [0, 1), x and y."""

    def __init__(self, side: int, draws: list[float]) -> None:
        self.side, self.draws = side, draws
        self.pad = min(_PAD, side - 1)  # reflection repeats no edge, so it has side - 1 pixels
        self.beyond = (0, 0)  # pixels from `region` to the crop, -pad to pad; set by `region`

    def region(self, width: int, height: int) -> Box:
        """The square of the picture that the crop's pixels are of: it lies within the picture."""
        shorter = min(width, height)
        scale = shorter / self.side  # pixels of the picture in one of the crop
        inside, beyond = [], []
        for draw, length in zip(self.draws, (width, height)):
            room = length * self.side // shorter - self.side  # beside the crop, without the pad
            first = int(draw * (room + 2 * self.pad + 1)) - self.pad
            inside.append(min(max(first, 0), room) * scale)
            beyond.append(first - min(max(first, 0), room))
        self.beyond = beyond[0], beyond[1]
        left, top = inside
        return left, top, left + self.side * scale, top + self.side * scale

    def shift_(self, out: np.ndarray, *, mirror: bool) -> None:
        """Makes the crop of the pixels of `region`, uint8 [side, side, 3]; `mirror`: they are
        mirrored, and so is the crop."""
        x, y = self.beyond
        if x or y:
            rows, columns = self._reflected(y), self._reflected(-x if mirror else x)
            out[:] = out[rows[:, None], columns]

    def _reflected(self, by: int) -> np.ndarray:
        """Which pixel stands at each place of one direction."""
        last = self.side - 1
        return last - abs(last - abs(np.arange(self.side) + by))
