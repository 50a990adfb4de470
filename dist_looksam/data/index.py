"""The index of a data set in large files, by which its samples are read at random.

It is two files for each split, beside the large ones:

.index-SPLIT.npy   one `ROW` for each sample, in the order of the files and of their samples
.index-SPLIT.json  classes; name, size, time, samples of each file, and its checksum where it is
                   known; the hash of the rows
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..errors import ConfigError, RunError

# offset and size: bytes in a tar shard; row group and row in it of a Parquet file
ROW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
SPLITS = ("train", "val")
CLASSES = "classes.txt"  # beside the shards: a name a line, in the order of the labels
PLAN = "pack.json"  # beside shards that `pack` has made
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Index:
    """The samples of a split. rows: `ROW`, mapped from the file."""

    shards: tuple[Path, ...]
    class_names: tuple[str, ...]
    rows: np.ndarray
    sizes: tuple[int, ...]  # bytes of each shard
    others: dict[str, tuple[int, str]]
    digest: str


def table_of(
    paths: Sequence[Path], counts: Sequence[int], *, checksums: bool = False
) -> list[dict[str, Any]]:
    """What the index says of each file, with its number of samples.

    crc32, the checksum of its bytes, is there if `pack` or an earlier index knows it of the same
    size and time; with `checksums` the other files are read whole for it.
    """
    known = {key: crc for folder in {p.parent for p in paths} for key, crc in _known(folder)}

    def about(path: Path) -> dict[str, Any]:
        stat = path.stat()
        found = {"name": path.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        crc32 = known.get(tuple(found.values()))
        if crc32 is None and checksums:
            crc32 = crc32_of(path)
        return found if crc32 is None else {**found, "crc32": crc32}

    with ThreadPoolExecutor(16) as pool:
        rows = pool.map(about, paths)
        return [{**row, "samples": n} for row, n in zip(rows, counts, strict=True)]


def _known(folder: Path) -> Iterator[tuple[tuple[Any, ...], int]]:
    """((name, bytes, mtime_ns), checksum) of files whose checksum `pack` or an index knows."""
    made = (files.json_object(folder / PLAN) or {}).get("made", {})
    indices = [files.json_object(index_files(folder, split)[1]) or {} for split in SPLITS]
    rows = [row for index in indices for row in index.get("shards", [])]
    for row in [*rows, *({"name": name, **row} for name, row in made.items())]:
        if "crc32" in row:
            yield (row["name"], row["bytes"], row["mtime_ns"]), row["crc32"]


def crc32_of(path: Path) -> int:
    """The checksum of a file."""
    total = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(8 * 2**20):
            total = zlib.crc32(piece, total)
    return total


def write(
    folders: Mapping[str, Path],
    built: Mapping[str, tuple[np.ndarray, dict[str, Any], Sequence[int | str]]],
    names: Sequence[str] = (),
) -> None:
    """Number the labels and write the index of every split.

    Args:
        folders: of each split's files. built: rows without labels, the JSON, and the labels as the
            files have them, of each split. names: of the classes 0, 1, ..., where they are known.

    Raises:
        ConfigError: labels have gaps, or val has a class that train has not.
        RunError: the folder cannot be written.
    """
    names = names or class_names(folders["train"], built["train"][2])
    number = {name: n for n, name in enumerate(names)}
    every = {label for _, _, labels in built.values() for label in labels if isinstance(label, int)}
    # Numbers are places in the list of names, or, where that cannot be, names: 0, 2 and 5 of three.
    by_name = any(label >= len(names) for label in every) and all(str(n) in number for n in every)
    for split, (rows, _, labels) in built.items():
        rows["label"] = [_number(label, number, by_name, split, folders[split]) for label in labels]
    for split, (rows, content, _) in built.items():
        _write(folders[split], split, rows, {"format": _FORMAT, **content, "classes": list(names)})


def class_names(folder: Path, labels: Iterable[int | str]) -> tuple[str, ...]:
    """Those of classes.txt; else sorted names, or the numbers 0, 1, ... as text.

    Raises ConfigError for numbers and names together, gaps, or fewer than two classes.
    """
    seen = set(labels)
    if (folder / CLASSES).is_file():
        names = tuple((folder / CLASSES).read_text(encoding="utf-8").splitlines())
        if len(set(names)) < len(names) or not all(names):
            raise ConfigError(f"{folder / CLASSES} must hold different names, one a line; mend it.")
        return names
    numbers = {label for label in seen if isinstance(label, int)}
    if numbers and len(numbers) < len(seen):
        raise ConfigError(
            f"labels must be all numbers or all names, got both in {folder}; pack it again."
        )
    if len(seen) < 2:
        raise ConfigError(f"training shards must hold two classes or more, got {len(seen)}.")
    if not numbers:
        return tuple(sorted(str(label) for label in seen))
    if gap := sorted(set(range(max(numbers))) - numbers):
        raise ConfigError(
            f"labels must be 0, 1, ... without a gap, got none of {gap[0]} but {max(numbers)} in "
            f"{folder}; write the names of all classes into {folder / CLASSES}, one a line."
        )
    return tuple(str(n) for n in range(max(numbers) + 1))


def _number(
    label: int | str, number: dict[str, int], by_name: bool, split: str, folder: Path
) -> int:
    if isinstance(label, int) and not by_name:
        if label < len(number):
            return label
    elif str(label) in number:
        return number[str(label)]
    raise ConfigError(
        f"class {label} is in the shards of {split} in {folder}, but not among the "
        f"{len(number)} of training; correct the labels, or {CLASSES}."
    )


def index_files(folder: Path, split: str) -> tuple[Path, Path]:
    """The rows of a split's index, and the JSON about them."""
    return folder / f".index-{split}.npy", folder / f".index-{split}.json"


