"""Tar files of samples in the WebDataset layout: found, scanned and indexed.

A sample is the members of one shard with the same key: the path up to the first dot of its base
name. One member is a picture; its label is in KEY.cls (a number or a class name) or in KEY.json,
as "label" or "cls".
"""

import json
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from .index import ROW, SPLITS, table_of, write
from .pictures import SUFFIXES, VAL_NAMES

_END = 1024  # zero bytes after the last member
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


def shards_of(where: str | Path) -> dict[str, list[Path]]:
    """The shards of each split: a folder's *.tar, or those that a pattern like
    DIR/{train,val}-{000..146}.tar names. A name tells its split by its first word.

    Raises:
        ConfigError: a split has no shards, a shard is missing, or a name tells no split.
    """
    return _found(where)[0]


def _found(where: str | Path) -> tuple[dict[str, list[Path]], dict[str, tuple[int, str]]]:
    """The shards of each split, and those passed over."""
    paths = listed(where, "*.tar")
    if not paths:
        packed = _packed(Path(where))
        why = "compressed ones, which cannot be read at random" if packed else "none"
        raise ConfigError(
            f"--data_dir must hold shards like train-000000.tar, got {why} in {where}; make "
            f"them: dist-looksam data pack SOURCE {where}."
        )
    found, others = by_split(paths, "shards")
    if lacking := [split for split in SPLITS if not found[split]]:
        raise ConfigError(
            f"--data_dir must hold shards of train and of val, got none of {lacking[0]} in {where};"
            f" add {lacking[0]}-000000.tar."
        )
    return found, others


def _packed(folder: Path) -> list[Path]:
    """Compressed tar files, by their names."""
    named = re.compile(r"[^.].*\.(tar\.(gz|bz2|xz|zst)|tgz)")
    return sorted(path for path in folder.glob("*") if named.fullmatch(path.name))


def listed(where: str | Path, kind: str) -> list[Path]:
    """The files that a brace pattern names, or a folder's files of a kind like *.tar.

    ConfigError if a named one is missing, or `where` is on no file system.
    """
    if "://" in str(where) or str(where).startswith("pipe:"):
        raise ConfigError(
            f"--data_dir must be on a file system, got {where}; copy the shards to a disk first."
        )
    if "{" not in str(where):
        return sorted(Path(where).glob(kind), key=_natural)
    paths = [Path(name) for name in expand(str(where))]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(
            f"--data_dir names {len(paths)} shards, got no {missing[0]}"
            f"{f' and {len(missing) - 1} others' if missing[1:] else ''}; correct the pattern."
        )
    return paths


def by_split(
    paths: Sequence[Path], kind: str
) -> tuple[dict[str, list[Path]], dict[str, tuple[int, str]]]:
    """The files of train and of the first of VAL_NAMES that has some, told by the first word of
    their names, and those passed over: test files where there are validation ones.

    ConfigError for other words.
    """
    words: dict[str, list[Path]] = {word: [] for word in ("train", *VAL_NAMES)}
    for path in paths:
        word = re.split(r"[^a-z]", path.name.lower())[0]
        if word not in words:
            raise ConfigError(
                f"a shard's name must begin with train, {', '.join(VAL_NAMES[:-1])} or "
                f"{VAL_NAMES[-1]}, got {path}; rename it."
            )
        words[word].append(path)
    val = next((word for word in VAL_NAMES if words[word]), "val")
    others = [path for word in VAL_NAMES if word != val for path in words[word]]
    passed_over = {f"{kind} beside those of {val}": (len(others), str(others[0]))} if others else {}
    return {"train": words["train"], "val": words[val]}, passed_over


def expand(pattern: str) -> list[str]:
    """The names of a brace pattern: {000..011}, zero-padded to the first number's width, {a,b}."""
    parts = re.split(r"(\{[^{}]*\})", pattern)
    if any("{" in part or "}" in part for part in parts[::2]):
        raise ConfigError(f"--data_dir has unmatched or nested braces, got {pattern}; correct it.")
    return ["".join(words) for words in product(*(_choices(part) for part in parts))]


def _choices(part: str) -> list[str]:
    if not part.startswith("{"):
        return [part]
    span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
    if span is None:
        return part[1:-1].split(",")
    first, last = int(span[1]), int(span[2])
    return [f"{n:0{len(span[1])}d}" for n in range(first, last + 1)]


