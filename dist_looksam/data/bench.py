"""dist-looksam data bench: how fast a core reads, decodes and augments training images."""

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil
from statistics import median
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, RunError
from . import decode, jpeg
from .augment import AUGMENT_ON, Augment, parse
from .pictures import Pictures
from .source import UNREADABLE

_BATCH = 256  # samples whose random numbers are drawn at once, as in a micro-batch
_CHUNK = 8  # as of the loader's threads
_ROUNDS = 5
_EVERY = 1000  # microseconds of processor time between two samples of the GIL


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed of one route, of one core.

    images_per_s      per second of processor time: the median of the rounds, their least and most
    mb_per_s          bytes of files read, in 10^6 a second
    gil_us            microseconds an image for which Python's lock is held; None: not measured
    process_per_s     images/s above which a process cannot go on any number of cores
    """

    images_per_s: float
    least: float
    most: float
    mb_per_s: float
    gil_us: float | None
    process_per_s: float | None


def add_flags(add: Callable[..., Any]) -> None:
    """The flags of the command, to argparse's `add_argument`."""
    add("--augment", default="crop,flip", help="as of train.py; default crop,flip")
    add("--augment_on", choices=AUGMENT_ON, default="host", help="as of train.py; default host")
    add("--image_size", type=int, default=224, help="side of the images in pixels; default 224")
    add("--images", type=int, default=512, help="number of images read each time; default 512")
    add("--images_per_s", type=float, help="images/s that a node needs; default: of the plan")
    add("--write", metavar="MACHINE.yaml", help="store the speed and number of cores for plan")
    add("--json", action="store_true", help="print the numbers as JSON")


def check(flags: argparse.Namespace) -> None:
    """ConfigError for a malformed flag."""
    for name, most in (("image_size", 8192), ("images", 10**6)):
        if not 1 <= getattr(flags, name) <= most:
            raise ConfigError(f"{name} must be from 1 to {most:,}, got {getattr(flags, name)}.")
    if flags.images_per_s is not None and not 0 < flags.images_per_s <= 1e9:
        raise ConfigError(f"images_per_s must be above 0, up to 1e9, got {flags.images_per_s}.")
    _augment(flags)


def _augment(flags: argparse.Namespace) -> Augment:
    return parse(flags.augment, on=flags.augment_on)


def run(flags: argparse.Namespace, source: Pictures) -> dict[str, Speed]:
    """Measures the routes on the training split; see `measure`."""
    source.augment = _augment(flags)
    source.shape = (3, flags.image_size, flags.image_size)
    source.on_corrupt = lambda _: None
    return measure(source, flags.images)


def needed(speeds: dict[str, Speed], images_per_s: float) -> dict[str, float]:
    """Cores, and processes as far as that is known, that read so many images by the first route."""
    used = next(iter(speeds.values()))
    needs = {"images_per_s": images_per_s, "cores": ceil(images_per_s / used.images_per_s)}
    if used.process_per_s is not None:
        needs["processes"] = ceil(images_per_s / used.process_per_s)
    return needs


def show(
    flags: argparse.Namespace, speeds: dict[str, Speed], needs: dict[str, float] | None
) -> None:
    """Print them."""
    if not flags.json:
        print(_text(speeds, needs))
        augment = _augment(flags)
        there = ["policy and jitter"] * augment.on_device
        there += ["erasing"] * bool(augment.erasing) + ["mixing"] * augment.mixes
        if there:
            print(f"made on the device and not in these numbers: {', '.join(there)}")
        return
    routes = {name: asdict(speed) for name, speed in speeds.items()}
    found = {"routes": routes, "node": needs, "decoder": decode.route()[1]}
    names = ("images", "augment", "augment_on", "image_size")
    found |= {name: getattr(flags, name) for name in names}
    print(json.dumps(found))


