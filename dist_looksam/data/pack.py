"""Packs pictures into tar shards: DIR/train-000000.tar, ..., classes.txt and the index."""

import io
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..errors import ConfigError, RunError
from .encoding import Encoded, encoded
from .index import CLASSES, PLAN, SPLITS
from .pictures import Pictures
from .shards import write_index

_SAMPLED = 200  # files whose sizes tell how many go into a shard


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How to pack.

    shuffle   seed of the order of training samples; None keeps that of the source.
    max_side  pictures whose shorter side is longer, in pixels, are reduced to it; None: none.
    shard_mb  size of a shard, about, in 10^6 bytes.
    """

    shuffle: int | None = None
    max_side: int | None = None
    shard_mb: int = 256


@dataclass(frozen=True, kw_only=True)
class Packed:
    """splits: (samples, shards) of each. progressive: number of progressive JPEGs by what became
    of them, see encoding.py."""

    splits: dict[str, tuple[int, int]]
    progressive: Counter[str]


def pack(
    sources: tuple[Pictures, Pictures],
    target: Path,
    how: Packing,
    *,
    name: str,
    told: Callable[[str, int, int, int], None] = lambda *_: None,
) -> Packed:
    """Write the shards that are not there yet, then the index.

    A picture that cannot be decoded is packed as it is: training passes over it, as in the source.

    Args:
        sources: training and test split. name: of their place, to know the packing again.
        told: called after each shard with (split, its number, number of shards, samples in it).

    Raises:
        ConfigError: `target` holds another packing. RunError: it cannot be written.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        plan = _plan(sources, target, how, name)
        for split, source in zip(SPLITS, sources, strict=True):
            order = _order(len(source), how.shuffle if split == "train" else None)
            parts = np.array_split(order, plan["shards"][split])
            for number, part in enumerate(parts):
                path = target / f"{split}-{number:06d}.tar"
                if not path.exists():
                    first = sum(len(p) for p in parts[:number])
                    _write(path, source, part.tolist(), first, how, plan)
                told(split, number, len(parts), len(part))
        files.replace_text(target / CLASSES, "".join(f"{n}\n" for n in sources[0].class_names))
    except OSError as error:
        raise RunError(
            f"{target} was not packed to the end ({error.strerror}); the same command goes on."
        ) from None
    made = plan["made"].values()
    progressive = sum((Counter(row["progressive"]) for row in made), Counter[str]())
    return Packed(splits=write_index(target), progressive=progressive)


def _plan(sources: tuple[Pictures, Pictures], target: Path, how: Packing, name: str) -> Any:
    """The number of shards of each split; that of an earlier start, if this is the same packing."""
    asked = {"source": name, **asdict(how), "samples": [len(source) for source in sources]}
    before = files.json_object(target / PLAN)
    if before is not None:
        if {key: before.get(key) for key in asked} != asked:
            raise ConfigError(
                f"target must be empty or of the same packing, got {target}, packed from "
                f"{before.get('source')} with other settings; name another or empty it."
            )
        return {"made": {}, **before}
    if any(target.glob("*.tar")):
        raise ConfigError(f"target must be empty, got {target} with tar files in it; name another.")
    shards = {split: _count(s, how) for split, s in zip(SPLITS, sources, strict=True)}
    plan = {**asked, "shards": shards, "made": {}}
    files.replace_json(target / PLAN, plan)
    return plan


def _count(source: Pictures, how: Packing) -> int:
    some = range(0, len(source), max(1, len(source) // _SAMPLED))
    sizes = [len(encoded(source.encoded(index), how.max_side).data) for index in some]
    total = len(source) * (sum(sizes) / len(sizes) + 3 * 512)  # headers, the label, padding
    return max(1, min(len(source), round(total / (how.shard_mb * 1e6))))


def _order(count: int, seed: int | None) -> np.ndarray:
    if seed is None:
        return np.arange(count)
    return np.random.Generator(np.random.Philox(key=seed)).permutation(count)


class _Summed(io.BufferedWriter):
    """A file with the checksum of what was written to it."""

    crc32 = 0

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return super().write(data)


def _write(
    path: Path, source: Pictures, samples: list[int], first: int, how: Packing, plan: Any
) -> None:
    """One shard, atomically; equal samples give equal bytes. Its checksum goes into `plan`."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    progressive: Counter[str] = Counter()
    with _Summed(io.FileIO(scratch, "w")) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (picture, label) in enumerate(_samples(source, samples, how), first):
                _add(tar, f"{number:09d}.{picture.kind}", picture.data)
                _add(tar, f"{number:09d}.cls", str(label).encode())
                progressive.update([picture.progressive] if picture.progressive else [])
        file.flush()
        os.fsync(file.fileno())
        stat = os.fstat(file.fileno())
        plan["made"][path.name] = {
            **{"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "crc32": file.crc32},
            "progressive": dict(progressive),
        }
    files.replace_json(path.with_name(PLAN), plan)
    os.replace(scratch, path)


def _samples(source: Pictures, samples: list[int], how: Packing) -> Iterator[tuple[Encoded, int]]:
    """Picture and label of each sample; a few at a time are read and encoded by threads."""

    def one(index: int) -> tuple[Encoded, int]:
        return encoded(source.encoded(index), how.max_side), int(source.labels[index])

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(samples), 16 * threads):
            yield from pool.map(one, samples[start : start + 16 * threads])


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