def _write(folder: Path, split: str, rows: np.ndarray, content: dict[str, Any]) -> None:
    """The rows, then the JSON that names their hash: a write that is cut off is noticed."""
    array, about = index_files(folder, split)
    scratch = array.with_name(f".{array.name}.{os.getpid()}.new.npy")
    try:
        np.save(scratch, rows)
        os.replace(scratch, array)
        digest = hashlib.sha256(rows.tobytes()).hexdigest()
        files.replace_json(about, {**content, "sha256": digest})
    except OSError as error:
        raise RunError(f"{about} was not written ({error.strerror}).") from None


def indexed_files(where: str | Path, split: str, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What the index of a split says of its files: see `table_of`.

    ConfigError if there is no index, or it is of other names.
    """
    return _content(where, split, paths)["shards"]


def _content(where: str | Path, split: str, paths: Sequence[Path]) -> dict[str, Any]:
    folder = paths[0].parent
    array, about = index_files(folder, split)
    content = files.json_object(about)
    again = f"make it: dist-looksam data index '{where}'"
    if content is None or not array.is_file():
        raise ConfigError(f"shards need an index, got none of {split} in {folder}; {again}.")
    if content.get("format") != _FORMAT:
        raise ConfigError(
            f"the index must be of format {_FORMAT}, got another in {about}; {again}."
        )
    table = content["shards"]
    if [row["name"] for row in table] != [path.name for path in paths]:
        raise ConfigError(
            f"the index of {split} must be of these {len(paths)} shards, got one of {len(table)} "
            f"others in {folder}; {again}."
        )
    return content


def read_index(where: str | Path, split: str, shards: Sequence[Path]) -> Index:
    """The index of a split. ConfigError if there is none, or the shards are not those indexed."""
    content = _content(where, split, shards)
    array, about = index_files(shards[0].parent, split)
    table, again = content["shards"], f"make it: dist-looksam data index '{where}'"
    with ThreadPoolExecutor(16) as pool:
        stats = list(pool.map(os.stat, shards))
    for path, row, now in zip(shards, table, stats, strict=True):
        if (now.st_size, now.st_mtime_ns) != (row["bytes"], row["mtime_ns"]):
            raise ConfigError(
                f"shards must be those that were indexed, got {path} with another size or time; "
                f"{again} (`cp -p` and `rsync -a` keep the time)."
            )
    rows = np.load(array, mmap_mode="r")
    right = rows.dtype == ROW and len(rows) == sum(row["samples"] for row in table)
    # .02 s for ImageNet's rows; a write that was cut off may have left rows of another JSON.
    if not right or hashlib.sha256(rows.view(np.uint8)).hexdigest() != content["sha256"]:
        raise ConfigError(f"{array} must be what {about} describes, got another; {again}.")
    return Index(
        shards=tuple(shards),
        class_names=tuple(content["classes"]),
        rows=rows,
        sizes=tuple(row["bytes"] for row in table),
        others={why: (count, first) for why, (count, first) in content["passed_over"].items()},
        digest=content["sha256"],
    )