def _natural(path: Path) -> list[Any]:
    """Sorts shard-2 before shard-10."""
    return [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", path.name)]


@dataclass
class Scan:
    """The samples of one shard. labels are as written: whole numbers or names.

    others: reason -> (number of members that are no samples, the first).
    """

    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    others: dict[str, tuple[int, str]] = field(default_factory=dict)

    def pass_over(self, why: str, name: str) -> None:
        count, first = self.others.get(why, (0, name))
        self.others[why] = count + 1, first


def scan(path: Path) -> Scan:
    """Read the headers of a shard, and its labels.

    Raises:
        ConfigError: it is compressed, cut off, or holds a sample without label, with two pictures,
            or with a part twice.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start in _COMPRESSED:
        raise _wrong(path, f"is compressed ({_COMPRESSED[start]}), so that no sample can be found "
                     "alone; pack it again, without compression")  # fmt: skip
    found = Scan()
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _take(member, path, samples, found)
            end = tar.offset
    except tarfile.TarError as error:
        raise _wrong(path, f"cannot be read ({error}); copy it again") from None
    with path.open("rb") as file:
        for key, parts in samples.items():
            _sample(file, path, key, parts, found)
        _check_end(file, path, end)
    return found


def _wrong(path: Path, what: str) -> ConfigError:
    return ConfigError(f"every shard must be a whole tar file of samples, but {path} {what}.")


def _take(
    member: tarfile.TarInfo,
    path: Path,
    samples: dict[str, dict[str, tuple[int, int]]],
    found: Scan,
) -> None:
    folder, _, base = member.name.rpartition("/")
    key, dot, kind = base.partition(".")
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        raise _wrong(path, f"holds {member.name}, a link, device or sparse file; pack it again")
    if not dot or not key:
        found.pass_over("hidden" if base.startswith(".") else "names without a dot", member.name)
        return
    if member.offset_data + member.size > path.stat().st_size:
        raise _wrong(path, f"is cut off in {member.name}; copy it again")
    parts = samples.setdefault(f"{folder}/{key}", {})
    kind = kind.lower()
    if kind in parts:
        raise _wrong(path, f"holds {member.name} twice; pack it again")
    parts[kind] = member.offset_data, member.size


def _sample(
    file: Any, path: Path, key: str, parts: dict[str, tuple[int, int]], found: Scan
) -> None:
    pictures = [kind for kind in parts if f".{kind.rpartition('.')[2]}" in SUFFIXES]
    if not pictures:
        found.pass_over("no picture", key.lstrip("/"))
        return
    if len(pictures) > 1:
        raise _wrong(path, f"has two pictures of {key.lstrip('/')}, {' and '.join(pictures)}; take "
                     "one of them out")  # fmt: skip
    offset, size = parts[pictures[0]]
    found.labels.append(_label(file, path, key, parts))
    found.offsets.append(offset)
    found.sizes.append(size)


def _label(file: Any, path: Path, key: str, parts: dict[str, tuple[int, int]]) -> int | str:
    """The number or the name of a sample's class."""

    def text(kind: str) -> str:
        offset, size = parts[kind]
        return os.pread(file.fileno(), size, offset).decode("utf-8").strip()

    value: Any = None
    try:
        if "cls" in parts:
            value = text("cls")
        elif "json" in parts:
            content = json.loads(text("json"))
            value = content.get("label", content.get("cls"))
    except (ValueError, AttributeError):
        value = None
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise _wrong(path, f"has no label of {key.lstrip('/')}; add {key.lstrip('/')}.cls, or a "
                     '"label" in its .json')  # fmt: skip
    if isinstance(value, int) and value < 0:
        raise _wrong(path, f"gives {key.lstrip('/')} the label {value}, as test sets without "
                     "labels do; take another split")  # fmt: skip
    return value


def _check_end(file: Any, path: Path, end: int) -> None:
    """Zero bytes and nothing else behind the last member."""
    file.seek(end)
    rest = file.read(_END)
    if len(rest) < _END or any(rest):
        raise _wrong(path, "has no end mark, as a copy that was cut off; copy it again")
    while rest := file.read(2**20):
        if any(rest):
            raise _wrong(path, "goes on behind its end, as joined tar files do; separate them")


def build(
    shards: Sequence[Path], checksums: bool = False
) -> tuple[np.ndarray, dict[str, Any], list[int | str]]:
    """(rows without labels, the JSON, the labels) of a split's shards."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        scans = list(pool.map(scan, shards))
    counts = [len(one.labels) for one in scans]
    rows = np.zeros(sum(counts), dtype=ROW)
    rows["shard"] = np.repeat(np.arange(len(shards)), counts)
    rows["offset"] = [n for one in scans for n in one.offsets]
    rows["size"] = [n for one in scans for n in one.sizes]
    others: dict[str, tuple[int, str]] = {}
    for path, one in zip(shards, scans, strict=True):
        for why, (count, first) in one.others.items():
            before = others.get(why, (0, f"{path}: {first}"))
            others[why] = before[0] + count, before[1]
    content = {"shards": table_of(shards, counts, checksums=checksums), "passed_over": others}
    return rows, content, [label for one in scans for label in one.labels]


def write_index(where: str | Path, *, checksums: bool = False) -> dict[str, tuple[int, int]]:
    """Index all splits; returns {split: (samples, shards)}.

    Raises:
        ConfigError: a shard is not right, labels have gaps, or val has a class that train has not.
        RunError: the folder cannot be written.
    """
    found, beside = _found(where)
    built = {split: build(found[split], checksums) for split in SPLITS}
    built["val"][1]["passed_over"].update(beside)
    if "{" not in str(where) and (others := _packed(Path(where))):
        built["train"][1]["passed_over"]["compressed tar files"] = len(others), str(others[0])
    write({split: found[split][0].parent for split in SPLITS}, built)
    return {split: (len(built[split][0]), len(found[split])) for split in SPLITS}
