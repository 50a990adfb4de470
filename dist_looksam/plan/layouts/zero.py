"""DeepSpeed ZeRO, stages 0 to 3."""

from typing import Any

from ...backends.zero import config
from ..network import Call
from ..run import PlannedRun
from . import Layout

# Defaults of DeepSpeed 0.19; numbers are elements.
_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "allgather_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
}


class Zero(Layout):
    """Split by stage: nothing, state, also gradients, also weights."""

    name = "zero"
    silent_alone = False
    needs_streams = True

    def shard(self, run: PlannedRun) -> int:
        work, ranks = run.work, run.ranks.total
        if _stage(run) == 0:
            return work.parameters
        if _stage(run) == 3:
            return sum(-(-size // ranks) for size in work.order)
        return sum(-(-sum(group) // ranks) for group in work.groups)

    def autocast(self, run: PlannedRun) -> bool:
        return run.sixteen and _stage(run) == 0

    def weights(self, run: PlannedRun) -> int:
        if _stage(run) < 3:
            return super().weights(run)
        return run.weight_bytes * (run.shard + run.work.frozen // run.ranks.total)

    def masters(self, run: PlannedRun) -> int:
        if _stage(run) == 0 or (_stage(run) == 3 and not run.sixteen):
            return 0
        return 4 * run.shard

    def counters(self, run: PlannedRun) -> int:
        return len(run.work.groups) if _stage(run) else run.work.layers

    def in_backward(self, run: PlannedRun) -> tuple[int, int]:
        if _stage(run) == 0:
            return super().in_backward(run)
        count, shard, size = run.work.parameters, run.shard, run.weight_bytes
        earlier = run.accumulation > 1  # micro-batches of this pass, whose gradients wait
        bucket = _setting(run, "reduce_bucket_size")
        if _stage(run) == 3:  # the layers, gathered; gradients' newest shards, and two copies
            return 4 * shard, size * (bucket + count + _large(run) + 2 * min(bucket, count))
        buckets = size * bucket * (2 if self.hides(run) else 1)
        if _stage(run) == 2:
            return 4 * shard if earlier else 0, buckets
        if run.sixteen:
            return _buffers(run), 0
        return 4 * count if earlier else 0, buckets

    def groups(self, run: PlannedRun) -> int:
        """At stages 0 and 1 a copy of the weights that forward uses and whole sums, in place of
        shards; then as `in_step` has it."""
        groups = run.groups
        if groups is None or (_stage(run) == 3 and groups.rounds > 1):
            return 0 if groups is None else 4 * run.shard
        if _stage(run) > 1:
            return super().groups(run)
        sums = 1 + (groups.rounds > 1)  # of g, and of g_s
        held = (run.weight_bytes + 4 * sums) * run.work.parameters - 8 * run.shard
        counted = run.accumulation > 1 and groups.micro_batches == 1
        return held - (4 * run.work.parameters if counted else 0)

    def in_step(self, run: PlannedRun) -> int:
        """With groups at stages 0 and 1: both whole sums, and a copy of one that is sent."""
        usual = self._in_step(run)
        if run.groups is None or _stage(run) > 1:
            return usual
        sums = 12 * run.work.parameters - 8 * run.shard
        return max(usual, sums - 4 * run.shard * (run.base.temporaries - 1))

    def publishes(self, run: PlannedRun) -> int:
        """At stages 0 and 1 new weights alone; at 2 and 3 w + eps of each group, and w after it."""
        assert run.groups is not None
        return 1 if _stage(run) < 2 else 2 * run.groups.rounds

    def _in_step(self, run: PlannedRun) -> int:
        count, shard, size = run.work.parameters, run.shard, run.weight_bytes
        if _stage(run) == 0:
            return 4 * count
        if _stage(run) == 3:
            whole = sum(_persistent(run)) + _large(run) + shard
            return 4 * shard + size * (_setting(run, "reduce_bucket_size") + whole)
        if run.sixteen and _stage(run) == 1:
            return _buffers(run)
        return 8 * shard  # averaged, and once more flattened

    def norms(self, run: PlannedRun, look: bool) -> int:
        """Those of the rule and of the base, as with FSDP2; in fp16 also DeepSpeed's overflow and
        norm, in each pass."""
        if _stage(run) == 0:
            return 0
        own = 1 + run.base.trusted + (2 + run.sixteen if look else 0)
        return own + (2 * (1 + look) if run.settings.precision == "fp16" else 0)

    def sent(self, run: PlannedRun) -> dict[str, Any]:
        if _stage(run) == 0:
            bucket = _setting(run, "allgather_bucket_size")
            return {"gradients": _cut("all_reduce", run.work.parameters, bucket)}
        return _shards(run) if _stage(run) == 3 else _partitions(run)

    def hides(self, run: PlannedRun) -> bool:
        """By default DeepSpeed overlaps gradients with backward at stage 3 only."""
        asked = _setting(run, "overlap_comm")
        return _stage(run) == 3 if asked is None else bool(asked)


def _stage(run: PlannedRun) -> int:
    assert run.settings.zero_stage is not None
    return run.settings.zero_stage


def _buffers(run: PlannedRun) -> int:
    """Bytes of gradients in both precisions that DeepSpeed's BF16_Optimizer always holds."""
    sharded = run.sixteen and _stage(run) == 1
    return (4 + run.weight_bytes) * run.work.parameters if sharded else 0


def _setting(run: PlannedRun, name: str) -> Any:
    """A setting of DeepSpeed's section zero_optimization, or its default."""
    file = config.read(run.settings.deepspeed_config).get("zero_optimization", {})
    value = file.get(name, file.get(name.removeprefix("stage3_"), _DEFAULTS.get(name)))
    return int(value) if name in _DEFAULTS and value is not None else value


def _persistent(run: PlannedRun) -> tuple[int, ...]:
    """Sizes of stage 3's layers that are too small to be freed after use."""
    limit = _setting(run, "stage3_param_persistence_threshold")
    return tuple(size for size in run.work.order if size <= limit)


def _large(run: PlannedRun) -> int:
    """Entries of this rank's part of stage 3's layers that are freed after use."""
    return run.shard - sum(_persistent(run)) // run.ranks.total


def _cut(kind: str, elements: int, bucket: int, size: int = 4) -> tuple[Call, ...]:
    """As many equal calls as it takes for none to exceed a bucket."""
    times = max(1, -(-elements // bucket))
    return (Call(kind=kind, elements=-(-elements // times), size=size, times=times),)


def _partitions(run: PlannedRun) -> dict[str, Any]:
    ranks, size = run.ranks.total, run.weight_bytes
    groups = [-(-sum(group) // ranks) for group in run.work.groups]
    bucket = _setting(run, "reduce_bucket_size")
    return {
        "gradients": _cut("all_reduce", run.work.parameters, bucket, size),
        "reduces": run.accumulation if _stage(run) == 2 else 1,
        "publish": tuple(Call(kind="all_gather", elements=n, size=size) for n in groups),
    }


def _shards(run: PlannedRun) -> dict[str, Any]:
    ranks, size = run.ranks.total, run.weight_bytes
    persistent, every = _persistent(run), run.shard
    small = sum(-(-layer // ranks) for layer in persistent)
    large = every - small
    gathers: tuple[Call, ...] = ()
    if large:  # the setting counts whole layers
        together = max(1, _setting(run, "stage3_prefetch_bucket_size") // ranks)
        gathers = _cut("all_gather", large, together, size)
    bucket = _setting(run, "reduce_bucket_size")
    return {
        "gathers": gathers,
        "gradients": _cut("reduce_scatter", every * ranks, bucket, size),
        "reduces": run.accumulation,
        "publish": tuple(
            Call(kind="all_gather", elements=-(-layer // ranks), size=size) for layer in persistent
        ),
    }


ROW = Zero()
