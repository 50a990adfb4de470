"""Parquet files in Hugging Face's layout: image (struct of bytes and path) and label.

Files are named train-00000-of-00294.parquet, validation-..., in a folder or in its data/. A row
cannot be read alone: the unit is a row group, often of 100 rows, the last ones of which are kept in
memory. In the index of a split a row's offset is its row group, and its size its place in it.
"""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from .blocks import Blocks
from .index import ROW, SPLITS, Index, read_index, table_of, write
from .pictures import Pictures
from .shards import by_split, listed

_IMAGES = ("image", "img", "jpg", "png", "webp")
_LABELS = ("label", "labels", "cls", "class")
_KEPT = 2 * 2**30  # bytes of row groups in memory, for each split


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "--data parquet needs the package pyarrow, got none; install it: "
            "pip install 'dist-looksam[data]'."
        ) from None
    return pyarrow.parquet


def files_of(where: str | Path) -> tuple[dict[str, list[Path]], dict[str, tuple[int, str]]]:
    """The files of each split, and those passed over: test files where there are validation ones.

    Raises:
        ConfigError: a split has no files, one of a numbered set is missing, or a name tells none.
    """
    paths = listed(where, "*.parquet") or listed(Path(where) / "data", "*.parquet")
    found, others = by_split(paths, "Parquet files")
    if lacking := [split for split in SPLITS if not found[split]]:
        raise ConfigError(
            f"--data_dir must hold Parquet files of train and of validation, got none of "
            f"{lacking[0]} in {where}; they are named {lacking[0]}-00000-of-00001.parquet."
        )
    for split in SPLITS:
        _check_complete(found[split])
    return found, others


def _check_complete(paths: Sequence[Path]) -> None:
    numbers = [re.search(r"-(\d+)-of-(\d+)\.parquet$", path.name) for path in paths]
    there = {int(found[1]) for found in numbers if found}
    count = max((int(found[2]) for found in numbers if found), default=0)
    if missing := sorted(set(range(count)) - there):
        raise ConfigError(
            f"Parquet files must be all {count} of {paths[0].parent}, got {len(there)} and no "
            f"number {missing[0]}; download the rest."
        )


def _columns(schema: Any, path: Path) -> tuple[str, str]:
    """(column of the encoded pictures, of the labels) of an Arrow schema."""
    image = next((name for name in _IMAGES if name in schema.names), None)
    label = next((name for name in _LABELS if name in schema.names), None)
    if image is None or label is None:
        lacking = f"image ({', '.join(_IMAGES)})" if image is None else f"label ({_LABELS[0]})"
        raise ConfigError(
            f"Parquet files must have a column {lacking}, got {', '.join(schema.names)} in {path}; "
            f"rename it."
        )
    kind = str(schema.field(image).type)
    if kind.startswith("struct<") and "bytes: " in kind:
        return f"{image}.bytes", label
    if "binary" not in kind:
        raise ConfigError(
            f"column {image} must hold encoded pictures, got {kind} in {path}; save them as "
            f"Hugging Face's Image feature does."
        )
    return image, label


def _scan(path: Path) -> tuple[list[int], list[int | str], tuple[str, ...]]:
    """Rows of each row group, labels, and the names of the classes, if the file has them."""
    try:
        with _pyarrow().ParquetFile(path) as file:
            image, label = _columns(file.schema_arrow, path)
            groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
            labels = file.read(columns=[label]).column(0).to_pylist()
            about = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        why = str(error).splitlines()[0]
        raise ConfigError(f"every Parquet file must be whole, got {path} ({why}).") from None
    _check(path, image, groups, labels)
    feature = json.loads(about).get("info", {}).get("features", {}).get(label, {})
    return [group.num_rows for group in groups], labels, tuple(feature.get("names", ()))


def _check(path: Path, image: str, groups: Sequence[Any], labels: Sequence[Any]) -> None:
    """ConfigError for a row without a label or without a picture."""
    for label in labels:
        if (
            not isinstance(label, int | str)
            or label == ""
            or (isinstance(label, int) and label < 0)
        ):
            raise ConfigError(
                f"every row must have a label, got {label!r} in {path}; files without labels, as "
                f"of a test, cannot be used."
            )
    columns = (group.column(n) for group in groups for n in range(group.num_columns))
    about = (column.statistics for column in columns if column.path_in_schema == image)
    if any(found and found.null_count for found in about):
        raise ConfigError(
            f"{image} must hold the pictures, got rows with a path alone in {path}; save the data "
            f"set with its files embedded."
        )


def _build(
    paths: Sequence[Path], checksums: bool
) -> tuple[np.ndarray, dict[str, Any], list[int | str], dict[Path, tuple[str, ...]]]:
    """(rows without labels, the JSON, the labels, each file's names of the classes) of a split."""
    with ThreadPoolExecutor(8) as pool:
        scans = list(pool.map(_scan, paths))
    counts = [len(labels) for _, labels, _ in scans]
    rows = np.zeros(sum(counts), dtype=ROW)
    rows["shard"] = np.repeat(np.arange(len(paths)), counts)
    sizes = [np.asarray(groups, dtype=np.int64) for groups, _, _ in scans]
    rows["offset"] = np.concatenate([np.repeat(np.arange(len(s)), s) for s in sizes])
    rows["size"] = [n for groups in sizes for size in groups for n in range(size)]
    labels = [label for _, some, _ in scans for label in some]
    named = {path: names for path, (_, _, names) in zip(paths, scans, strict=True)}
    return rows, {"shards": table_of(paths, counts, checksums=checksums)}, labels, named


