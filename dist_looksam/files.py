"""Files that several processes share: atomic replacement, free names, locks, JSON lines."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

import yaml

from .errors import RunError


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: at every moment it holds the old or the new text."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def replace_json(path: Path, content: Any) -> None:
    """`replace_text` of `content` as indented JSON."""
    replace_text(path, json.dumps(content, indent=1) + "\n")


def json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def nearest(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that exists."""
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if p.exists())


def unwritable(folder: Path) -> Path | None:
    """What keeps `folder` from being made or written: itself, or the nearest parent that exists.

    None where nothing does. Makes nothing.
    """
    there = nearest(folder)
    return None if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else there


def first_free(stem: Path | str, end: str = "", *, start: int = 0) -> Path:
    """The first of STEM + n + END, n = start, start + 1, ..., that does not exist."""
    number = start
    while (path := Path(f"{stem}{number}{end}")).exists():
        number += 1
    return path


def lock(file: IO[str], *, shared: bool = False) -> bool | None:
    """Take an flock until the file is closed or the process ends. Does not wait.

    Returns True if it was taken, False if another process holds it, None where the file system has
    no locks. A `shared` lock needs only a file opened for reading.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


class _Once(yaml.SafeLoader):
    """Refuses a mapping that names a key twice: the later value would win without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    f"{key.value} is there twice", None, None, key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def yaml_of(text: str | bytes) -> Any:
    """What a YAML text that a user wrote says. YAMLError, too, where a key is there twice."""
    return yaml.load(text, _Once)


def _object(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"a JSON object is needed, got {found!r:.50}")
    return found


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one per line; [] where there is no file.

    An incomplete last line is left out: its writer was killed, or is still writing it.
    Raises RunError for any other damaged line.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_object(json.loads(line)))
        except ValueError as error:
            if number == len(lines):
                break
            raise RunError(f"{path} is damaged at line {number}: repair or remove it.") from error
    return rows
