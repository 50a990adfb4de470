"""Measure the step time of every optimizer, as a multiple of its base optimizer's.

Words: the *base* is a loop of forward, backward and the base optimizer's own step, without this
package's engine. A *cycle* is k steps, so that looks are averaged in. Every optimizer has its own
copy of the model. Their cycles are run in turn, and a ratio is taken between cycles of the same
turn, so that other load on the machine affects all alike. On a CPU the ratio of processor time is
reported as well: other load hardly changes it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import files, models
from ..backends.plain import PRECISION_DTYPES
from ..cli.arguments import Parser
from ..cli.table import text as table_text
from ..engine import Engine
from ..errors import ConfigError
from ..optim import table

_IMAGE = {"vit_28": (1, 28, 28), "vit_28_p4": (1, 28, 28), "vit_8": (1, 8, 8)}
_CLASSES = 10
_PEER = "pytorch_optimizer"
PEERS = {f"{_PEER}.SAM": "SAM", f"{_PEER}.LookSAM": "LookSAM"}
_PEER_BASE = "adamw"
Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One row. Ratios are to the base's step time: median, lower and upper quartile of the turns.

    passes_per_step: counted backward calls over steps and micro-batches.
    cpu_ratio: the median of the same ratio in processor time of all threads; None on a GPU.
    """

    optimizer: str
    base: str
    passes_per_step: float
    ms_per_step: float
    ratio: float
    ratio_low: float
    ratio_high: float
    cpu_ratio: float | None


class Counted:
    """The loss of one micro-batch, which counts the backward calls."""

    def __init__(self) -> None:
        self.backwards = 0

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.register_hook(self._count)
        return loss

    def _count(self, _: Tensor) -> None:
        self.backwards += 1


@dataclass(frozen=True, kw_only=True)
class CycleTime:
    """Seconds a step over one cycle, on the clock and of processor time."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A training loop on fixed micro-batches."""

    name: str
    base: str
    step: Callable[[], Any]
    counted: Counted

    def cycle(self, steps: int, device: torch.device) -> CycleTime:
        """Seconds a step, over `steps` steps."""
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cpu = time.process_time() - cpu_began
        return CycleTime(seconds=(time.perf_counter() - began) / steps, cpu_seconds=cpu / steps)


