"""Bytes that one rank holds at once: between steps, in a backward, and in the optimizer's step.

The rows between steps are those of `Backend.memory()`. Tests compare all rows with it and with the
allocations of real runs.
"""

from dataclasses import asdict, dataclass

from .run import PlannedRun


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    weights, masters, ema, base_state, g_v  between steps, as `Backend.memory()` names them.
    look         w0 and g of a look; w0 of a step that perturbs along the momentum.
    groups       further sums of gradients that a look of several groups of m samples keeps.
    gradients    at the time of most activations: those of earlier micro-batches, and permanent
                 buffers of a backend. The others come as activations are freed.
    buckets      buffers of communication.
    activations  of a micro-batch's forward and backward, at their most.
    look_activations  the same of the parts that a look takes, where m is below micro_batch; else 0.
    step         needed by the optimizer's step, without activations, with all gradients.
    """

    weights: int
    masters: int
    ema: int
    base_state: int
    g_v: int
    look: int
    groups: int
    gradients: int
    buckets: int
    activations: int
    look_activations: int
    step: int

    @property
    def resident(self) -> int:
        """Between steps."""
        return self.weights + self.masters + self.ema + self.base_state + self.g_v

    @property
    def peak(self) -> int:
        """The most at once."""
        backward = self.gradients + self.buckets
        of_look = self.groups + backward + (self.look_activations or self.activations)
        between = backward + self.activations
        return self.resident + max(between, self.look + max(of_look, self.step))

    def to_dict(self) -> dict[str, int]:
        """All rows and the peak."""
        return {**asdict(self), "peak": self.peak}


def memory(run: PlannedRun) -> Memory:
    """The memory of one rank of the run."""
    layout, shard, base = run.layout, run.shard, run.base
    gradients, buckets = layout.in_backward(run)
    return Memory(
        weights=layout.weights(run),
        masters=layout.masters(run),
        ema=4 * shard if run.settings.ema else 0,
        base_state=4 * shard * base.state + layout.counters(run) * base.counter_bytes,
        g_v=4 * shard if run.row.reuses_gv else 0,
        look=(8 if run.row.two_passes else 4 if run.row.along_momentum else 0) * shard,
        groups=layout.groups(run),
        gradients=gradients,
        buckets=buckets,
        activations=_activations(run, run.work.parameters, run.micro_batch),
        look_activations=_of_part(run),
        # w0 of the look is put back before the base steps.
        step=4 * shard * (base.temporaries - bool(run.row.ascent)) + layout.in_step(run),
    )


def _of_part(run: PlannedRun) -> int:
    groups = run.groups
    if groups is None or groups.parts == 1:
        return 0
    return _activations(run, run.work.parameters, run.micro_batch // groups.parts)


def _activations(run: PlannedRun, count: int, images: int) -> int:
    arithmetic = 2 if run.sixteen else 4
    autocast = run.layout.autocast(run)
    residual = 4 if autocast else arithmetic
    size = run.work.activations(
        images,
        arithmetic=arithmetic,
        residual=residual,
        checkpointed=run.settings.checkpoint_activations,
    )
    return size + (2 * count if autocast else 0)  # autocast stores the weights it has cast
