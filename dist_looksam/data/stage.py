"""Copies indexed data files to a disk of the node: CACHE/NAME-HASH/, once for all its processes.

HASH is of the index, so that other data get another folder. A file has its name there only when it
is whole, and the JSON of the index is written last: a start that was killed goes on.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..errors import ConfigError, RunError
from .index import CLASSES, index_files, indexed_files

_PIECE = 8 * 2**20  # bytes of one read
_COPIES = 8  # files at a time: a network file system serves many better than one
_WAIT = 0.1  # seconds between two looks at the lock
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Staged:
    """The folder, its number of bytes, and how many of them this process has copied.

    unchecked: number of files whose checksum the index does not have.
    """

    folder: Path
    size: int
    copied: int
    unchecked: int = 0


Told = Callable[[int, int, float], None]


def stage(
    where: str | Path,
    found: Mapping[str, Sequence[Path]],
    cache: str | Path,
    told: Told = lambda *_: None,
) -> Staged:
    """Copy the files of every split, unless they are there. Waits while another process copies.

    Args:
        where: the place of the files, for messages. found: files of each split, as indexed.
        told: called after each file with (bytes there, bytes of all, seconds since the start).

    Raises:
        ConfigError: the files have no index, or are not those indexed.
        RunError: the cache has no room, or cannot be written, or the bytes of a file are not those
            that its checksum is of.
    """
    wanted = {split: indexed_files(where, split, paths) for split, paths in found.items()}
    abouts = [index_files(paths[0].parent, split)[1] for split, paths in found.items()]
    digest = hashlib.sha256(b"".join(map(_without_checksums, abouts))).hexdigest()
    folder = Path(cache) / f"{abouts[0].parent.absolute().name or 'data'}-{digest[:12]}"
    rows = [
        (path, row)
        for split in found
        for path, row in zip(found[split], wanted[split], strict=True)
    ]
    size = sum(row["bytes"] for _, row in rows)
    unchecked = sum("crc32" not in row for _, row in rows)
    if len({path.name for path, _ in rows}) < len(rows):
        raise ConfigError(f"data files must have different names to be staged, got {where}.")
    try:
        if _whole(folder, abouts):
            return Staged(folder, size, 0, unchecked)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            while files.lock(lock) is False:
                time.sleep(_WAIT)
            if _whole(folder, abouts):  # made by another process meanwhile
                return Staged(folder, size, 0, unchecked)
            copied = _fill(folder, rows, abouts, where, told)
            return Staged(folder, size, copied, unchecked)
    except OSError as error:
        host = socket.gethostname()
        what = "is full" if error.errno in _NO_ROOM else f"cannot be filled ({error.strerror})"
        raise RunError(f"the cache {folder} on {host} {what}; {_ADVICE}.") from None


_ADVICE = "make room there, or name another folder"


def progress(where: object, every: float = 10.0) -> Told:
    """Prints, once in so many seconds, how much is there."""
    shown = 0.0

    def told(there: int, size: int, seconds: float) -> None:
        nonlocal shown
        if seconds - shown >= every and there < size:
            shown = seconds
            print(f"staging {where}: {there / 1e9:,.3g} of {size / 1e9:,.3g} GB",
                  file=sys.stderr, flush=True)  # fmt: skip

    return told


def _without_checksums(about: Path) -> bytes:
    """The JSON of an index as it is without them: they may be added once copies are there."""
    content = json.loads(about.read_bytes())
    for row in content["shards"]:
        row.pop("crc32", None)
    return (json.dumps(content, indent=1) + "\n").encode()


def _whole(folder: Path, abouts: Sequence[Path]) -> bool:
    return all(
        (folder / about.name).is_file() and (folder / about.name).read_bytes() == about.read_bytes()
        for about in abouts
    )


def _fill(
    folder: Path,
    rows: Sequence[tuple[Path, dict[str, Any]]],
    abouts: Sequence[Path],
    where: str | Path,
    told: Told,
) -> int:
    """Copy what is missing, the index last; returns the number of bytes of data files copied."""
    size = sum(row["bytes"] for _, row in rows)
    missing = [(path, row) for path, row in rows if not _is_there(folder / path.name, row)]
    needed = sum(row["bytes"] for _, row in missing)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"the cache {folder} on {socket.gethostname()} has {free / 1e9:,.3g} GB free, but "
            f"{needed / 1e9:,.3g} GB of {where} must be copied there; {_ADVICE}."
        )
    began, there = time.monotonic(), size - needed
    with ThreadPoolExecutor(_COPIES) as pool:
        copies = {pool.submit(_copy, path, folder, row): row for path, row in missing}
        try:
            for copy in as_completed(copies):
                copy.result()
                there += copies[copy]["bytes"]
                told(there, size, time.monotonic() - began)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    arrays = [about.with_suffix(".npy") for about in abouts]
    classes = [path for path in {about.parent / CLASSES for about in abouts} if path.is_file()]
    for path in [*arrays, *classes, *abouts]:
        _copy(path, folder)
    return needed


def _is_there(path: Path, row: dict[str, Any]) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_size, found.st_mtime_ns) == (row["bytes"], row["mtime_ns"])


def _copy(path: Path, folder: Path, row: dict[str, Any] | None = None) -> None:
    """A copy with the same time, under its name once it is whole.

    Raises ConfigError if the file is not the one that is indexed in `row`, RunError if its bytes
    are not, OSError.
    """
    crc32 = 0
    scratch = folder / f".{path.name}.{socket.gethostname()}.new"
    try:
        with path.open("rb", buffering=0) as source, scratch.open("wb", buffering=0) as file:
            while piece := source.read(_PIECE):
                crc32 = zlib.crc32(piece, crc32)
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
            found = os.fstat(source.fileno())
        os.utime(scratch, ns=(found.st_atime_ns, found.st_mtime_ns))
        if row is not None and not _is_there(scratch, row):
            raise ConfigError(
                f"files must be those that were indexed, got {path} with another size or time; "
                f"make the index again: dist-looksam data index '{path.parent}'."
            )
        if row is not None and crc32 != row.get("crc32", crc32):
            raise RunError(
                f"{path}, as {socket.gethostname()} reads it, must have the checksum of the index, "
                f"{row['crc32']:08x}, got {crc32:08x}, and is not copied; copy it anew from where "
                f"it was packed, or check the disk and the network."
            )
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    os.replace(scratch, folder / path.name)
