"""Collectives and their elements, counted by torch's profiler.

This includes every call of torch.distributed, by DDP and DeepSpeed too, on gloo and NCCL.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

from torch.profiler import ProfilerActivity, profile

_SHAPED = {"c10d::_allgather_base_": 1, "c10d::_reduce_scatter_base_": 1}  # index of the input
_NAMES = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}


@dataclass
class Traffic:
    """Calls by (kind, elements that this rank puts in).

    kinds: all_reduce, all_gather, reduce_scatter, broadcast, ... as torch names them.
    """

    calls: Counter[tuple[str, int]] = field(default_factory=Counter)

    def elements(self, *, above: int = 0) -> dict[str, int]:
        """Elements per kind, of calls with more than `above` elements."""
        sums: Counter[str] = Counter()
        for (kind, size), times in self.calls.items():
            if size > above:
                sums[kind] += size * times
        return dict(sums)

    def total(self, *, above: int = 0) -> int:
        """Elements of all kinds."""
        return sum(self.elements(above=above).values())


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts the collectives of this rank inside the context; filled in at its end."""
    traffic = Traffic()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        yield traffic
    # profiler.events() makes an object of each of some 60,000 operations, which takes seconds.
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        if name in _SHAPED:
            size = prod(event.shapes()[_SHAPED[name]])
            kind = _NAMES[name.removeprefix("c10d::")]
            traffic.calls[kind, size] += 1
            if kind == "reduce_scatter":
                traffic.calls["all_reduce", size] -= 1  # gloo's own call, counted again below
        elif name.startswith(("gloo:", "nccl:")):
            kind = name.split(":", 1)[1]
            if kind != "all_gather":
                traffic.calls[kind, prod((event.shapes() or [[]])[0])] += 1
    for key in [k for k, times in traffic.calls.items() if times <= 0]:
        del traffic.calls[key]
