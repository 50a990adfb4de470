"""Checkpoints that any number of ranks and any backend can read back.

checkpoints/step-N/
    rank-00000.safetensors ...   flat pieces, named "<key>/<start>/<layer>"
    manifest.json                written last: which pieces are where, checksums, counters, settings

A layer's slot (its weight, g_v, exp_avg, ...) is cut into pieces, entries [start, stop) of the
flattened tensor; every rank writes its own, and a reader puts together whatever it needs. The
directory is written under another name and renamed when it is complete, so what has the name
step-N is whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .backends.backend import Backend
from .errors import ConfigError, RunError

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")


def _slices(backend: Backend) -> Iterator[tuple[str, str, int, Tensor]]:
    """(layer, key, start, flat tensor) of what this rank writes.

    Ranks that hold the same piece share it out, so that every entry is written once.
    """
    pieces = backend.pieces()
    replicated = getattr(backend, "replicated", True)
    parts, part = (backend.size, backend.rank) if replicated else (1, 0)
    for piece, slots in zip(pieces, backend.slots(), strict=True):
        length = piece.stop - piece.start
        low, high = (length * n // parts for n in (part, part + 1))
        if low == high:
            continue
        for key, values in slots.items():
            yield piece.name, key, piece.start + low, values[low:high]


def save(backend: Backend, folder: Path, step: int, extra: dict[str, Any]) -> Path:
    """Write folder/step-N. Every rank calls it; it returns when the checkpoint is complete.

    `extra`: settings and whatever else the caller wants back, JSON.
    """
    final, scratch = folder / f"step-{step}", folder / f".step-{step}.writing"
    if backend.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    backend.gather(None)
    name = f"rank-{backend.rank:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    table: list[tuple[str, str, int, int]] = []
    for layer, key, start, values in _slices(backend):
        tensors[f"{key}/{start}/{layer}"] = values.detach().to("cpu", torch.float32).clone()
        table.append((layer, key, start, start + values.numel()))
    save_file(tensors, scratch / name)
    part: dict[str, Any] = {"file": name, "sha256": _digest(scratch / name), "pieces": table}
    part["bytes"] = (scratch / name).stat().st_size
    parts = backend.gather(part)
    if backend.rank == 0:
        shapes = {p.name: list(p.shape) for p in backend.pieces()}
        manifest = {
            "format": FORMAT,
            "step": step,
            "ranks": backend.size,
            "backend": backend.name,
            "torch": torch.__version__,
            "shapes": shapes,
            "counters": backend.counters(),
            "extra": extra,
            "parts": parts,
        }
        _commit(scratch, final, manifest)
    backend.gather(None)
    return final


def _commit(scratch: Path, final: Path, manifest: dict[str, Any]) -> None:
    for path in scratch.iterdir():
        _sync(path)
    (scratch / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    _sync(scratch / MANIFEST)
    _sync(scratch)
    if final.exists():
        shutil.rmtree(final)
    os.rename(scratch, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def found(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's checkpoints/, the newest first."""
    steps = [
        (int(m.group(1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (m := _NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(steps, reverse=True)]


class Reader:
    """One checkpoint, opened for reading pieces.

    Raises RunError if a part is missing or is not what the manifest says.
    """

    def __init__(self, path: Path) -> None:
        if not (path / MANIFEST).is_file():
            raise ConfigError(
                f"resume must name a checkpoint, got {path}, which has no {MANIFEST}."
            )
        self.path = path
        try:
            self.manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            self._index: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
            for number, part in enumerate(self.manifest["parts"]):
                for layer, key, start, stop in part["pieces"]:
                    self._index.setdefault((layer, key), []).append((start, stop, number))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path / MANIFEST} is damaged ({error}): use another one.") from error
        self._open: dict[int, Any] = {}

    def verify(self) -> None:
        """Every part is there with its size and checksum, or RunError."""
        for part in self.manifest["parts"]:
            path = self.path / part["file"]
            if not path.is_file() or path.stat().st_size != part["bytes"]:
                raise RunError(f"{path} is missing or cut short: use another checkpoint.")
            if _digest(path) != part["sha256"]:
                raise RunError(f"{path} is damaged (its checksum differs): use another one.")

    def _file(self, number: int) -> Any:
        if number not in self._open:
            path = self.path / self.manifest["parts"][number]["file"]
            try:
                self._open[number] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise RunError(f"{path} cannot be read ({error}): use another one.") from error
        return self._open[number]

    def __call__(self, name: str, key: str, start: int, stop: int) -> Tensor | None:
        """Entries [start, stop) of a slot, flat, fp32; None if the checkpoint has no such slot."""
        places = self._index.get((name, key))
        if places is None:
            if key == "weight":
                raise ConfigError(
                    f"the checkpoint must be of the same model, got no layer {name} in {self.path}."
                )
            return None
        out = torch.empty(stop - start)
        filled = 0
        for low, high, number in places:
            first, last = max(start, low), min(stop, high)
            if first < last:
                rows = self._file(number).get_slice(f"{key}/{low}/{name}")
                out[first - start : last - start] = rows[first - low : last - low]
                filled += last - first
        if filled != stop - start:
            raise RunError(f"{self.path} lacks {key} of {name} in part: use another checkpoint.")
        return out
