"""Measure the step time of every optimizer, as a multiple of its base optimizer's.

Words: the *base* is a loop of forward, backward and the base optimizer's own step, without this
package's engine; with --backend it is the base's step on the same backend. A *cycle* is k steps, so
that looks are averaged in. Every optimizer has its own copy of the model. Their cycles are run in
turn, and a ratio is taken between cycles of the same turn, so that other load on the machine
affects all alike. On a CPU the ratio of processor time is reported as well: other load hardly
changes it.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from .. import files
from ..backends.compiled import COMPILES
from ..backends.rows import BACKENDS
from ..cli.arguments import Parser
from ..cli.table import text as table_text
from ..errors import ConfigError
from ..optim import table
from ..plan.machines import dense_peak
from ..settings import assemble, config
from ..settings.config import Settings
from ..settings.numbers import check_range
from ..world import World
from .loops import PEERS, Counted, CycleTime, Loop, Problem

__all__ = ["PEERS", "Cost", "Counted", "CycleTime", "Loop", "Problem", "compare", "main", "to_text"]

ALONE = "plain"  # the backend without ranks


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One row. Ratios are to the base's step time: median, lower and upper quartile of the turns.

    passes_per_step: counted backward calls over steps and micro-batches.
    cpu_ratio: the median of the same ratio in processor time of all threads; None on a GPU.
    host_ms: milliseconds a step until the host has asked for all of it; as long as the step where
        the GPU waits for the host.
    launches: kernels that the host launches a step, in the mean over a cycle; None on a CPU.
    mfu: share of the card's dense peak that all passes reach; None on a CPU or an unknown card.
    """

    optimizer: str
    base: str
    passes_per_step: float
    ms_per_step: float
    ratio: float
    ratio_low: float
    ratio_high: float
    cpu_ratio: float | None
    images_per_s: float
    host_ms: float
    launches: float | None
    mfu: float | None


def compare(problem: Problem, names: Sequence[str], *, repeats: int) -> list[Cost]:
    """Time `names` and their bases in turn, `repeats` cycles each, after one warm-up cycle."""
    loops = [problem.peer(n) if n in PEERS else problem.ours(n) for n in names]
    bases = {base: problem.bare(base) for base in dict.fromkeys(r.base for r in loops)}
    every = [*bases.values(), *loops]
    for loop in every:
        loop.cycle(problem.k, problem.device)
        loop.counted.backwards = 0
    times: list[list[CycleTime]] = [[] for _ in every]
    for turn in range(repeats):
        for i in range(len(every)):
            j = (i + turn) % len(every)  # so that no loop always follows the same one
            times[j].append(every[j].cycle(problem.k, problem.device))
    base_times = dict(zip(bases, times, strict=False))
    return [
        _cost(loop, own, base_times[loop.base], problem)
        for loop, own in zip(loops, times[len(bases) :], strict=True)
    ]


