"""How long a step takes: passes, the communication that does not hide under them, the update."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from .machines import Device, Machine
from .network import Call, seconds
from .run import PlannedRun
from .sent import Sent, sent
from .workload import BYTES

# Tensors of a shard's size that are read or written, 4 bytes an entry, in addition to those of the
# base's update: counted in the kernels of kernels/code.py (tests/gpu/test_kernel_counts.py).
_REUSE = 3  # sums of g and g_v; g_v in the base's step
_AHEAD = 9  # sums of v and of g; a copy of w; eps; w back
_LOOK = 15  # sums of w, g; copies of both; eps; w back; sums of g, g_s; g, g_v in the base's step

# Kernels that the host launches in a forward and backward for each layer, by compile: vit_b16's 151
# had 2,000 in two passes (docs/planning.md); a compiled block has fewer (docs/gpu).
KERNELS = {"off": 6.5, "blocks": 5}
# How often a pass reads or writes each byte that autograd keeps (docs/gpu: H200, ViT-B and ViT-S).
TRAFFIC = {"off": 8.5, "blocks": 4.2}


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of a step. Communication that hides under computing is not in `exposed`."""

    compute: float
    communication: float
    exposed: float
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.update

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}

    @classmethod
    def mixed(cls, parts: "Sequence[tuple[float, Time]]") -> "Time":
        """The average of steps, each with its share of them."""
        names = [f.name for f in fields(cls)]
        return cls(**{n: sum(x * getattr(time, n) for x, time in parts) for n in names})


def step_time(run: PlannedRun, machine: Machine, *, kind: str) -> Time:
    """The time of a "base" step of the base optimizer alone, a "reuse" step, or a "look"."""
    device, s = machine.device, sent(run, look=kind == "look")
    one = max(pass_time(run, device), host_time(run, device))
    forward = one / 3
    whole, shown = _pass(run, s, machine, forward, one - forward)
    # One more small all-reduce: the ranks of train.py agree whether to stop.
    usual = _REUSE if run.row.reuses_gv else _AHEAD if run.row.along_momentum else 1
    extra = {"base": 0, "reuse": usual, "look": _LOOK}[kind]
    moved = 4 * run.shard * (run.base.traffic + extra)
    few = (s.small + 1) * seconds(_FEW, run.ranks, machine.network)
    few += sum(seconds(call, run.ranks, machine.network) for call in s.summed)
    return Time(
        compute=s.passes * s.accumulation * one,
        communication=s.passes * whole + few,
        exposed=s.passes * shown + few,
        update=moved / device.memory_bandwidth,
    )


def pass_time(run: PlannedRun, device: Device) -> float:
    """Seconds that the device computes for a forward and backward of one micro-batch; with
    checkpointed activations a second forward is part of backward."""
    s, forwards = run.settings, 4 if run.settings.checkpoint_activations else 3
    flops = forwards * run.work.flops * run.micro_batch
    seconds = device.pass_seconds + flops / device.flops[s.precision]
    if device.activation_bandwidth:
        once = run.work.activations(run.micro_batch, arithmetic=BYTES[s.precision], residual=4)
        seconds += forwards / 3 * TRAFFIC[s.compile] * once / device.activation_bandwidth
    return seconds


def host_time(run: PlannedRun, device: Device) -> float:
    """Seconds that the host takes to launch its kernels: a lower limit of a pass."""
    return KERNELS[run.settings.compile] * run.work.layers * device.launch_seconds


_FEW = Call(kind="all_reduce", elements=8, size=8)


def _pass(
    run: PlannedRun, s: Sent, machine: Machine, forward: float, backward: float
) -> tuple[float, float]:
    """(all, exposed) seconds of communication of one pass over all micro-batches, and publish."""

    def each(calls: Sequence[Call]) -> list[float]:
        return [
            seconds(call, run.ranks, machine.network) / call.times
            for call in calls
            for _ in range(call.times)
        ]

    gathers, gradients = each(s.gathers), each(s.gradients)
    publish = s.publishes / s.passes * sum(each(s.publish))
    again = each(s.again)
    reduces = s.reduces / s.passes
    whole = s.accumulation * sum(gathers + again) + reduces * sum(gradients) + publish
    if not run.layout.hides(run) or (run.layout.needs_streams and not machine.device.streams):
        return whole, whole
    fetched = 0.0
    if gathers:  # the first at once, the others while forward computes
        fetched = gathers[0] + max(0.0, sum(gathers[1:]) - forward)
    sizes = [call.elements for call in s.gradients for _ in range(call.times)]
    late = behind(gradients, sizes, max(0.0, backward - sum(again)))  # one network for both
    late += max(0.0, sum(again) - backward)
    return whole, s.accumulation * fetched + reduces * late + publish


def behind(seconds_each: Sequence[float], sizes: Sequence[int], backward: float) -> float:
    """How long after a backward's end its last bucket has arrived.

    Buckets fill in the order of backward, whose time goes with the layers' sizes, and are sent one
    after another.
    """
    done = at = 0.0
    for took, size in zip(seconds_each, sizes, strict=True):
        at += backward * size / sum(sizes)
        done = max(done, at) + took
    return max(0.0, done - backward)
