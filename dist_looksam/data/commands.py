"""dist-looksam data pack|index|check|stage|bench."""

import argparse
import importlib
import io
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ..cli.arguments import Parser
from ..errors import ConfigError
from . import bench
from .augment import Augment
from .encoding import AGAIN, LEFT, LOSSLESS
from .index import SPLITS
from .pack import Packing, pack
from .pictures import Pictures
from .sets import SETS, DataSet, data_set
from .stage import progress

NAMES = "pack|index|check|stage|bench"


def main(argv: Sequence[str]) -> int:
    """Run one of them. Raises ConfigError, RunError."""
    parser = Parser(prog="dist-looksam data", description="Images in folders and in tar shards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar=NAMES)
    texts = {
        "pack": "pack a folder of images, tar shards or Parquet files into tar shards",
        "index": "index tar shards or Parquet files, which training needs",
        "check": "decode every picture whole and list the damaged ones",
        "stage": "copy indexed shards to a disk of this node, once for all its processes",
        "bench": "measure how many training images a core reads and decodes; with flags of "
        "dist-looksam plan (--model, --gpus, --machine, ...): cores that a node needs",
    }
    for name, text in texts.items():
        plain = name != "bench"  # whose other flags are of plan
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=plain)
        where = "folder with train/CLASS/* and val/CLASS/*, with *.tar, or with *.parquet"
        shards = name in ("index", "stage")
        command.add_argument("source", help="folder of shards" if shards else where)
        if name == "stage":
            command.add_argument("cache", help="folder to make a folder with the copies in")
        if name == "pack":
            command.add_argument("target", type=Path, help="folder to write shards into")
            add = command.add_argument
            add("--shuffle", default="none", help="seed of the order of training images, or none")
            add("--max_side", type=int, help="reduce to a shorter side of so many pixels at most")
            add("--shard_mb", type=int, default=256, help="size of a shard; default 256")
        if name == "index":
            text = "read every file whole, too, for the checksums that stage compares"
            command.add_argument("--checksums", action="store_true", help=text)
        if name == "bench":
            bench.add_flags(command.add_argument)
    flags, others = parser.parse_known_args(argv)
    if flags.command == "bench":
        # By name, because it asks for a plan, which knows this folder.
        above = importlib.import_module("..measure.decoding", __package__)
        return above.main(flags, others, _row(flags.source).name, _open(flags.source)[0])
    flags = parser.parse_args(argv)  # refuses others
    run = {"pack": _pack, "index": _index, "check": _check, "stage": _stage}
    return run[flags.command](flags)


def _row(source: str, otherwise: str = "folder") -> DataSet:
    """The data set that reads a place."""
    return next((row for row in SETS.values() if row.holds(source)), data_set(otherwise))


def _open(source: str) -> tuple[Pictures, Pictures]:
    """The splits of a folder of images, of shards, or of Parquet files, which are indexed first."""
    row = _row(source)
    if row.by_group and row.index:
        row.index(source)  # takes seconds: of metadata and labels alone
    how = {"image_size": 224, "augment": Augment(), "seed": 0}
    train, val = row.open(source, **how)
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
    name, told = str(Path(flags.source).absolute()), _told(sum(map(len, sources)))
    first, before = flags.target / ".in_order", Counter[str]()
    again = how.shuffle is not None and _row(flags.source).by_group
    if again and not any(flags.target.glob(".index-*")):  # in order first, then from the shards
        before = pack(sources, first, replace(how, shuffle=None), name=name, told=told).progressive
        del before[LEFT]  # which the second time counts again
        sources, told = _open(str(first)), _told(sum(map(len, sources)))
    done = pack(sources, flags.target, how, name=name, told=told)
    print(_described(done.splits, flags.target) + _progressive(done.progressive + before))
    shutil.rmtree(first, ignore_errors=True)
    return 0


def _told(total: int) -> Callable[[str, int, int, int], None]:
    """Prints the shards that are done and the time left."""
    began, done = time.monotonic(), 0

    def told(split: str, number: int, shards: int, samples: int) -> None:
        nonlocal done
        done += samples
        left = (time.monotonic() - began) / done * (total - done)
        print(f"{split} {number + 1}/{shards}: {done:,} of {total:,} images, ETA {left:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip

    return told


def _described(done: dict[str, tuple[int, int]], where: object) -> str:
    parts = [f"{samples:,} {s} images in {shards} shards" for s, (samples, shards) in done.items()]
    return f"{where}: {', '.join(parts)}"


def _progressive(counts: Counter[str]) -> str:
    """What became of the progressive JPEGs."""
    meant = {
        LOSSLESS: "became baseline without loss",
        AGAIN: "were encoded again, as the C extension is not built or scans are missing",
        LEFT: "stay as they are, because they are damaged",
    }
    parts = [f"{counts[how]:,} {text}" for how, text in meant.items() if counts[how]]
    return f"; of {sum(counts.values()):,} progressive JPEGs {', '.join(parts)}" if parts else ""


def _index(flags: argparse.Namespace) -> int:
    index = _row(flags.source, "tar").index
    assert index is not None
    print(_described(index(flags.source, checksums=flags.checksums), flags.source))
    return 0


def _stage(flags: argparse.Namespace) -> int:
    copy = _row(flags.source, "tar").stage
    assert copy is not None
    done = copy(flags.source, flags.cache, progress(flags.source, 2))
    copied = f"{done.size / 1e9:,.3g} GB, {done.copied / 1e9:,.3g} of them copied now"
    command = f"dist-looksam data index '{flags.source}' --checksums"
    missing = f"; {done.unchecked:,} files have no checksum to compare: {command}"
    print(f"{done.folder}: {copied}{missing if done.unchecked else ''}")
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
