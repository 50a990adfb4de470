"""Parses SLURM's compressed lists: `node[1-3,07-09],x1` of hosts, `4(x2),1` of tasks per node."""

import re
from collections.abc import Iterator

_ITEM = re.compile(r"[^,\[\]]*(?:\[[^\]]*\][^,\[\]]*)*")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand(hosts: str) -> list[str]:
    """The host names, in order; with leading zeros, also for several brackets in a name.

    Raises ValueError for text that is not such a list. Source: SLURM's hostlist, `man scontrol`
    (show hostnames).
    """
    names: list[str] = []
    position = 0
    while position < len(hosts):
        item = _ITEM.match(hosts, position)
        if item is None or not item.group():
            raise ValueError(f"not a host list: {hosts!r}")
        names.extend(_names(item.group()))
        position = item.end()
        if position < len(hosts) and hosts[position] != ",":
            raise ValueError(f"not a host list: {hosts!r}")
        position += 1
    return names


def _names(item: str) -> Iterator[str]:
    before, bracket, rest = item.partition("[")
    if not bracket:
        yield before
        return
    inside, _, after = rest.partition("]")
    tails = list(_names(after))
    for piece in inside.split(","):
        numbers = _RANGE.fullmatch(piece.strip())
        if numbers is None:
            raise ValueError(f"not a range of hosts: {piece!r} in {item!r}")
        first, last = numbers.group(1), numbers.group(2) or numbers.group(1)
        for number in range(int(first), int(last) + 1):
            for tail in tails:
                yield f"{before}{number:0{len(first)}d}{tail}"


def counts(tasks: str) -> list[int]:
    """Tasks on each node: `4(x2),1` is [4, 4, 1]. Raises ValueError for other text."""
    numbers: list[int] = []
    for piece in tasks.split(","):
        found = _COUNT.fullmatch(piece.strip())
        if found is None:
            raise ValueError(f"not a list of task counts: {tasks!r}")
        numbers += [int(found.group(1))] * int(found.group(2) or 1)
    return numbers