def _cost(loop: Loop, own: list[CycleTime], base: list[CycleTime], problem: Problem) -> Cost:
    ratios = [a.seconds / b.seconds for a, b in zip(own, base, strict=True)]
    cpu_ratios = [a.cpu_seconds / b.cpu_seconds for a, b in zip(own, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    passes = loop.counted.backwards / (len(problem.batches) * problem.k * len(own))
    seconds = statistics.median(t.seconds for t in own)
    on_cpu = problem.device.type == "cpu"
    images = problem.ranks * sum(len(y) for _, y in problem.batches)
    name = "" if on_cpu else torch.cuda.get_device_name(problem.device)
    peak = dense_peak(name, problem.precision)
    return Cost(
        optimizer=loop.name,
        base=loop.base,
        passes_per_step=round(passes, 4),
        ms_per_step=round(1e3 * seconds, 3),
        ratio=round(statistics.median(ratios), 4),
        ratio_low=round(low, 4),
        ratio_high=round(high, 4),
        cpu_ratio=round(statistics.median(cpu_ratios), 4) if on_cpu else None,
        images_per_s=round(images / seconds, 2),
        host_ms=round(1e3 * statistics.median(t.host_seconds for t in own), 3),
        launches=None if on_cpu else launches(loop, problem),
        mfu=round(passes * problem.flops() / seconds / peak, 4) if peak else None,
    )


def launches(loop: Loop, problem: Problem) -> float:
    """Kernels that the host launches a step, over one cycle under torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        loop.cycle(problem.k, problem.device)
    names = (event.name() for event in profiler.profiler.kineto_results.events())
    return sum("LaunchKernel" in name for name in names) / problem.k


def to_text(costs: Sequence[Cost]) -> str:
    """The rows as a table."""
    rows = [
        (
            c.optimizer, c.base, f"{c.passes_per_step:.2f}", f"{c.ms_per_step:.1f}",
            f"{c.ratio:.3f} ({c.ratio_low:.3f}-{c.ratio_high:.3f})",
            "-" if c.cpu_ratio is None else f"{c.cpu_ratio:.3f}", f"{c.images_per_s:,.0f}",
            "-" if c.mfu is None else f"{c.mfu:.1%}", f"{c.host_ms:.1f}",
            "-" if c.launches is None else f"{c.launches:,.0f}",
        )
        for c in costs
    ]  # fmt: skip
    heads = ["optimizer", "base", "passes", "ms/step", "ratio to base (quartiles)", "of cpu time"]
    heads += ["images/s", "MFU", "host ms", "launches"]
    return table_text(heads, rows, left=2)


def _left_out(device: str) -> list[str]:
    """A line for each library whose peers cannot run, which says why."""
    reasons = {name: peer.why_not(device) for name, peer in PEERS.items()}
    return [
        f"left out: {', '.join(n for n in reasons if reasons[n] == reason)} ({reason})"
        for reason in dict.fromkeys(filter(None, reasons.values()))
    ]


def _names(text: str, backend: str, device: str) -> list[str]:
    if text == "all":
        able = [name for name, peer in PEERS.items() if peer.why_not(device) is None]
        return [*table.METHODS, *(able if backend == ALONE else [])]
    names = [n.strip() for n in text.split(",") if n.strip()]
    for name in names:
        if name not in PEERS:
            table.method(name)
        elif backend != ALONE:
            raise ConfigError(f"{name} needs backend {ALONE}, got {backend}; leave it out.")
    if not names:
        raise ConfigError("optimizers must name at least one, got none; leave it out for all.")
    return names


def _parser() -> Parser:
    parser = Parser(prog="dist-looksam bench", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="vit_28", help="network, as in train.py; default vit_28")
    add("--batch_size", type=int, default=128, help="samples per step; default 128")
    add("--micro_batch", type=int, help="samples per rank and forward; default: batch_size / ranks")
    add("--m", type=int, help="samples that climb together; default: batch_size")
    add("--k", type=int, default=5, help="steps from one look to the next; default 5")
    add("--repeats", type=int, default=15, help="measured cycles of k steps; default 15")
    add(
        "--optimizers", default="all", help="comma-separated; default all; also " + ", ".join(PEERS)
    )
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    compiled = "compile the forward of the network's blocks: off or blocks; default off"
    add("--compile", choices=COMPILES, default="off", help=compiled)
    of_engine = f"backend of the engine, on one rank or under a launcher; default {ALONE}"
    add("--backend", choices=BACKENDS, default=ALONE, help=of_engine)
    add("--zero_stage", type=int, help="of backends zero and horovod, as in train.py")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"cuda or cpu; default {device}")
    add("--out", help="directory for bench.json; default: none is written")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the table, write bench.json. Raises ConfigError."""
    flags = _parser().parse_args(argv)
    for name, most in (
        ("batch_size", 10**7),
        ("micro_batch", 10**7),
        ("k", 10**4),
        ("m", 10**7),
        ("repeats", 10**5),
    ):
        check_range(name, getattr(flags, name), 1, most)
    _check_device(flags.device)
    names = _names(flags.optimizers, flags.backend, flags.device)
    world = World.from_env()
    flags.micro_batch = flags.micro_batch or max(1, flags.batch_size // world.size)
    how = _on_backend(flags, world)
    problem = Problem(
        model=flags.model,
        batch_size=flags.batch_size,
        micro_batch=flags.micro_batch,
        k=flags.k,
        precision=flags.precision,
        device=str(how.pop("device", flags.device)),
        compiled=flags.compile,
        m=flags.m,
        **how,
    )
    costs = compare(problem, names, repeats=flags.repeats)
    if world.rank == 0:
        print(to_text(costs))
        asked = flags.optimizers == "all" and flags.backend == ALONE
        for line in _left_out(flags.device) if asked else ():
            print(line, file=sys.stderr)
        if flags.out:
            _write(Path(flags.out), vars(flags), costs)
    if how and dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _on_backend(flags: Any, world: World) -> dict[str, Any]:
    """Arguments of `Problem` on a backend, whose ranks it connects; none for `ALONE`."""
    if flags.backend == ALONE:
        if flags.zero_stage is not None or world.size > 1:
            got = f"{world.size} ranks" if world.size > 1 else f"zero_stage {flags.zero_stage}"
            raise ConfigError(f"backend {ALONE} is of one rank, got {got}; use another --backend.")
        return {}
    base = ["--data", "folder", "--data_dir", "(none)", "--backend", flags.backend]
    for name in ("model", "batch_size", "micro_batch", "precision", "compile", "zero_stage"):
        if getattr(flags, name) is not None:
            base += [f"--{name}", str(getattr(flags, name))]
    base += ["--device", flags.device.split(":")[0]]

    def of_method(name: str) -> Settings:
        row, own = table.method(name), ["--optimizer", name]
        own += ["--k", str(flags.k)] if row.settable_k else []
        own += ["--m", str(flags.m)] if flags.m is not None and row.ascent is not None else []
        settings = config.parse([*base, *own])
        return settings.resolved(ranks=world.size, launcher=world.launcher, samples=10**7)

    first = of_method(table.base_of(_names(flags.optimizers, flags.backend, flags.device)[0], None))
    device = assemble.device_of(first, world)
    assemble.join(first, world, device)
    return {"backend": of_method, "world": world, "device": device}


def _check_device(name: str) -> None:
    """ConfigError unless it is the CPU or a CUDA device of this machine."""
    count = torch.cuda.device_count()
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{n}" for n in range(count))]
    if name not in known:
        raise ConfigError(f"device must be one of {', '.join(known)} on this machine, got {name}.")


def _write(out: Path, flags: dict[str, Any], costs: Sequence[Cost]) -> None:
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    content = {"flags": flags, **machine, "costs": [asdict(c) for c in costs]}
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.replace_json(out / "bench.json", content)
    except OSError as error:
        raise ConfigError(
            f"out must be a directory that can be written, got {out} ({error.strerror})."
        ) from None
    print(f"written: {out / 'bench.json'}")