def _one_list(named: Mapping[Path, tuple[str, ...]]) -> tuple[str, ...]:
    """The names of the classes; none if no file has them. ConfigError if files have other ones: a
    label is a place in its own file's list."""
    path, names = next(((path, some) for path, some in named.items() if some), (None, ()))
    for other, some in named.items():
        if some and some != names:
            n = next(n for n, pair in enumerate(zip_longest(names, some)) if pair[0] != pair[1])
            a, b = (repr(s[n]) if n < len(s) else "none" for s in (names, some))
            raise ConfigError(
                f"Parquet files must all have the same classes in the same order, got class {n} "
                f"{a} in {path} and {b} in {other}; save them again with the classes of train."
            )
    return names


def write_index(where: str | Path, *, checksums: bool = False) -> dict[str, tuple[int, int]]:
    """Index both splits; returns {split: (samples, files)}. ConfigError, RunError: as of shards."""
    found, others = files_of(where)
    built = {split: _build(found[split], checksums) for split in SPLITS}
    for split in SPLITS:
        built[split][1]["passed_over"] = others if split == "val" else {}
    names = _one_list({path: some for split in SPLITS for path, some in built[split][3].items()})
    if len(set(names)) < len(names):  # ImageNet has two cranes
        names = tuple(
            f"{name} {n}" if names.count(name) > 1 else name for n, name in enumerate(names)
        )
    write(
        {split: found[split][0].parent for split in SPLITS},
        {split: parts[:3] for split, parts in built.items()},
        names,
    )
    return {split: (len(built[split][0]), len(found[split])) for split in SPLITS}


class Parquet(Pictures):
    """One split in Parquet files. groups_read counts the row groups that were read."""

    def __init__(self, index: Index, **how: Any) -> None:
        labels = torch.from_numpy(index.rows["label"].astype("int64"))
        super().__init__(index.class_names, labels, passed_over=index.others, **how)
        self.index = index
        self.groups_read = 0
        self._metadata: dict[int, Any] = {}
        self._groups: OrderedDict[tuple[int, int], Future[Any]] = OrderedDict()
        self._groups_lock = Lock()

    def path(self, index: int) -> str:
        row = self.index.rows[index]
        return f"{self.index.shards[row['shard']]}, row {row['size']} of row group {row['offset']}"

    def encoded(self, index: int) -> bytes:
        row = self.index.rows[index]
        data = self._group((int(row["shard"]), int(row["offset"])))[int(row["size"])].as_py()
        if data is None:
            raise OSError("the row has no bytes")
        return data

    def _group(self, key: tuple[int, int]) -> Any:
        """The pictures of a row group, an Arrow column; one thread reads it, others wait."""
        with self._groups_lock:
            mine = key not in self._groups
            future = self._groups.setdefault(key, Future())
            self._groups.move_to_end(key)
        if mine:
            try:
                future.set_result(self._read_group(*key))
            except BaseException as error:
                future.set_exception(error)
                with self._groups_lock:
                    self._groups.pop(key, None)
            self._drop()
        return future.result()

    def _read_group(self, file: int, group: int) -> Any:
        path = self.index.shards[file]
        known = self._metadata.get(file)
        with _pyarrow().ParquetFile(path, metadata=known) as opened:
            self._metadata[file] = opened.metadata
            image, _ = _columns(opened.schema_arrow, path)
            column = opened.read_row_group(group, columns=[image], use_threads=False).column(0)
        self.groups_read += 1
        return column.flatten()[0] if "." in image else column

    def _drop(self) -> None:
        """Forget the row groups that were not used for longest, beyond _KEPT bytes."""
        with self._groups_lock:
            done = [(k, f) for k, f in self._groups.items() if f.done() and not f.exception()]
            size = sum(future.result().nbytes for _, future in done)
            for key, future in done[:-1]:
                if size <= _KEPT:
                    break
                size -= future.result().nbytes
                del self._groups[key]

    def digest(self) -> str:
        """See source.Source.digest: of the index and the sizes of the files."""
        return hashlib.sha256(f"{self.index.digest} {self.index.sizes}".encode()).hexdigest()


def parquet(data_dir: str | Path, **how: Any) -> tuple[Parquet, Parquet]:
    """Training and validation split. ConfigError as of `files_of` and `index.read_index`."""
    _pyarrow()
    found, _ = files_of(data_dir)
    train, val = (read_index(data_dir, split, paths) for split, paths in found.items())
    return Parquet(train, **how), Parquet(val, **how)


def advice(train: Parquet, blocks: Blocks | None) -> tuple[str, ...]:
    """A warning where far more is read than is used."""
    if blocks is not None or sum(train.index.sizes) <= _KEPT:
        return ()
    rows = train.index.rows
    groups = 1 + np.count_nonzero(np.diff(rows["offset"]) | np.diff(rows["shard"]))
    return (
        f"warning: a row group of {len(train) / groups:.0f} images is read for each image in the "
        f"order full: pack the data (dist-looksam data pack), or use --shuffle block:B,W,c",
    )
