"""Curves of a run of any length in bounded memory."""


class Series:
    """(step, value) in order, at most `most` points: of more, groups of 2, 4, 8, ... points.

    A group stands at its last step, with its mean, or with its `last` value. The newest group is
    shown before it is full, so that the newest point is always there.
    """

    def __init__(self, *, most: int = 500, last: bool = False) -> None:
        self.size = 1
        self._most, self._last = most, last
        self._groups: list[tuple[int, float, int]] = []  # step, value, number of points

    def add(self, step: int, value: float) -> None:
        """A point at a later step than those before."""
        if self._groups and self._groups[-1][2] < self.size:
            self._groups[-1] = self._joined(self._groups[-1], (step, value, 1))
            return
        self._groups.append((step, value, 1))
        if len(self._groups) > self._most:
            groups, self.size = self._groups, 2 * self.size
            pairs = [self._joined(a, b) for a, b in zip(groups[::2], groups[1::2])]
            self._groups = pairs + groups[2 * len(pairs) :]

    def _joined(
        self, first: tuple[int, float, int], then: tuple[int, float, int]
    ) -> tuple[int, float, int]:
        count = first[2] + then[2]
        mean = first[1] + (then[1] - first[1]) * then[2] / count
        return then[0], then[1] if self._last else mean, count

    def points(self) -> list[tuple[int, float]]:
        """The points to draw."""
        return [(step, value) for step, value, _ in self._groups]
