"""Checkpoints found, checked, and read piece by piece. No code runs from one: JSON, safetensors."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError, RunError
from .form import DTYPES, FORMAT, MANIFEST, digest_of, read_json

_NAME = re.compile(r"step-(\d+)")
_PART = re.compile(r"rank-\d{5,}")
_LARGEST = 2**30  # bytes of a manifest; 1024 ranks of ViT-L write 40 MB
_BY_CODE = {code: dtype for dtype, code in DTYPES.items()}


def found(folder: Path) -> list[Path]:
    """Committed checkpoints in a run's checkpoints/, the newest first."""
    steps = [
        (int(m.group(1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (m := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(steps, reverse=True)]


class Reader:
    """One checkpoint, opened for reading pieces.

    Attributes:
        manifest: what manifest.json says. step: optimizer steps done.
        keys: what is held besides weights: "g_v", "exp_avg", ...

    Raises:
        RunError: it is not a checkpoint, is damaged, or a newer version of the program wrote it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        manifest = path / MANIFEST
        try:
            if manifest.stat().st_size > _LARGEST:
                raise ValueError("far too large")
            self.manifest = read_json(manifest)
            self._index: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
            self._check()
        except FileNotFoundError:
            raise RunError(f"{path} has no {MANIFEST}, so it is not a whole checkpoint.") from None
        except OSError as error:
            raise RunError(f"{manifest} cannot be read ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{manifest} is damaged or foreign ({error}).") from error
        self.step = int(self.manifest["step"])
        self.keys = sorted({key for _, key in self._index} - {"weight"})
        self._open: dict[int, Any] = {}

    def _check(self) -> None:
        if self.manifest["format"] != FORMAT:
            raise ValueError(f"format {self.manifest['format']!r}, this version reads {FORMAT}")
        numel = {name: torch.Size(s).numel() for name, s in self.manifest["shapes"].items()}
        for number, part in enumerate(self.manifest["parts"]):
            if not _PART.fullmatch(part["file"]):  # no way out of the folder
                raise ValueError(f"part named {part['file']!r}")
            for layer, key, start, stop in part["pieces"]:
                if not 0 <= start < stop <= numel[layer]:
                    raise ValueError(f"piece [{start}, {stop}) of {layer}")
                self._index.setdefault((layer, key), []).append((start, stop, number))

    def part_file(self, number: int) -> Path:
        """The file of part `number`."""
        return self.path / f"{self.manifest['parts'][number]['file']}.safetensors"

    def verify(self, parts: Iterable[int] | None = None) -> None:
        """The given parts, or all, are there with their size and checksum; or RunError."""
        for number in range(len(self.manifest["parts"])) if parts is None else parts:
            part, path = self.manifest["parts"][number], self.part_file(number)
            try:
                size = path.stat().st_size
                if size != part["bytes"]:
                    raise RunError(f"{path} has {size} bytes of {part['bytes']}: it was cut short.")
                if digest_of(path) != part["sha256"]:
                    raise RunError(f"{path} is damaged: its checksum differs.")
            except FileNotFoundError:
                raise RunError(f"{path} is missing.") from None
            except OSError as error:
                raise RunError(f"{path} cannot be read ({error.strerror}).") from error
            self._file(number)

    def _file(self, number: int) -> Any:
        if number not in self._open:
            path = self.part_file(number)
            try:
                self._open[number] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise RunError(f"{path} is not a safetensors file ({error}).") from error
        return self._open[number]

    def shape(self, name: str) -> list[int] | None:
        """The shape of a layer; None if there is no such layer."""
        return self.manifest["shapes"].get(name)

    def __call__(self, name: str, key: str, start: int, stop: int) -> Tensor | None:
        """Entries [start, stop) of a slot, flat, as they were written; None: no such slot."""
        places = self._index.get((name, key))
        if places is None:
            if key == "weight":
                raise ConfigError(
                    f"the checkpoint must be of the same model, got no layer {name} in {self.path}."
                )
            return None
        try:
            return self._put_together(name, key, places, start, stop)
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"{self.path} does not hold {key} of {name} ({error}).") from error

    def _put_together(
        self, name: str, key: str, places: list[tuple[int, int, int]], start: int, stop: int
    ) -> Tensor:
        out, filled = None, 0
        for low, high, number in places:
            rows = self._file(number).get_slice(f"{key}/{low}/{name}")
            if out is None:
                out = torch.zeros(stop - start, dtype=_BY_CODE[rows.get_dtype()])
            first, last = max(start, low), min(stop, high)
            if first < last:
                out[first - start : last - start] = rows[first - low : last - low]
                filled += last - first
        assert out is not None
        if filled != stop - start:
            raise RunError(f"{self.path} lacks entries of {key} of {name}.")
        return out

    def buffers(self, rank: int, ranks: int) -> dict[str, Tensor]:
        """Running statistics and whatever else is no layer, for one of `ranks`.

        Statistics are each rank's own; to another number of ranks all get those of rank 0.
        """
        parts = [0] if ranks != len(self.manifest["parts"]) else sorted({0, rank})
        return {
            name: self._file(n).get_tensor(f"buffer/{name}")
            for n in parts
            for name in self.manifest["parts"][n]["buffers"]
        }
