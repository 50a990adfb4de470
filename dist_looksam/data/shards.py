"""Tar files of samples in the WebDataset layout, and the index by which they are read at random.

A sample is the members of one shard with the same key: the path up to the first dot of its base
name. One member is a picture; its label is in KEY.cls (a number or a class name) or in KEY.json,
as "label" or "cls". The index of a split is two files beside the shards:

.index-SPLIT.npy   one `ROW` for each sample, in the order of the shards and of their members
.index-SPLIT.json  classes; name, size, time and samples of each shard; the hash of the rows
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..errors import ConfigError, RunError
from .pictures import SUFFIXES, VAL_NAMES

ROW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
SPLITS = ("train", "val")
CLASSES = "classes.txt"  # beside the shards: a name a line, in the order of the labels
_FORMAT = 1
_END = 1024  # zero bytes after the last member
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


def shards_of(where: str | Path) -> dict[str, list[Path]]:
    """The shards of each split: a folder's *.tar, or those that a pattern like
    DIR/{train,val}-{000..146}.tar names. A name tells its split by its first word.

    Raises:
        ConfigError: nothing is there, a shard is missing, or a name tells no split.
    """
    if "://" in str(where) or str(where).startswith("pipe:"):
        raise ConfigError(
            f"--data_dir must be on a file system, got {where}; copy the shards to a disk first."
        )
    if "{" in str(where):
        paths = [Path(name) for name in expand(str(where))]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise ConfigError(
                f"--data_dir names {len(paths)} shards, got no {missing[0]}"
                f"{f' and {len(missing) - 1} others' if missing[1:] else ''}; correct the pattern."
            )
    else:
        paths = sorted(Path(where).glob("*.tar"), key=_natural)
        if not paths:
            packed = any(Path(where).glob("*.tar.*")) or any(Path(where).glob("*.tgz"))
            why = "compressed ones, which cannot be read at random" if packed else "none"
            raise ConfigError(
                f"--data_dir must hold shards like train-000000.tar, got {why} in {where}; make "
                f"them: dist-looksam data pack SOURCE {where}."
            )
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in paths:
        word = re.split(r"[^a-z]", path.name.lower())[0]
        if word not in ("train", *VAL_NAMES):
            raise ConfigError(
                f"a shard's name must begin with train, {', '.join(VAL_NAMES[:-1])} or "
                f"{VAL_NAMES[-1]}, got {path}; rename it."
            )
        found["train" if word == "train" else "val"].append(path)
    return found


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


@dataclass(frozen=True, kw_only=True)
class Index:
    """The samples of a split. rows: `ROW`, mapped from the file."""

    shards: tuple[Path, ...]
    class_names: tuple[str, ...]
    rows: np.ndarray
    others: dict[str, tuple[int, str]]
    digest: str


def build(split: str, shards: Sequence[Path]) -> tuple[np.ndarray, dict[str, Any], list[Scan]]:
    """(offset rows without labels, the JSON, the scans) of a split's shards."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        scans = list(pool.map(scan, shards))
    counts = [len(one.labels) for one in scans]
    rows = np.zeros(sum(counts), dtype=ROW)
    rows["shard"] = np.repeat(np.arange(len(shards)), counts)
    rows["offset"] = [n for one in scans for n in one.offsets]
    rows["size"] = [n for one in scans for n in one.sizes]
    table = []
    for path, count in zip(shards, counts, strict=True):
        found = path.stat()
        row = {"name": path.name, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
        table.append({**row, "samples": count})
    others: dict[str, tuple[int, str]] = {}
    for path, one in zip(shards, scans, strict=True):
        for why, (count, first) in one.others.items():
            before = others.get(why, (0, f"{path}: {first}"))
            others[why] = before[0] + count, before[1]
    return rows, {"format": _FORMAT, "shards": table, "passed_over": others}, scans


def write_index(where: str | Path) -> dict[str, tuple[int, int]]:
    """Index all splits; returns {split: (samples, shards)}.

    Raises:
        ConfigError: a shard is not right, labels have gaps, or val has a class that train has not.
        RunError: the folder cannot be written.
    """
    found = shards_of(where)
    for split in SPLITS:
        if not found[split]:
            raise ConfigError(
                f"--data_dir must hold shards of train and of val, got none of {split} in {where}; "
                f"add {split}-000000.tar."
            )
    built = {split: build(split, found[split]) for split in SPLITS}
    labels = {s: [label for one in built[s][2] for label in one.labels] for s in SPLITS}
    names = class_names(found["train"][0].parent, labels["train"])
    number = {name: n for n, name in enumerate(names)}
    for split, (rows, _, _) in built.items():
        rows["label"] = [_number(label, number, split, found[split][0]) for label in labels[split]]
    done = {}
    for split, (rows, content, _) in built.items():
        _write(found[split][0].parent, split, rows, {**content, "classes": list(names)})
        done[split] = len(rows), len(found[split])
    return done


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


def _number(label: int | str, number: dict[str, int], split: str, shard: Path) -> int:
    if isinstance(label, int) and label < len(number):
        return label
    if str(label) in number:
        return number[str(label)]
    raise ConfigError(
        f"class {label} is in the shards of {split} beside {shard}, but not among the "
        f"{len(number)} of training; correct the labels, or {CLASSES}."
    )


def _paths(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f".index-{split}.npy", folder / f".index-{split}.json"


def _write(folder: Path, split: str, rows: np.ndarray, content: dict[str, Any]) -> None:
    """The rows, then the JSON that names their hash: a write that is cut off is noticed."""
    array, about = _paths(folder, split)
    scratch = array.with_name(f".{array.name}.{os.getpid()}.new.npy")
    try:
        np.save(scratch, rows)
        os.replace(scratch, array)
        digest = hashlib.sha256(rows.tobytes()).hexdigest()
        files.replace_json(about, {**content, "sha256": digest})
    except OSError as error:
        raise RunError(f"{about} was not written ({error.strerror}).") from None


def read_index(where: str | Path, split: str, shards: Sequence[Path]) -> Index:
    """The index of a split. ConfigError if there is none, or the shards are not those indexed."""
    folder = shards[0].parent
    array, about = _paths(folder, split)
    content = files.json_object(about)
    again = f"make it: dist-looksam data index '{where}'"
    if content is None or not array.is_file():
        raise ConfigError(f"shards need an index, got none of {split} in {folder}; {again}.")
    if content.get("format") != _FORMAT:
        raise ConfigError(
            f"the index must be of format {_FORMAT}, got another in {about}; {again}."
        )
    table = content["shards"]
    if [row["name"] for row in table] != [path.name for path in shards]:
        raise ConfigError(
            f"the index of {split} must be of these {len(shards)} shards, got one of {len(table)} "
            f"others in {folder}; {again}."
        )
    with ThreadPoolExecutor(16) as pool:
        stats = list(pool.map(os.stat, shards))
    for path, row, now in zip(shards, table, stats, strict=True):
        if (now.st_size, now.st_mtime_ns) != (row["bytes"], row["mtime_ns"]):
            raise ConfigError(
                f"shards must be those that were indexed, got {path} with another size or time; "
                f"{again} (`cp -p` and `rsync -a` keep the time)."
            )
    rows = np.load(array, mmap_mode="r")
    if rows.dtype != ROW or len(rows) != sum(row["samples"] for row in table):
        raise ConfigError(f"{array} must be what {about} describes, got another; {again}.")
    return Index(
        shards=tuple(shards),
        class_names=tuple(content["classes"]),
        rows=rows,
        others={why: (count, first) for why, (count, first) in content["passed_over"].items()},
        digest=content["sha256"],
    )
