"""Bytes that one rank holds at once: between steps, in a backward, and in the optimizer's step.

The rows of the first kind are those of `Backend.memory()`; tests hold all of them against it and
against what is allocated in real runs.
"""

from dataclasses import asdict, dataclass

from .run import Run


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    weights, masters, base_state, g_v  between steps, as `Backend.memory()` names them.
    look         w0 and g, and the new g_v where it needs its own place; only while a look lasts.
    gradients    held while activations are at their most: those of earlier micro-batches, and what
                 a backend keeps all the time. The others come as activations go.
    buckets      what communication keeps beside them.
    activations  of a micro-batch's forward and backward, at their most.
    step         what the optimizer's step needs when activations are gone, all gradients included.
    """

    weights: int
    masters: int
    base_state: int
    g_v: int
    look: int
    gradients: int
    buckets: int
    activations: int
    step: int

    @property
    def resident(self) -> int:
        """Between steps."""
        return self.weights + self.masters + self.base_state + self.g_v

    @property
    def peak(self) -> int:
        """The most at once."""
        backward = self.gradients + self.buckets + self.activations
        return self.resident + self.look + max(backward, self.step)

    def to_dict(self) -> dict[str, int]:
        """All rows and the peak."""
        return {**asdict(self), "peak": self.peak}


def memory(run: Run) -> Memory:
    """Of one rank of the run."""
    layout, shard, base = run.layout, run.shard, run.base
    gradients, buckets = layout.in_backward(run)
    return Memory(
        weights=layout.weights(run),
        masters=layout.masters(run),
        base_state=4 * shard * base.state + layout.counters(run) * base.counter_bytes,
        g_v=4 * shard if run.row.reuses_gv else 0,
        look=8 * shard if run.row.ascent else 0,
        gradients=gradients,
        buckets=buckets,
        activations=_activations(run, run.work.parameters),
        step=4 * shard * base.temporaries + layout.in_step(run),
    )


def _activations(run: Run, count: int) -> int:
    arithmetic = 2 if run.sixteen else 4
    autocast = run.layout.autocast(run)
    residual = 4 if autocast else arithmetic
    found = run.work.activations(run.micro_batch, arithmetic=arithmetic, residual=residual)
<<<<<<< HEAD
    return found + (2 * count if autocast else 0)  # autocast keeps the weights it has cast
=======
    return found + (2 * count if run.autocast else 0)  # autocast keeps the weights it has cast


def _in_backward(run: Run) -> tuple[int, int]:
    """Bytes of (gradients, buckets) beside activations at their most."""
    count, shard, size = run.work.parameters, run.shard, run.weight_bytes
    earlier = run.accumulation > 1  # micro-batches of this pass, whose gradients wait
    if run.settings.backend == "ddp":  # the buckets are the gradients, but not of the earlier ones
        return 4 * count, 4 * count if earlier else 0
    if run.fsdp:
        return 4 * shard if earlier else 0, _gathered(run)
    if run.stage in (None, 0):
        return 4 * count if earlier else 0, 0
    bucket = run.zero("reduce_bucket_size")
    if run.stage == 3:  # the layers, gathered; gradients' newest shards, and two copies on the way
        return 4 * shard, size * (bucket + count + _large(run) + 2 * min(bucket, count))
    buckets = size * bucket * (2 if run.overlaps else 1)
    if run.stage == 2:
        return 4 * shard if earlier else 0, buckets
    if run.sixteen:  # DeepSpeed's BF16_Optimizer: in both precisions, all the time
        return (4 + size) * count, 0
    return 4 * count if earlier else 0, buckets


def _in_step(run: Run) -> int:
    """Gradients as the optimizer gets them, what it makes of them, and what waits beside."""
    count, shard, size = run.work.parameters, run.shard, run.weight_bytes
    update = 4 * shard * _UPDATES[run.base]
    if run.row.ascent:
        update -= 4 * shard  # w0 of the look, which is put back before the base steps
    if run.stage in (None, 0):
        return update + 4 * (shard if run.fsdp else count)
    if run.stage == 3:
        kept = run.zero("reduce_bucket_size") + sum(run.persistent) + _large(run) + shard
        return update + 4 * shard + size * kept
    if run.sixteen and run.stage == 1:
        return update + (4 + size) * count
    return update + 8 * shard  # averaged, and flat again


def _large(run: Run) -> int:
    """Entries of this rank's part of stage 3's layers that are given away after use."""
    return run.shard - sum(run.persistent) // run.ranks.total


def _gathered(run: Run) -> int:
    """FSDP2's units while the last block's backward runs, when activations are at their most: the
    rest and that block, gathered, with their gradients; the one before it, twice while it comes."""
    ranks, size = run.ranks.total, run.weight_bytes
    *blocks, rest = (ranks * n for n in run.units)
    block = max(blocks, default=0)
    before = block if len(blocks) > 1 else 0
    return size * (rest + 2 * block + 2 * before)
>>>>>>> core