def measure(source: Pictures, images: int) -> dict[str, Speed]:
    """The speed of each route, the one that training uses first: {"C": ..., "Python": ...}.

    The same images by each route in turn, 8 at a time, so that other load on the machine meets all
    alike; the processor time of this thread. Files are read once before, so they are in the page
    cache where they fit. RunError if no image can be read.
    """
    torch.set_num_threads(1)
    routes = ["C", "Python"] if decode.route()[0] is not None else ["Python"]
    order = np.random.Generator(np.random.Philox(0)).permutation(len(source))
    indices = torch.from_numpy(np.resize(order, images))
    size = np.mean([len(source.encoded(index)) for index in indices.tolist()])
    _, labels = source.fetch(indices[:_BATCH], indices[:_BATCH], True)
    if (labels == UNREADABLE).all():
        raise RunError(f"no image can be read, such as {source.path(int(indices[0]))}.")
    rounds = [_round(source, indices, routes, number) for number in range(_ROUNDS)]
    speeds = {}
    for route in routes:
        each = [images / seconds[route] for seconds in rounds]
        speed = median(each)
        held = _gil(source, indices, route)
        speeds[route] = Speed(
            images_per_s=speed,
            least=min(each),
            most=max(each),
            mb_per_s=speed * float(size) / 1e6,
            gil_us=held,
            process_per_s=1e6 / held if held else None,
        )
    source.in_c = True
    return speeds


def _round(
    source: Pictures, indices: torch.Tensor, routes: list[str], number: int
) -> dict[str, float]:
    """Seconds of processor time of each route for all images."""
    seconds = dict.fromkeys(routes, 0.0)
    for start in range(0, len(indices), _BATCH):
        batch = indices[start : start + _BATCH]
        keys = torch.arange(start, start + len(batch)) + number * len(indices)
        began = time.thread_time()
        changes = source.changes(keys, True)
        drawn = time.thread_time() - began
        out = np.empty((_CHUNK, source.shape[1], source.shape[1], 3), np.uint8)
        for first in range(0, len(batch), _CHUNK):
            part = slice(first, first + _CHUNK)
            for route in routes if (first // _CHUNK) % 2 else routes[::-1]:
                source.in_c = route == "C"
                began = time.thread_time()
                some = batch[part]
                source.fetch(some, keys[part], True, changes=changes[part], out=out[: len(some)])
                seconds[route] += time.thread_time() - began
        seconds = {route: spent + drawn for route, spent in seconds.items()}
    return seconds


def _gil(source: Pictures, indices: torch.Tensor, route: str) -> float | None:
    """Microseconds an image for which this thread holds Python's lock.

    Sampled on the thread's own processor time, by code of the C extension; None without it.
    """
    library = jpeg.built()
    if library is None or not hasattr(library, "looksam_gil_start"):
        return None
    check = ctypes.cast(ctypes.pythonapi.PyGILState_Check, ctypes.c_void_p)
    began = time.thread_time()
    if library.looksam_gil_start(check, ctypes.c_long(_EVERY)):
        return None
    for number in range(_ROUNDS):
        _round(source, indices, [route], _ROUNDS + number)
    samples, held = ctypes.c_long(), ctypes.c_long()
    library.looksam_gil_stop(ctypes.byref(samples), ctypes.byref(held))
    spent = time.thread_time() - began
    if not samples.value:
        return None
    return 1e6 * spent * held.value / samples.value / (_ROUNDS * len(indices))


def _text(speeds: dict[str, Speed], needs: dict[str, float] | None) -> str:
    lines = [decode.route()[1]]
    lines.append("route   images/s a core (least-most)   MB/s read   GIL us an image   a process")
    for route, s in speeds.items():
        spread = f"{s.images_per_s:,.0f} ({s.least:,.0f}-{s.most:,.0f})"
        gil = "-" if s.gil_us is None else f"{s.gil_us:,.0f}"
        ceiling = "-" if s.process_per_s is None else f"{s.process_per_s:,.0f}/s"
        lines.append(f"{route:<7} {spread:>30}   {s.mb_per_s:>9,.1f}   {gil:>15}   {ceiling:>9}")
    if needs is not None:
        more = f", {needs['processes']} or more processes" if "processes" in needs else ""
        cores = f"{needs['cores']} cores of this kind{more}"
        lines.append(f"a node that needs {needs['images_per_s']:,.0f} images/s: {cores}")
    return "\n".join(lines)
