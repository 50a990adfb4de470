"""`dist-looksam flatness RUN...`: how flat the minimum is that a run has found, measured.

Runs as one process or under the launchers of train.py; samples are split over the ranks. Every
rank holds the whole model.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import files
from ..backends.ranks import gather
from ..cli.arguments import Parser
from ..cli.table import text as table_text
from ..data import Data
from ..errors import ConfigError, RunError
from ..flatness.groups import FORMAT, caption, grouped, table, unlike
from ..flatness.measures import Measurement, Wanted
from ..flatness.objective import Objective, Part, part
from ..flatness.trained import Trained, open_
from ..record import rundir
from ..record.progress import Progress
from ..record.version import made_with
from ..settings import assemble
from ..settings.config import Settings
from ..settings.fields import DEVICES
from ..world import World
from ..world.roster import joined

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
_PICTURE = "flatness.png"
_COUNTS = {  # flag: default, least, help
    "samples": (2048, 1, "training images, drawn the same for every run; a multiple of m is used"),
    "test_samples": (10_000, 1, "evaluation images at most"),
    "m": (64, 1, "images of a group that climbs alone"),
    "eigenvalues": (3, 1, "largest eigenvalues to find"),
    "iterations": (40, 1, "Hessian-vector products for them at most"),
    "probes": (10, 0, "Hessian-vector products for the trace, 0: no trace"),
    "points": (21, 2, "points of a random line"),
    "micro_batch": (64, 1, "images per rank and forward"),
    "seed": (0, 0, "seed of all random directions"),
}
_ALIASES = {"m": ["--group"]}  # torchrun takes --m, anywhere, for one of its own flags
_RADII = {"rho": [0.02, 0.05, 0.1, 0.2], "layer_rho": [0.001, 0.002, 0.005, 0.01]}
_RADIUS = {"rho": "radii ||eps|| over the model", "layer_rho": "radii ||eps_i|| / ||w_i||"}


def main(argv: Sequence[str]) -> int:
    """Measure, write flatness.json and a picture, print a table. Raises ConfigError, RunError."""
    # Without it MKL's rounding depends on the addresses of tensors.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, also in convolutions
    flags = _parser().parse_args(argv)
    _check(flags)
    world = World.from_env()
    runs = [open_(path, step=flags.step, data_dir=flags.data_dir) for path in flags.runs]
    _check_places(flags)
    device = assemble.device_of(Settings(device=flags.device), world)
    with joined(world, device, timeout=flags.timeout):
        measured = _Bench(flags, world, device).all(runs)
    if world.rank == 0:
        _show(flags, measured)
    return 0


class _Bench:
    """Measures runs, one after another; keeps the samples where the next run has the same."""

    def __init__(self, flags: Any, world: World, device: torch.device) -> None:
        self.flags, self.world, self.device = flags, world, device
        self._opened: tuple[Any, Data, int, list[Part]] | None = None
        out = files.json_object(flags.out / rundir.FLATNESS) if flags.out is not None else None
        self._known: list[dict[str, Any]] = (out or {}).get("runs", [])  # before it is replaced

    def all(self, runs: Sequence[Trained]) -> list[dict[str, Any]]:
        """The content of flatness.json of each, written as soon as it is known."""
        measured: list[dict[str, Any]] = []
        for number, run in enumerate(runs, start=1):
            measured.append(self._one(run, f"{run.path} ({number} of {len(runs)})"))
            if self.world.rank:
                continue
            if self.flags.out is None:
                _write(run.path / _name(run.step), measured[-1])
            else:
                _write(self.flags.out / rundir.FLATNESS, {"format": FORMAT, "runs": measured})
        return measured

    def _one(self, run: Trained, title: str) -> dict[str, Any]:
        began = time.perf_counter()
        data, samples, parts = self._samples(run)
        model = run.model(data).to(self.device, _DTYPES[self.flags.precision])
        wanted = self._wanted(samples, data)
        settings = {**asdict(wanted), "rho": [*wanted.rho], "layer_rho": [*wanted.layer_rho]}
        if earlier := self._earlier(run, settings):
            if self.world.rank == 0:
                print(f"{title}: was measured already; --again measures anew", file=sys.stderr)
            return earlier | run.facts()
        objective = Objective(model, *parts, total=self._total, micro_batch=self.flags.micro_batch)
        numbers = self._measured(objective, wanted, title)
        return {
            "format": FORMAT,
            **run.facts(),
            "parameters": sum(w.numel() for w in objective.weights),
            "settings": settings,
            **numbers,
            "ranks": self.world.size,
            "device": self.device.type,
            "seconds": round(time.perf_counter() - began, 3),
            **made_with(),
        }

    def _measured(self, objective: Objective, wanted: Wanted, title: str) -> dict[str, Any]:
        """All numbers, with progress on stderr."""
        progress = Progress(
            wanted.cost(),
            shown=self.world.rank == 0,
            file=sys.stderr,
            unit="pass",
            facts=("measuring",),
        )
        done = 0.0

        def tick(cost: float, what: str) -> None:
            nonlocal done
            done += cost
            progress.update(round(done), measuring=what)

        with progress:
            progress.note(
                f"{title}: {wanted.samples:,} training and {wanted.test_samples:,} test images, "
                f"eval mode (no dropout, no drop-path), no augmentation"
            )
            return Measurement(objective, wanted, tick).all()

    def _earlier(self, run: Trained, settings: dict[str, Any]) -> dict[str, Any] | None:
        """What the run's own file, or that in --out, holds of these weights, settings and data.
        Rank 0's answer counts."""
        found = None
        if not self.flags.again:
            same = {"format": FORMAT, "weights_sha256": run.digest(), "settings": settings}
            known = [files.json_object(run.path / _name(run.step)) or {}, *self._known]
            known = [x for x in known if all(x.get(name) == v for name, v in same.items())]
            found = next(filter(run.of_same_data, known), None)
        return gather(found)[0] if self.world.size > 1 else found

    def _samples(self, run: Trained) -> tuple[Data, int, list[Part]]:
        """The data, the number of training samples (whole groups of m), this rank's parts."""
        if self._opened is None or self._opened[0] != run.data_settings:
            data, flags = run.data(), self.flags
            samples = min(flags.samples, len(data.train)) // flags.m * flags.m
            if not samples:
                raise ConfigError(
                    f"m must be at most the {min(flags.samples, len(data.train))} training images "
                    f"that are measured, got {flags.m}; give a smaller --group or more --samples."
                )
            split = [(data.train, samples), (data.test, min(flags.test_samples, len(data.test)))]
            where: dict[str, Any] = {
                "rank": self.world.rank,
                "ranks": self.world.size,
                "device": self.device,
            }
            parts = [part(s, samples=n, groups=samples // flags.m, **where) for s, n in split]
            self._opened = (run.data_settings, data, samples, parts)
        return self._opened[1:]

    def _wanted(self, samples: int, data: Data) -> Wanted:
        given = {f.name: getattr(self.flags, f.name) for f in fields(Wanted)}
        counted = {"samples": samples, "test_samples": min(given["test_samples"], len(data.test))}
        radii = {name: tuple(given[name]) for name in _RADII}
        return Wanted(**given | counted | radii)

    def _total(self, sums: Tensor) -> Tensor:
        if self.world.size > 1:
            dist.all_reduce(sums)
        return sums


def _name(step: int | None) -> str:
    return rundir.FLATNESS if step is None else f"flatness-step-{step}.json"


def _finite(content: Any) -> Any:
    """NaN and infinity, which JSON does not have, as null."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _write(path: Path, content: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_json(path, _finite(content))
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}); name another folder with --out."
        ) from None


def _show(flags: Any, measured: Sequence[dict[str, Any]]) -> None:
    measured = _finite(measured)
    if flags.json:
        print(json.dumps({"format": FORMAT, "runs": measured}, indent=1))
    else:
        head, rows = table(grouped(measured))
        print(table_text(head, rows))
        print(*[caption(measured), *unlike(measured)], sep="\n")
    for line in _picture(flags, measured):
        print(line, file=sys.stderr if flags.json else sys.stdout)


def _picture(flags: Any, measured: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Draws; yields the paths of all files, or why there is no picture."""
    one = flags.runs[0]
    folder = flags.out or (one if len(flags.runs) == 1 else one.parent)
    if flags.out is not None:
        yield f"{flags.out / rundir.FLATNESS}"
    else:
        yield from (f"{path / _name(flags.step)}" for path in flags.runs)
    try:
        from ..report import drawing, flatness

        yield f"{drawing.save_png(flatness.picture(measured), folder / _PICTURE)}"
    except ConfigError as error:
        yield f"{_PICTURE} was not drawn: {error}"


def _check(flags: Any) -> None:
    """ConfigError for numbers out of range."""
    for name, (_, least, _text) in _COUNTS.items():
        if getattr(flags, name) < least:
            raise ConfigError(f"{name} must be >= {least}, got {getattr(flags, name)}.")
    if flags.eigenvalues > flags.iterations:
        raise ConfigError(
            f"iterations must be at least eigenvalues {flags.eigenvalues}, got {flags.iterations}."
        )
    several = [("rho", rho) for rho in flags.rho] + [("layer_rho", rho) for rho in flags.layer_rho]
    for name, value in (("tolerance", flags.tolerance), ("timeout", flags.timeout), *several):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} must be > 0 and finite, got {value:g}.")


def _check_places(flags: Any) -> None:
    """ConfigError where flatness.json cannot be written: known before hours of measuring."""
    names = [os.path.realpath(path) for path in flags.runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"each RUN must be given once, got {' '.join(map(str, flags.runs))}.")
    for path in [flags.out] if flags.out is not None else flags.runs:
        if files.unwritable(path):
            raise ConfigError(
                f"{path} must be a directory that can be written; name another with --out."
            )


def _parser() -> Parser:
    parser = Parser(
        prog="dist-looksam flatness",
        description="Measure how flat the minimum of trained runs is: loss and top1 at w and at "
        "w + eps, largest eigenvalues and trace of the Hessian, loss along random directions, and "
        "top1 after rounding the weights to int8 and int4. In eval mode (no dropout, no "
        "drop-path), without augmentation and label smoothing. Works under torchrun and the other "
        "launchers, with the same numbers. Writes RUN/flatness.json and flatness.png.",
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="run directory (--out of train.py)")
    add(
        "--out",
        type=Path,
        help="folder of flatness.json, for all runs, and of flatness.png; "
        "default: flatness.json in each RUN, flatness.png in RUN or in the folder above several",
    )
    add("--json", action="store_true", help="print the numbers as JSON instead of the table")
    add(
        "--again", action="store_true", help="measure also what a RUN's flatness.json holds already"
    )
    add("--step", type=int, help="number of steps of a checkpoint; default: the final weights")
    add("--data_dir", help="folder of the data; default: as in the run")
    for name, (default, _, text) in _COUNTS.items():
        names = [f"--{name}", *_ALIASES.get(name, ())]
        add(*names, dest=name, type=int, default=default, help=f"{text}; default {default}")
    for name, radii in _RADII.items():
        shown = " ".join(f"{rho:g}" for rho in radii)
        text = f"{_RADIUS[name]}; default {shown}"
        add(f"--{name}", type=float, nargs="+", default=radii, help=text)
    text = "relative residual at which eigenvalues are found; default 0.001"
    add("--tolerance", type=float, default=1e-3, help=text)
    add("--precision", choices=tuple(_DTYPES), default="fp32", help="of all passes; default fp32")
    add("--device", choices=DEVICES, default="auto", help="device to measure on; default auto")
    text = "seconds to wait for a silent rank; default 600"
    add("--timeout", type=float, default=600.0, help=text)
    return parser
