"""What a step sends: the collectives of each backend, by kind of step.

Tests hold these against what torch's profiler counts in real runs, and against the kernel's
counters of a network interface.
"""

from dataclasses import dataclass, replace

from .network import Call
from .run import Run

_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # DDP's, in bytes


@dataclass(frozen=True, kw_only=True)
class Sent:
    """The collectives of one step.

    gathers    in each forward, before it needs them; stage 3's large layers, FSDP2's units.
    again      in each backward: FSDP2's units that were freed after their forward.
    gradients  in or after each backward of a micro-batch that `reduces` counts.
    reduces    those backwards, in one pass: 1, or every micro-batch.
    publish    after a pass, when weights have changed.
    small      of a few numbers, in the whole step; only their latency counts.
    passes     forward and backward passes.
    """

    gathers: tuple[Call, ...] = ()
    again: tuple[Call, ...] = ()
    gradients: tuple[Call, ...] = ()
    reduces: int = 1
    publish: tuple[Call, ...] = ()
    small: int
    passes: int
    accumulation: int

    def calls(self) -> list[Call]:
        """All of the step but the small ones, with `times` multiplied out."""
        found = []
        for calls, times in (
            (self.gathers, self.passes * self.accumulation),
            (self.again, self.passes * self.accumulation),
            (self.gradients, self.passes * self.reduces),
            (self.publish, self.passes),
        ):
            found += [replace(c, times=c.times * times) for c in calls]
        return found


def sent(run: Run, *, look: bool) -> Sent:
    """Of a look, or of any other step."""
    passes = 2 if look else 1
    split = run.fsdp or run.stage not in (None, 0)
    small = 1 + (_norms(run, look) if split else 0)
    accumulation = run.accumulation
    if run.ranks.total == 1 and run.stage is None:
        return Sent(small=0, passes=passes, accumulation=accumulation)
    parts = _units(run) if run.fsdp else _by_stage(run)
    return Sent(small=small, passes=passes, accumulation=accumulation, **parts)


def _by_stage(run: Run) -> dict:
    return {None: _ddp, 0: _whole, 1: _partitions, 2: _partitions, 3: _shards}[run.stage](run)


def _norms(run: Run, look: bool) -> int:
    """Sums over split layers: DeepSpeed's overflow and norm, the rule's, the base's."""
    trust = run.base in ("lamb", "lars")
    if run.fsdp:  # g's or the rule's; eps's, g_v's, and in 16 bits what is seen of eps
        return 1 + trust + (2 + run.sixteen if look else 0)
    return 3 + trust + (5 if look else 0)


def _ddp(run: Run) -> dict:
    sizes, bucket, limit = [], 0, _FIRST_BUCKET
    for layer in reversed(run.work.order):
        bucket += layer
        if 4 * bucket >= limit:
            sizes.append(bucket)
            bucket, limit = 0, _BUCKET
    if bucket:
        sizes.append(bucket)
    return {"gradients": tuple(Call(kind="all_reduce", elements=n, size=4) for n in sizes)}


def _whole(run: Run) -> dict:
    return {"gradients": _cut("all_reduce", run.work.parameters, run.zero("allgather_bucket_size"))}


def _cut(kind: str, elements: int, bucket: int, size: int = 4) -> tuple[Call, ...]:
    """As many equal calls as it takes for none to exceed a bucket."""
    times = max(1, -(-elements // bucket))
    return (Call(kind=kind, elements=-(-elements // times), size=size, times=times),)


def _partitions(run: Run) -> dict:
    ranks, size = run.ranks.total, run.weight_bytes
    groups = [-(-sum(group) // ranks) for group in run.work.groups]
    bucket = run.zero("reduce_bucket_size")
    return {
        "gradients": _cut("all_reduce", run.work.parameters, bucket, size),
        "reduces": run.accumulation if run.stage == 2 else 1,
        "publish": tuple(Call(kind="all_gather", elements=n, size=size) for n in groups),
    }


def _shards(run: Run) -> dict:
    ranks, size = run.ranks.total, run.weight_bytes
    kept, every = run.persistent, run.shard
    small = sum(-(-layer // ranks) for layer in kept)
    large = every - small
    gathers: tuple[Call, ...] = ()
    if large:  # the setting counts whole layers
        together = max(1, run.zero("stage3_prefetch_bucket_size") // ranks)
        gathers = _cut("all_gather", large, together, size)
    return {
        "gathers": gathers,
        "gradients": _cut("reduce_scatter", every * ranks, run.zero("reduce_bucket_size"), size),
        "reduces": run.accumulation,
        "publish": tuple(
            Call(kind="all_gather", elements=-(-layer // ranks), size=size) for layer in kept
        ),
    }


def _units(run: Run) -> dict:
    """The rest of the network stays gathered until the end of backward, the last block until its
    own."""
    *blocks, rest = run.units
    size, ranks = run.weight_bytes, run.ranks.total

    def gather(elements: int) -> Call:
        return Call(kind="all_gather", elements=elements, size=size)

    backward = [*blocks[::-1], rest]
    return {
        "gathers": tuple(gather(n) for n in (rest, *blocks) if n),
        "again": tuple(gather(n) for n in blocks[-2::-1]),
        "gradients": tuple(
            Call(kind="reduce_scatter", elements=ranks * n, size=4) for n in backward if n
        ),
        "reduces": run.accumulation,
    }
