"""Estimate memory, communication and time of a run before it is started.

    dist-looksam plan --model vit_b16 --optimizer look_layer_sam --batch_size 32768 --gpus 64 \\
        --zero_stage 2 --precision bf16 --gpu h200 --network infiniband-400 --epochs 300

Takes train.py's flags and --config, and the flags below. Without --data it assumes images and
classes of ImageNet-1k. Reads no data. With --calibrate FILE it measures this machine instead.
"""

import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..cli import table
from ..cli.arguments import Parser, check_new_file
from ..errors import ConfigError, did_you_mean
from ..settings import config
from ..settings.numbers import check_range
from . import machines
from .forecast import MOST_GPUS, Plan, plan, to_dict
from .machines import DEVICES, NETWORKS, Machine
from .reading import reading

_TRAIN = [f"--{f.name}" for f in fields(config.Settings)]
# More or less than any machine, or any data set, has.
_RANGES: dict[str, tuple[float, float]] = {
    "mfu": (1e-6, 1),
    "bandwidth": (1e-6, 1e9),
    "latency": (1e-6, 1e9),
    "samples": (1, 10**12),
    "classes": (1, 10**7),
    "gpus_per_node": (1, MOST_GPUS),
}
_FOLDER = ["--data", "folder", "--data_dir", "(none)"]  # by default


