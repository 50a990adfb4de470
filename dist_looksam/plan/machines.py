"""GPUs, networks and measured machines of a plan, with the source of each number.

Speeds of the tables are a data sheet's peak times an assumed fraction. A file of
`dist-looksam plan --calibrate`, which `load` reads, holds measured speeds.
"""

import os
import re
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from .. import files
from ..errors import ConfigError, did_you_mean

GB = 1e9
FILE = "DIST_LOOKSAM_MACHINE"  # environment: the machine file whose cores decode


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU or CPU, one per rank.

    flops             precision -> floating point operations a second that training reaches: of a
                      whole pass, or of its products where activation_bandwidth is given.
    activation_bandwidth  bytes a second at which a pass reads and writes activations; 0: that time
                      is in flops.
    pass_seconds      overhead of a forward and backward beyond its operations: launches, Python.
    launch_seconds    of the host, per kernel launch; 0 where pass_seconds was measured.
    memory            bytes; None: not limited.
    memory_bandwidth  bytes a second that an optimizer step reaches, reading and writing.
    streams           DeepSpeed can send while it computes; not on a CPU.
    source            origin of the numbers, for the user.
    """

    name: str
    flops: dict[str, float]
    memory: float | None
    memory_bandwidth: float
    activation_bandwidth: float = 0.0
    pass_seconds: float = 0.0
    launch_seconds: float = 0.0
    streams: bool = True
    source: str


@dataclass(frozen=True, kw_only=True)
class Network:
    """An alpha-beta model: a message of b bytes takes latency + b / bandwidth.

    latency          seconds a message between nodes.
    bandwidth        bytes a second of one node, each way, all its cables together.
    inner_latency    the same inside a node, per GPU.
    inner_bandwidth
    gloo             gloo sends a reduce-scatter as an all-reduce; NCCL has trees for latency.
    """

    name: str
    latency: float
    bandwidth: float
    inner_latency: float = 4e-6
    inner_bandwidth: float = 360 * GB
    gloo: bool = False
    source: str


PRODUCTS = 0.56  # share of the peak that products and attention reached on an H200 (docs/gpu)
_BYTES = 0.7  # share of a data sheet's memory bandwidth that kernels reach, assumed
LAUNCH = 42e-6  # an H200's host (docs/gpu); an H100's had 46e-6 (docs/planning.md)
_ASSUMED = "{:.0%} of its operations and {:.0%} of its bytes assumed"


def _gpu(name: str, bf16: float, fp32: float, memory: float, bandwidth: float) -> Device:
    """From a data sheet: TFLOP/s of bf16 and fp32 (no TF32), GB, GB/s."""
    flops = {
        name: t * 1e12 * PRODUCTS for name, t in (("bf16", bf16), ("fp16", bf16), ("fp32", fp32))
    }
    return Device(
        name=name,
        flops=flops,
        memory=memory * GB,
        memory_bandwidth=bandwidth * GB * _BYTES,
        activation_bandwidth=bandwidth * GB * _BYTES,
        launch_seconds=LAUNCH,
        source=f"{name}: NVIDIA's data sheet, dense; " + _ASSUMED.format(PRODUCTS, _BYTES),
    )


DEVICES = {
    d.name: d
    for d in (
        _gpu("h200", 989, 67, 141, 4800),
        _gpu("h100", 989, 67, 80, 3350),
        _gpu("a100", 312, 19.5, 80, 2039),
        _gpu("a100-40", 312, 19.5, 40, 1555),
        _gpu("v100", 125, 15.7, 32, 900),
    )
}


_PART = r"\dg\.\d+gb|\bmig\b"  # in the name of a part of a card


def dense_peak(card: str, precision: str) -> float | None:
    """Operations a second of a card, by CUDA's name of it, on its data sheet; None if unknown.

    Of matrix products without sparsity; "fp32" is without TF32. Cards with less power than the
    sheet's (PCIe, NVL) are not known, except A100, whose sheet has one number for all; nor are
    parts of a card (MIG).
    """
    if re.search(_PART, card.lower()):
        return None
    words = card.lower().replace("-", " ").split()
    found = next((name for name in ("h200", "h100", "a100", "v100") if name in words), None)
    if found is None or (found != "a100" and any(w in words for w in ("pcie", "nvl"))):
        return None
    return DEVICES[found].flops[precision] / PRODUCTS


def device_of(card: str) -> Device | None:
    """The device of the tables that CUDA or SLURM's GRES calls `card`, like "h100" or
    "NVIDIA A100-SXM4-40GB"; None where none is, such as a part of a GPU (MIG) and H100 NVL.

    Of a name without memory, such as "a100", it is the one of that name.
    """
    words = re.split(r"[-_ ]", card.lower())
    family = next((word for word in words if word in DEVICES), None)
    if family is None or re.search(_PART + r"|\bnvl", card.lower()):
        return None
    sizes = [int(m[1]) for m in (re.fullmatch(r"(\d+)gb?", word) for word in words) if m]
    alike = [d for d in DEVICES.values() if d.name.split("-")[0] == family]
    if not sizes:
        return DEVICES[family]
    return next((d for d in alike if d.memory == sizes[0] * GB), None)


def _fabric(name: str, gbit: float, latency: float, what: str) -> Network:
    """A node's cables together in Gbit/s, of which 80 % are assumed to be reached."""
    return Network(
        name=name,
        latency=latency,
        bandwidth=0.8 * gbit / 8 * GB,
        source=f"{name}: {what}; 80 % of it and {latency * 1e6:g} us a message assumed; "
        f"inside a node NVLink, 360 GB/s and 4 us assumed",
    )


