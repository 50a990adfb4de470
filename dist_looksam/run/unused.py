"""Data that are not used: files passed over at the start or unreadable in training, and caches."""

from collections import Counter
from typing import Any

from ..backends.backend import Backend
from ..data import Data
from ..data.source import Source

_NAMED = 5  # files that one note names


class Unused:
    """Counts these files over all ranks. A file that several ranks cannot read counts once."""

    def __init__(self, data: Data) -> None:
        self.sources: list[Source] = [data.train, data.test]
        self.unreadable: dict[str, str] = {}
        self.uncached = data.uncached

    def notes(self) -> list[str]:
        """A warning for each host without its cache, and for each reason for which files were
        passed over when the data were opened."""
        passed_over = {**self.sources[1].passed_over, **self.sources[0].passed_over}
        counts = self._passed_over()
        return [f"warning: {why}" for why in self.uncached.values()] + [
            f"warning: {counts[why]} passed over in the data, {why}, such as {first}"
            for why, (_, first) in passed_over.items()
        ]

    def _passed_over(self) -> Counter[str]:
        train, test = (source.passed_over for source in self.sources)
        counts = Counter({why: count for why, (count, _) in train.items()})
        if test is not train:  # a part of the training images may be the test images
            counts.update({why: count for why, (count, _) in test.items()})
        return counts

    def new(self) -> bool:
        """Whether this rank has an unreadable file that `collect` has not reported."""
        return any(
            name not in self.unreadable for s in self.sources for name in s.unreadable.copy()
        )

    def collect(self, backend: Backend) -> str | None:
        """A note on newly unreadable files of any rank. One object gather."""
        unreadable = self.sources[0].unreadable.copy() | self.sources[1].unreadable.copy()
        new = {name: why for name, why in unreadable.items() if name not in self.unreadable}
        fresh: dict[str, str] = {}
        for theirs in backend.gather(new):
            fresh |= theirs
        self.unreadable |= fresh
        if not fresh:
            return None
        named = ", ".join(f"{name} ({why})" for name, why in list(fresh.items())[:_NAMED])
        rest = f" and {len(fresh) - _NAMED} more" if len(fresh) > _NAMED else ""
        return (
            f"warning: cannot read {named}{rest}; {len(self.unreadable)} unreadable so far: in "
            f"training the next image takes the place of each, in evaluation it is left out"
        )

    def summary(self) -> dict[str, Any]:
        """Fields of summary.json; {} where all files, and the cache if one was asked for, were
        used."""
        found: dict[str, Any] = {
            "passed_over": dict(self._passed_over()),
            "unreadable": len(self.unreadable),
            "uncached": self.uncached,
        }
        return {name: value for name, value in found.items() if value}