def _parser() -> Parser:
    parser = Parser(
        prog="dist-looksam plan",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpus", type=int, help="number of ranks, up to 8,192; must be given")
    add("--gpus_per_node", type=int, default=8, help="GPUs of a node; default 8")
    add("--gpu", help=f"kind of GPU: {', '.join(DEVICES)}; default h200")
    add("--network", help=f"network: {', '.join(NETWORKS)}; default infiniband-400")
    add("--machine", help="file of --calibrate, replaces --gpu and --network")
    share = "share of the GPU's peak FLOP/s that a pass reaches; default: by its activations, too"
    add("--mfu", type=float, help=share)
    add("--bandwidth", type=float, help="Gbit/s of payload between two nodes")
    add("--latency", type=float, help="microseconds per message between nodes")
    add("--samples", type=int, help="number of training images; default by data set")
    add("--classes", type=int, help="number of classes; default by data set")
    add("--calibrate", metavar="FILE", help="measure this machine; write FILE")
    add("--json", action="store_true", help="print the plan as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the plan, or calibrate. Raises ConfigError."""
    own, settings = _parsed(argv)
    if own.calibrate is not None:
        from .calibrate import calibrate

        check_new_file("calibrate", Path(own.calibrate))
        return calibrate(settings, Path(own.calibrate), classes=own.classes)
    planned = _planned(own, settings)
    print(json.dumps(to_dict(planned), indent=1) if own.json else to_text(planned))
    return 0


def of_flags(argv: Sequence[str]) -> Plan:
    """The plan that this command would print. Raises ConfigError."""
    return _planned(*_parsed(argv))


def _parsed(argv: Sequence[str]) -> tuple[Any, config.Settings]:
    own, rest = _parser().parse_known_args(list(argv))
    settings = _settings(rest)
    _check_positive(own)
    return own, settings


def _planned(own: Any, settings: config.Settings) -> Plan:
    if own.gpus is None:
        raise ConfigError("gpus must be given, got none; say how many ranks: --gpus 64.")
    return plan(
        settings,
        gpus=own.gpus,
        machine=_machine(own),
        gpus_per_node=min(own.gpus_per_node, own.gpus),
        samples=own.samples,
        classes=own.classes,
    )


def _settings(flags: Sequence[str]) -> config.Settings:
    """The settings of train.py's flags. A misspelt flag of this command is a ConfigError too."""
    try:
        return config.parse([*_FOLDER, *flags])
    except ConfigError:
        own = [flag for action in _parser()._actions for flag in action.option_strings]
        for word in flags:
            hint = did_you_mean(word, [*own, *_TRAIN], "")
            if word.startswith("--") and word not in _TRAIN and any(f" {o}?" in hint for o in own):
                raise ConfigError(f"unknown flag, got {word}; {hint}") from None
        raise


def _check_positive(own: Any) -> None:
    for name in ("bandwidth", "latency", "samples", "classes"):
        value = getattr(own, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be > 0 and finite, got {value:g}.")
    if own.mfu is not None and not 0 < own.mfu <= 1:
        raise ConfigError(f"mfu must be in (0, 1], got {own.mfu:g}; usual are 0.3 to 0.5.")
    for name, (least, most) in _RANGES.items():
        check_range(name, getattr(own, name), least, most)


def _machine(own: Any) -> Machine:
    if own.machine is None:
        machine = machines.machine(own.gpu or "h200", own.network or "infiniband-400")
        machine = machines.with_cores(machine)
    else:
        if own.gpu is not None or own.mfu is not None:
            raise ConfigError("machine has its own speed, got --gpu or --mfu too; leave one out.")
        machine = machines.load(Path(own.machine))
        if own.network is not None:
            machine = replace(machine, network=machines.machine(network=own.network).network)
    if own.mfu is not None:
        machine = replace(machine, device=machines.at_share(machine.device, own.mfu))
    return machines.changed(
        machine,
        bandwidth=None if own.bandwidth is None else own.bandwidth * 1e9 / 8,
        latency=None if own.latency is None else own.latency * 1e-6,
    )


# The printed text.


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def to_text(planned: Plan) -> str:
    """The plan as printed lines."""
    return "\n".join(
        [*_head(planned), "", *_memory(planned), "", *_steps(planned), "", *_end(planned)]
    )


def _head(planned: Plan) -> list[str]:
    s = planned.settings
    stage = "" if s.zero_stage is None else f" stage {s.zero_stage}"
    nodes = -(-planned.gpus // planned.gpus_per_node)
    device = planned.machine.device
    return [
        f"{s.optimizer} on {s.base}, {planned.model} ({planned.parameters:,} parameters), "
        f"{s.backend}{stage}, {s.precision}",
        f"batch {s.batch_size:,} = {planned.micro_batch} x {planned.gpus:,} ranks x "
        f"{planned.accumulation}, {planned.steps:,} steps; {nodes:,} nodes of "
        f"{min(planned.gpus, planned.gpus_per_node)} x {device.name}",
    ]


def _memory(planned: Plan) -> list[str]:
    m = planned.memory.to_dict()
    peak = m.pop("peak")
    room = planned.machine.device.memory
    share = f"of {room / 1e9:.0f} GB" if room else ""
    rows = [[name, _bytes(size), ""] for name, size in m.items() if size]
    rows.append(["most at once", _bytes(peak), share])
    lines = ["memory of a rank", table.text(["", "", ""], rows, indent="  ")]
    if planned.largest_micro_batch:
        lines.append(f"  largest micro_batch that fits: {planned.largest_micro_batch}")
    return lines


def _steps(planned: Plan) -> list[str]:
    s = planned.settings
    heads = ("step", "sent by a rank", "compute", "communication", "not hidden", "update", "step")
    rows = []
    for kind, t in planned.times.items():
        cells = (t.compute, t.communication, t.exposed, t.update, t.total)
        name = f"mean, k={s.rule.k}" if kind == "mean" else kind
        rows.append([name, _bytes(planned.wire[kind]), *map(_time, cells)])
    lines = [table.text(heads, rows)]
    if s.image_size_from is not None:
        lines.append(
            f"Images grow from {s.image_size_from} to {s.image_size} pixels: times are means over "
            f"their sizes, memory is that of the last; the first asks for more images a second."
        )
    return lines


def _host(planned: Plan) -> str:
    each = planned.machine.device.launch_seconds * 1e6
    return (
        f"The host sets this time, not the GPU: it needs {_time(planned.host_seconds)} to ask for "
        f"the kernels of a pass, at {each:g} us each (assumed); use a larger micro_batch or fewer "
        f"GPUs."
    )


def _end(planned: Plan) -> list[str]:
    device, network = planned.machine.device, planned.machine.network
    return [
        f"{planned.images_per_s:,.0f} images/s, {planned.hours:.2f} h, "
        f"{planned.gpu_hours:,.1f} GPU-hours",
        *([f"To be read: {reads}."] if (reads := reading(planned)) else []),
        *([_host(planned)] if planned.host_seconds else []),
        "Evaluation, checkpoints and waiting for images come on top.",
        f"speeds: {device.source}",
        *(f"        {part}" for part in network.source.split("; ")),
    ]
