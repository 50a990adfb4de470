"""Checkpoints found, checked, and read piece by piece. No code runs from one: JSON, safetensors."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..backends.names import clean
from ..errors import ConfigError, RunError
from .form import DTYPES, FORMATS, MANIFEST, digest_of, read_json
from .values import unpack

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
        shapes: of the layers, by name. Names are without what wrappers put into them.
        extra: what the writer was given.

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
            self.shapes: dict[str, list[int]] = {}
            self._index: dict[tuple[str, str], list[_Place]] = {}
            self._buffers: dict[str, dict[int, str]] = {}  # name -> part -> its name there
            self._values: dict[str, int] = {}  # tensors among the counters -> part
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
            if not _PART.fullmatch(part["file"]):  # no way out of the folder
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

    def __call__(self, name: str, key: str, start: int, stop: int) -> Tensor | None:
        """Entries [start, stop) of a slot, flat, as they were written; None: no such slot."""
        places = self._index.get((name, key))
        if places is None:
            if key == "weight" and start == stop:
                return torch.zeros(0)
            if key == "weight" and name in self._buffers:  # it was not trained
                return self.unlayered(name, 0, 1).reshape(-1)[start:stop]
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
        self, name: str, key: str, places: list["_Place"], start: int, stop: int
    ) -> Tensor:
        out, filled = None, 0
        for low, high, number, layer in places:
            rows = self._file(number).get_slice(f"{key}/{low}/{layer}")
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

    def unlayered(self, name: str, rank: int, ranks: int) -> Tensor:
        """A buffer or frozen parameter, for one of `ranks`.

        Statistics are each rank's own; to another number of ranks all get those of rank 0.
        """
        parts = self._buffers.get(name)
        if parts is None:  # it was trained, or cut up
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
        """Of layers, frozen parameters and buffers: all that the model's tensors are in."""
        found = dict(self.shapes)
        for name, parts in self._buffers.items():
            number = min(parts)
            rows = self._file(number).get_slice(f"buffer/{parts[number]}")
            found[name] = list(rows.get_shape())
        return found

    def check_complete(self) -> None:
        """RunError unless every slot is held from its first entry to its last."""
        for (name, key), places in self._index.items():
            at = 0
            for place in sorted(places):
                at = max(at, place.stop) if place.start <= at else at
            if at != torch.Size(self.shapes[name]).numel():
                raise RunError(f"{self.path} lacks entries of {key} of {name}.")

    def drop_prefix(self, prefix: str) -> None:
        """Names go on without `prefix`, which all of them must have."""
        self._prefix = prefix
        self.shapes = {name.removeprefix(prefix): shape for name, shape in self.shapes.items()}
        self._index = {(n.removeprefix(prefix), k): v for (n, k), v in self._index.items()}
        self._buffers = {name.removeprefix(prefix): v for name, v in self._buffers.items()}

    @property
    def counters(self) -> dict[str, Any]:
        """What `Backend.counters` returned."""
        found = self._unpacked(self.manifest["counters"])
        layers = {self._named(n): state for n, state in found["layers"].items()}
        if self.manifest["format"] == 2:  # held numbers alone, without their types
            layers = {
                n: {k: torch.tensor(v) for k, v in state.items()} for n, state in layers.items()
            }
        groups = [
            {**group, "layers": [self._named(n) for n in group["layers"]]}
            for group in found.get("groups", ())
        ]
        return {**found, "layers": layers, **({"groups": groups} if groups else {})}

    @property
    def extra_states(self) -> dict[str, Any]:
        """What the modules' get_extra_state returned."""
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
    """Entries [start, stop) of a slot are in a part, under the layer's name there."""

    start: int
    stop: int
    part: int
    layer: str
