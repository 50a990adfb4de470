"""dist-looksam data pack|index|check|bench."""

import argparse
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ..cli.arguments import Parser
from ..errors import ConfigError
from . import bench
from .augment import Augment
from .pack import Packing, pack
from .pictures import Pictures
from .sets import data_set
from .shards import SPLITS, write_index

NAMES = "pack|index|check|bench"


def main(argv: Sequence[str]) -> int:
    """Run one of them. Raises ConfigError, RunError."""
    parser = Parser(prog="dist-looksam data", description="Images in folders and in tar shards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar=NAMES)
    texts = {
        "pack": "pack a folder of images, or tar shards, into tar shards",
        "index": "index tar shards, which training and check need",
        "check": "decode every picture whole and list the damaged ones",
        "bench": "measure how many training images a core reads and decodes",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        where = "folder with train/CLASS/* and val/CLASS/*, or with *.tar"
        command.add_argument("source", help=where if name != "index" else "folder of shards")
        if name == "pack":
            command.add_argument("target", type=Path, help="folder to write shards into")
            add = command.add_argument
            add("--shuffle", default="none", help="seed of the order of training images, or none")
            add("--max_side", type=int, help="reduce to a shorter side of so many pixels at most")
            add("--shard_mb", type=int, default=256, help="size of a shard; default 256")
        if name == "bench":
            bench.add_flags(command.add_argument)
    flags = parser.parse_args(argv)
    if flags.command == "bench":
        return bench.main(flags, _open(flags.source)[0])
    return {"pack": _pack, "index": _index, "check": _check}[flags.command](flags)


def _open(source: str) -> tuple[Pictures, Pictures]:
    """The splits of a folder of images or of shards."""
    in_shards = "{" in source or (Path(source).is_dir() and any(Path(source).glob("*.tar")))
    how = {"image_size": 224, "augment": Augment(), "seed": 0}
    train, val = data_set("tar" if in_shards else "folder").open(source, **how)
    assert isinstance(train, Pictures) and isinstance(val, Pictures)
    return train, val


def _pack(flags: argparse.Namespace) -> int:
    if flags.shuffle != "none" and not flags.shuffle.isdecimal():
        raise ConfigError(f"shuffle must be a seed, 0 or more, or none, got {flags.shuffle}.")
    for name, most in (("max_side", 2**14), ("shard_mb", 10**6)):
        value = getattr(flags, name)
        if value is not None and not 1 <= value <= most:
            raise ConfigError(f"{name} must be from 1 to {most:,}, got {value}.")
    how = Packing(
        shuffle=None if flags.shuffle == "none" else int(flags.shuffle),
        max_side=flags.max_side,
        shard_mb=flags.shard_mb,
    )
    sources = _open(flags.source)
    if Path(flags.source).resolve() == flags.target.resolve():
        raise ConfigError(f"target must be another folder than the source, got {flags.target}.")
    total, began, done = sum(map(len, sources)), time.monotonic(), 0

    def told(split: str, number: int, shards: int, samples: int) -> None:
        nonlocal done
        done += samples
        left = (time.monotonic() - began) / done * (total - done)
        print(f"{split} {number + 1}/{shards}: {done:,} of {total:,} images, ETA {left:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip

    name = str(Path(flags.source).absolute())
    print(_described(pack(sources, flags.target, how, name=name, told=told), flags.target))
    return 0


def _described(done: dict[str, tuple[int, int]], where: object) -> str:
    parts = [f"{samples:,} {s} images in {shards} shards" for s, (samples, shards) in done.items()]
    return f"{where}: {', '.join(parts)}"


def _index(flags: argparse.Namespace) -> int:
    print(_described(write_index(flags.source), flags.source))
    return 0


def _check(flags: argparse.Namespace) -> int:
    """Exit code 1 if a picture is damaged."""
    bad = 0
    for split, source in zip(SPLITS, _open(flags.source), strict=True):
        for why, (count, first) in source.passed_over.items():
            print(f"{split}: {count} passed over, {why}: {first}")
        for index, problem in _problems(source, split):
            bad += 1
            print(f"{split}: {source.path(index)}: {problem}", flush=True)
        print(f"{split}: {len(source):,} pictures decoded")
    print("all are whole" if not bad else f"{bad} are damaged")
    return 1 if bad else 0


def _problems(source: Pictures, split: str) -> Iterator[tuple[int, str]]:
    """(sample, reason) of every picture that cannot be decoded whole."""

    def problem(index: int) -> str | None:
        try:
            with Image.open(io.BytesIO(source.encoded(index))) as image:
                image.load()
        except Exception as error:  # decoders raise nearly anything for a damaged file
            return str(error) or type(error).__name__
        return None

    threads, began = os.cpu_count() or 1, time.monotonic()
    shown = began
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), 64 * threads):
            part = range(start, min(start + 64 * threads, len(source)))
            for index, why in zip(part, pool.map(problem, part)):
                if why is not None:
                    yield index, why
            now = time.monotonic()
            if now - shown > 5:
                shown, left = now, (now - began) / part.stop * (len(source) - part.stop)
                print(f"{split}: {part.stop:,} of {len(source):,}, ETA {left:.0f} s",
                      file=sys.stderr, flush=True)  # fmt: skip