NETWORKS = {
    n.name: n
    for n in (
        _fabric("infiniband-400", 8 * 400, 5e-6, "8 x 400 Gbit/s a node"),
        _fabric("infiniband-200", 8 * 200, 5e-6, "8 x 200 Gbit/s a node"),
        _fabric("infiniband-100", 4 * 100, 6e-6, "4 x 100 Gbit/s a node"),
        _fabric("ethernet-100", 100, 20e-6, "one cable of 100 Gbit/s a node"),
        _fabric("ethernet-25", 25, 30e-6, "one cable of 25 Gbit/s a node"),
        _fabric("ethernet-10", 10, 40e-6, "one cable of 10 Gbit/s a node"),
        _fabric("ethernet-1", 1, 60e-6, "one cable of 1 Gbit/s a node"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device, and the network between devices.

    images_per_second_per_core  that a core decodes and augments; None: not measured.
    cores_per_node              that may decode; None: not known.
    `dist-looksam data bench --write` writes both.
    """

    device: Device
    network: Network
    images_per_second_per_core: float | None = None
    cores_per_node: int | None = None


def machine(device: str | Device = "h200", network: str | Network = "infiniband-400") -> Machine:
    """A machine of the tables, by names. ConfigError lists the names."""
    return Machine(
        device=_named("gpu", device, DEVICES), network=_named("network", network, NETWORKS)
    )


def _named(what: str, value: Any, table: dict[str, Any]) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() in table:  # NVIDIA writes A100
        return table[value.lower()]
    hint = did_you_mean(value.lower(), table, "or measure yours with --calibrate FILE.")
    raise ConfigError(f"{what} must be one of {', '.join(table)}, got {value!r}; {hint}")


def with_cores(made: Machine) -> Machine:
    """The machine with the cores of the file that DIST_LOOKSAM_MACHINE names. ConfigError as of
    `load`."""
    if not (path := os.environ.get(FILE)):
        return made
    measured = load(Path(path))
    return replace(
        made,
        images_per_second_per_core=measured.images_per_second_per_core,
        cores_per_node=measured.cores_per_node,
    )


def save(made: Machine, path: Path, flag: str = "calibrate") -> None:
    """Write the machine as YAML. ConfigError, which names the flag, if it cannot be written."""
    try:
        path.write_text(yaml.safe_dump(asdict(made), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{flag} must name a file that can be written, got {path} ({error.strerror})."
        ) from None


def load(path: Path) -> Machine:
    """The machine in a YAML file. ConfigError if the file is not one of `save`'s form."""
    try:
        content = files.yaml_of(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"machine must be a file of --calibrate, got {path} ({error.strerror})."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"machine must be YAML, got {path} with {error}.") from None
    parts = content if isinstance(content, dict) else {}
    made: dict[str, Any] = {}
    for name, kind in (("device", Device), ("network", Network)):
        values = parts.get(name)
        wanted = [f.name for f in fields(kind)]
        if not isinstance(values, dict) or not set(values) <= set(wanted):
            raise ConfigError(
                f"machine must have a {name} with {', '.join(wanted)}, got {path} with "
                f"{values if not isinstance(values, dict) else ', '.join(map(str, values))}."
            )
        try:
            made[name] = kind(**values)
        except TypeError:
            missing = ", ".join(w for w in wanted if w not in values)
            raise ConfigError(f"{name} of machine {path} lacks some of {missing}.") from None
        _check_types(made[name], f"{name} of machine {path}")
    rate = parts.get("images_per_second_per_core")
    if rate is not None and not _positive(rate):
        raise ConfigError(
            f"images_per_second_per_core of machine {path} must be a number above 0 or null, got "
            f"{rate!r}."
        )
    cores = parts.get("cores_per_node")
    if cores is not None and not (_positive(cores) and isinstance(cores, int)):
        raise ConfigError(
            f"cores_per_node of machine {path} must be a whole number above 0 or null, got "
            f"{cores!r}."
        )
    return Machine(**made, images_per_second_per_core=rate, cores_per_node=cores)


_MAY_BE_0 = ("latency", "inner_latency", "pass_seconds", "launch_seconds", "activation_bandwidth")


def _check_types(made: Device | Network, where: str) -> None:
    """ConfigError if a value is not of its field's type; YAML reads 1e9 as a text."""
    for field in fields(made):
        value = getattr(made, field.name)
        none_too = value == 0 and field.name in _MAY_BE_0
        kinds: dict[Any, tuple[str, bool]] = {
            str: ("a text", isinstance(value, str)),
            bool: ("true or false", isinstance(value, bool)),
            float: ("a number like 1.0e+9", _positive(value) or (none_too and value is not False)),
            float | None: ("a number like 1.0e+9 or null", value is None or _positive(value)),
            dict[str, float]: (
                "numbers like 1.0e+9, by precision",
                isinstance(value, dict) and bool(value) and all(map(_positive, value.values())),
            ),
        }
        words, good = kinds[field.type]
        if not good:
            raise ConfigError(f"{field.name} of {where} must be {words}, got {value!r}.")


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and isfinite(value) and value > 0


def at_share(device: Device, share: float) -> Device:
    """A device of the table whose whole passes reach this share of its peak."""
    flops = {precision: rate / PRODUCTS * share for precision, rate in device.flops.items()}
    source = device.source.replace(f"{PRODUCTS:.0%}", f"{share:.0%}")
    return replace(device, flops=flops, activation_bandwidth=0.0, source=source)


def changed(
    made: Machine, *, latency: float | None = None, bandwidth: float | None = None
) -> Machine:
    """The machine with another latency (seconds) or bandwidth (bytes a second) between nodes."""
    network = made.network
    if latency is not None:
        source = f"{network.source}; {latency * 1e6:g} us a message as asked"
        network = replace(network, latency=latency, source=source)
    if bandwidth is not None:
        source = f"{network.source}; {bandwidth * 8e-9:g} Gbit/s between nodes as asked"
        network = replace(network, bandwidth=bandwidth, source=source)
    return replace(made, network=network)