class Problem:
    """Makes loops with the same initial weights and the same micro-batches."""

    def __init__(
        self, *, model: str, batch_size: int, micro_batch: int, k: int, precision: str, device: str
    ) -> None:
        if micro_batch < 1 or batch_size < 1 or batch_size % micro_batch:
            raise ConfigError(
                f"batch_size must be micro_batch {micro_batch} x a whole number, got {batch_size}."
            )
        self.model, self.k, self.precision = model, k, precision
        self.device = torch.device(device)
        self.shape = _IMAGE.get(model, (3, 224, 224))
        torch.manual_seed(0)
        self.batches: Pairs = []
        for _ in range(batch_size // micro_batch):
            images = torch.randn(micro_batch, *self.shape, device=self.device)
            labels = torch.randint(_CLASSES, (micro_batch,), device=self.device)
            self.batches.append((images, labels))

    def _new(self, base: str, **how: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = models.create(self.model, num_classes=_CLASSES, image_shape=self.shape)
        model.to(self.device)
        row = table.base_row(base)
        groups = table.groups(model, row.weight_decay)
        return model, table.build_base(base, groups, lr=row.lr, **how)

    def _pass(self, model: nn.Module, loss: Counted) -> Tensor:
        """Forward and backward of all micro-batches, for loops without the engine."""
        dtype = PRECISION_DTYPES[self.precision]
        total = torch.zeros((), device=self.device)
        for batch in self.batches:
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                value = loss(model, batch)
            (value / len(self.batches)).backward()
            total += value.detach()
        return total / len(self.batches)

    def bare(self, base: str) -> Loop:
        """The base optimizer without the engine."""
        model, optimizer = self._new(base)
        loss = Counted()

        def step() -> None:
            optimizer.zero_grad()
            self._pass(model, loss)
            optimizer.step()

        return Loop(name=base, base=base, step=step, counted=loss)

    def ours(self, name: str) -> Loop:
        """A method of the table, in the engine."""
        base = table.base_of(name, None)
        model, inner = self._new(base)
        rule, row = table.rule_of(name, k=self.k), table.method(name)
        optimizer = table.build(inner, rule=rule, rho=row.default_rho, alpha=row.default_alpha)
        loss = Counted()
        engine = Engine(model, optimizer, loss, precision=self.precision)
        return Loop(name=name, base=base, step=lambda: engine.step(self.batches), counted=loss)

    def peer(self, name: str) -> Loop:
        """An optimizer of pytorch_optimizer, used as its documentation shows."""
        try:
            import pytorch_optimizer
        except ImportError:
            reason = f"{name} needs {_PEER}, which is not installed; leave it out."
            raise ConfigError(reason) from None
        model, _ = self._new(_PEER_BASE)
        row = table.base_row(_PEER_BASE)
        groups = table.groups(model, row.weight_decay)
        settings: dict[str, Any] = {"lr": row.lr, "fused": True}
        if PEERS[name] == "LookSAM":
            settings |= {"k": self.k, "alpha": 0.7}
        kind = getattr(pytorch_optimizer, PEERS[name])
        optimizer = kind(groups, torch.optim.AdamW, rho=table.RHO["model"], **settings)
        loss = Counted()

        def closure() -> Tensor:
            optimizer.zero_grad()
            return self._pass(model, loss)

        def step() -> None:
            closure()
            optimizer.step(closure)

        return Loop(name=name, base=_PEER_BASE, step=step, counted=loss)


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
    micro = len(problem.batches) * problem.k * repeats
    on_cpu = problem.device.type == "cpu"
    return [
        _cost(loop, own, base_times[loop.base], micro, on_cpu)
        for loop, own in zip(loops, times[len(bases) :], strict=True)
    ]


def _cost(
    loop: Loop, own: list[CycleTime], base: list[CycleTime], micro: int, on_cpu: bool
) -> Cost:
    ratios = [a.seconds / b.seconds for a, b in zip(own, base, strict=True)]
    cpu_ratios = [a.cpu_seconds / b.cpu_seconds for a, b in zip(own, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Cost(
        optimizer=loop.name,
        base=loop.base,
        passes_per_step=round(loop.counted.backwards / micro, 4),
        ms_per_step=round(1e3 * statistics.median(t.seconds for t in own), 3),
        ratio=round(statistics.median(ratios), 4),
        ratio_low=round(low, 4),
        ratio_high=round(high, 4),
        cpu_ratio=round(statistics.median(cpu_ratios), 4) if on_cpu else None,
    )


def to_text(costs: Sequence[Cost]) -> str:
    """The rows as a table."""
    rows = [
        (
            c.optimizer, c.base, f"{c.passes_per_step:.2f}", f"{c.ms_per_step:.1f}",
            f"{c.ratio:.3f} ({c.ratio_low:.3f}-{c.ratio_high:.3f})",
            "-" if c.cpu_ratio is None else f"{c.cpu_ratio:.3f}",
        )
        for c in costs
    ]  # fmt: skip
    heads = ("optimizer", "base", "passes", "ms/step", "ratio to base (quartiles)", "of cpu time")
    return table_text(heads, rows, left=2)


def _installed_peers() -> list[str]:
    import importlib.util

    return list(PEERS) if importlib.util.find_spec(_PEER) else []


def _names(text: str) -> list[str]:
    if text == "all":
        return [*table.METHODS, *_installed_peers()]
    names = [n.strip() for n in text.split(",") if n.strip()]
    for name in names:
        if name not in PEERS:
            table.method(name)
    if not names:
        raise ConfigError("optimizers must name at least one, got none; leave it out for all.")
    return names


def _parser() -> Parser:
    parser = Parser(prog="dist-looksam bench", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="vit_28", help="network, as in train.py; default vit_28")
    add("--batch_size", type=int, default=128, help="samples per step; default 128")
    add("--micro_batch", type=int, help="samples per forward; default: batch_size")
    add("--k", type=int, default=5, help="steps from one look to the next; default 5")
    add("--repeats", type=int, default=15, help="measured cycles of k steps; default 15")
    add(
        "--optimizers", default="all", help="comma-separated; default all; also " + ", ".join(PEERS)
    )
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"cuda or cpu; default {device}")
    add("--out", help="directory for bench.json; default: none is written")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the table, write bench.json. Raises ConfigError."""
    flags = _parser().parse_args(argv)
    if flags.repeats < 1 or flags.k < 1:
        raise ConfigError(f"repeats and k must be >= 1, got {flags.repeats} and {flags.k}.")
    names = _names(flags.optimizers)
    problem = Problem(
        model=flags.model,
        batch_size=flags.batch_size,
        micro_batch=flags.micro_batch or flags.batch_size,
        k=flags.k,
        precision=flags.precision,
        device=flags.device,
    )
    costs = compare(problem, names, repeats=flags.repeats)
    print(to_text(costs))
    if flags.out:
        _write(Path(flags.out), vars(flags), costs)
    return 0


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
