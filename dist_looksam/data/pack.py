"""Packs pictures into tar shards: DIR/train-000000.tar, ..., classes.txt and the index."""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .. import files
from ..errors import ConfigError, RunError
from .decode import rgb
from .index import CLASSES, SPLITS
from .pictures import Pictures
from .shards import write_index

PLAN = "pack.json"
_SAMPLED = 200  # files whose sizes tell how many go into a shard
_QUALITY = 90
_MAGIC = {b"\xff\xd8": "jpg", b"\x89P": "png", b"GI": "gif", b"BM": "bmp"}


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


def pack(
    sources: tuple[Pictures, Pictures],
    target: Path,
    how: Packing,
    *,
    name: str,
    told: Callable[[str, int, int, int], None] = lambda *_: None,
) -> dict[str, tuple[int, int]]:
    """Write the shards that are not there yet, then the index; returns {split: (samples, shards)}.

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
                    _write(path, source, part.tolist(), first, how)
                told(split, number, len(parts), len(part))
        files.replace_text(target / CLASSES, "".join(f"{n}\n" for n in sources[0].class_names))
    except OSError as error:
        raise RunError(
            f"{target} was not packed to the end ({error.strerror}); the same command goes on."
        ) from None
    return write_index(target)


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
        return before
    if any(target.glob("*.tar")):
        raise ConfigError(f"target must be empty, got {target} with tar files in it; name another.")
    shards = {split: _count(s, how) for split, s in zip(SPLITS, sources, strict=True)}
    files.replace_json(target / PLAN, {**asked, "shards": shards})
    return {"shards": shards}


def _count(source: Pictures, how: Packing) -> int:
    some = range(0, len(source), max(1, len(source) // _SAMPLED))
    sizes = [len(_encoded(source, index, how.max_side)[0]) for index in some]
    total = len(source) * (sum(sizes) / len(sizes) + 3 * 512)  # headers, the label, padding
    return max(1, min(len(source), round(total / (how.shard_mb * 1e6))))


def _order(count: int, seed: int | None) -> np.ndarray:
    if seed is None:
        return np.arange(count)
    return np.random.Generator(np.random.Philox(key=seed)).permutation(count)


def _write(path: Path, source: Pictures, samples: list[int], first: int, how: Packing) -> None:
    """One shard, atomically; equal samples give equal bytes."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    with scratch.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (data, kind, label) in enumerate(_samples(source, samples, how), first):
                _add(tar, f"{number:09d}.{kind}", data)
                _add(tar, f"{number:09d}.cls", str(label).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _samples(
    source: Pictures, samples: list[int], how: Packing
) -> Iterator[tuple[bytes, str, int]]:
    """(bytes, kind, label) of each sample; a few at a time are read and encoded by threads."""

    def one(index: int) -> tuple[bytes, str, int]:
        data, kind = _encoded(source, index, how.max_side)
        return data, kind, int(source.labels[index])

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(samples), 16 * threads):
            yield from pool.map(one, samples[start : start + 16 * threads])


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _encoded(source: Pictures, index: int, max_side: int | None) -> tuple[bytes, str]:
    """The bytes to pack and their kind."""
    data = source.encoded(index)
    if max_side is not None:
        with suppress(Exception):  # decoders raise nearly anything for a damaged file
            data = _reduced(data, max_side)
    return data, _kind(data)


def _reduced(data: bytes, max_side: int) -> bytes:
    """The picture with a shorter side of `max_side` at most, as a baseline JPEG; upright, without
    its metadata. Smaller ones are returned as they are."""
    with Image.open(io.BytesIO(data)) as image:
        if min(image.size) <= max_side:
            return data
        picture = ImageOps.exif_transpose(image)
        scale = max_side / min(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = rgb(picture).resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _kind(data: bytes) -> str:
    """The file name's ending, by content: a PNG may be called .jpg."""
    if data[:4] == b"RIFF":
        return "webp"
    if data[:2] in _MAGIC:
        return _MAGIC[data[:2]]
    try:
        with Image.open(io.BytesIO(data)) as image:
            return {"tiff": "tif", "ppm": "ppm"}.get(str(image.format).lower(), "png")
    except Exception:  # damaged: any ending will do
        return "jpg"
