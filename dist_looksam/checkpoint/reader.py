"""Finds checkpoints, checks them, and reads pieces: JSON and safetensors, no code is run."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..backends.names import clean
from ..errors import ConfigError, RunError
from .form import BY_CODE, FORMATS, MANIFEST, digest_of, read_json
from .values import unpack

_NAME = re.compile(r"step-(\d+)")
_PART = re.compile(r"rank-\d{5,}")
_LARGEST = 2**30  # bytes of a manifest; 1024 ranks of ViT-L write 40 MB


def found(folder: Path) -> list[Path]:
    """Committed checkpoints in a run's checkpoints/, the newest first."""
    steps = [
        (int(m.group(1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (m := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(steps, reverse=True)]


def candidates(path: Path) -> list[Path]:
    """The checkpoint `path`, or those in the folder or the run directory `path`, newest first."""
    if (path / MANIFEST).exists():
        return [path]
    return found(path) or found(path / "checkpoints")


class Reader:
    """One checkpoint, opened for reading pieces.

    Attributes:
        manifest: content of manifest.json. step: optimizer steps done.
        keys: of the slots besides "weight": "g_v", "exp_avg", ...
        shapes: of the layers, by name, without the prefixes of wrappers.
        extra: the `extra` given to the writer.

    Raises:
        RunError: no checkpoint, a damaged one, or one of a newer version of the program.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        manifest = path / MANIFEST
        try:
            if manifest.stat().st_size > _LARGEST:
                raise ValueError("far too large")
            self.manifest = read_json(manifest)
            self.shapes: dict[str, list[int]] = {}
            self._index: dict[tuple[str, str], list[_Place]] = {}
            self._buffers: dict[str, dict[int, str]] = {}  # name -> part -> its name there
            self._values: dict[str, int] = {}  # name of a tensor in the counters -> part
            self._check()
        except FileNotFoundError:
            raise RunError(f"{path} has no {MANIFEST}, so it is not a whole checkpoint.") from None
        except OSError as error:
            raise RunError(f"{manifest} cannot be read ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{manifest} is damaged or foreign ({error}).") from error
        self.step = int(self.manifest["step"])
        self.extra: dict[str, Any] = self.manifest["extra"]
        self.passes: int | None = self.manifest.get("passes", self.extra.get("passes"))
        self.keys = sorted({key for _, key in self._index} - {"weight"})
        self._prefix = ""
        self._open: dict[int, Any] = {}

    def _check(self) -> None:
        if self.manifest["format"] not in FORMATS:
            known = " and ".join(map(str, FORMATS))
            raise ValueError(f"format {self.manifest['format']!r}, this version reads {known}")
        self.shapes = {clean(name): shape for name, shape in self.manifest["shapes"].items()}
        numel = {name: torch.Size(s).numel() for name, s in self.manifest["shapes"].items()}
        for number, part in enumerate(self.manifest["parts"]):
            if not _PART.fullmatch(part["file"]):  # it could be a path out of the folder
                raise ValueError(f"part named {part['file']!r}")
            for layer, key, start, stop in part["pieces"]:
                if not 0 <= start < stop <= numel[layer]:
                    raise ValueError(f"piece [{start}, {stop}) of {layer}")
                place = _Place(start, stop, number, layer)
                self._index.setdefault((clean(layer), key), []).append(place)
            for name in part["buffers"]:
                self._buffers.setdefault(clean(name), {})[number] = name
            self._values |= dict.fromkeys(part.get("values", ()), number)

    def part_file(self, number: int) -> Path:
        """The file of part `number`."""
        return self.path / f"{self.manifest['parts'][number]['file']}.safetensors"

    def verify(self, parts: Iterable[int] | None = None) -> None:
        """RunError unless the given parts, or all, exist with their size and checksum."""
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

    def __call__(self, name: str, key: str, start: int, stop: int) -> Tensor | None:
        """Entries [start, stop) of a slot, flat, as they were written; None: no such slot."""
        places = self._index.get((name, key))
        if places is None:
            if key != "weight":
                return None
            if start == stop:
                return torch.zeros(0)
            if name in self._buffers:  # it was not trained
                return self.unlayered(name, 0, 1).reshape(-1)[start:stop]
            raise ConfigError(
                f"the checkpoint must be of the same model, got no layer {name} in {self.path}."
            )
        try:
            return self._join(name, key, places, start, stop)
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"{self.path} does not hold {key} of {name} ({error}).") from error

    def _join(self, name: str, key: str, places: list["_Place"], start: int, stop: int) -> Tensor:
        out, filled = None, 0
        for low, high, number, layer in places:
            rows = self._file(number).get_slice(f"{key}/{low}/{layer}")
            if out is None:
                out = torch.zeros(stop - start, dtype=BY_CODE[rows.get_dtype()])
            first, last = max(start, low), min(stop, high)
            if first < last:
                out[first - start : last - start] = rows[first - low : last - low]
                filled += last - first
        assert out is not None
        if filled != stop - start:
            raise RunError(f"{self.path} lacks entries of {key} of {name}.")
        return out

    def unlayered(self, name: str, rank: int, ranks: int) -> Tensor:
        """A buffer or frozen parameter, for one of `ranks`.

        Running statistics are each rank's own; on another number of ranks all get rank 0's.
        """
        parts = self._buffers.get(name)
        if parts is None:  # it was trained, or sharded
            whole = self(name, "weight", 0, torch.Size(self.shapes[name]).numel())
            assert whole is not None
            return whole.view(self.shapes[name])
        number = rank if ranks == len(self.manifest["parts"]) and rank in parts else min(parts)
        return self._tensor(number, f"buffer/{parts[number]}")

    def _tensor(self, number: int, name: str) -> Tensor:
        try:
            return self._file(number).get_tensor(name)
        except (SafetensorError, OSError, KeyError) as error:
            raise RunError(f"{self.path} does not hold {name} ({error}).") from error

    def tensor_shapes(self) -> dict[str, list[int]]:
        """The shapes of all layers, frozen parameters and buffers."""
        shapes = dict(self.shapes)
        for name, parts in self._buffers.items():
            number = min(parts)
            rows = self._file(number).get_slice(f"buffer/{parts[number]}")
            shapes[name] = list(rows.get_shape())
        return shapes

    def check_complete(self) -> None:
        """RunError unless the pieces cover every slot from its first entry to its last."""
        for (name, key), places in self._index.items():
            at = 0
            for place in sorted(places):
                at = max(at, place.stop) if place.start <= at else at
            if at != torch.Size(self.shapes[name]).numel():
                raise RunError(f"{self.path} lacks entries of {key} of {name}.")

    def drop_prefix(self, prefix: str) -> None:
        """Remove `prefix`, which all names must have."""
        self._prefix = prefix
        self.shapes = {name.removeprefix(prefix): shape for name, shape in self.shapes.items()}
        self._index = {(n.removeprefix(prefix), k): v for (n, k), v in self._index.items()}
        self._buffers = {name.removeprefix(prefix): v for name, v in self._buffers.items()}

    @property
    def counters(self) -> dict[str, Any]:
        """The result of `Backend.counters` when it was saved."""
        counters = self._unpacked(self.manifest["counters"])
        layers = {self._named(n): state for n, state in counters["layers"].items()}
        if self.manifest["format"] == 2:  # had numbers only, without their dtypes
            layers = {
                n: {k: torch.tensor(v) for k, v in state.items()} for n, state in layers.items()
            }
        groups = [
            {**group, "layers": [self._named(n) for n in group["layers"]]}
            for group in counters.get("groups", ())
        ]
        return {**counters, "layers": layers, **({"groups": groups} if groups else {})}

    @property
    def extra_states(self) -> dict[str, Any]:
        """The results of the modules' get_extra_state when it was saved, by name."""
        states = self._unpacked(self.manifest.get("extra_states", {}))
        return {self._named(n): state for n, state in states.items()}

    def _named(self, name: str) -> str:
        return clean(name).removeprefix(self._prefix)

    def _unpacked(self, packed: Any) -> Any:
        def tensor(name: str) -> Tensor:
            if name not in self._values:
                raise RunError(f"{self.path} does not hold {name}.")
            return self._tensor(self._values[name], f"value/{name}")

        return unpack(packed, tensor)


class _Place(NamedTuple):
    """A piece: entries [start, stop) of a slot, its part, and the layer's name there."""

    start: int
    stop: int
    part: int
    layer: str
