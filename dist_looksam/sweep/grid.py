"""The YAML file of a sweep, and the points that it asks for.

A *point* is one run. A *trial* is a point that scores a candidate setting on held-out training
images; a *final* point trains with the chosen setting and is scored on the test images.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import log
from pathlib import Path
from typing import Any

import yaml

from .. import files
from ..errors import ConfigError
from ..optim.table import method
from ..settings import share
from ..settings.config import Settings, parse
from ..settings.when import share_of_run

KEYS = ("settings", "methods", "batch_size", "imagenet_batch", "batch_multiple", "seeds", "tune")
TUNE_KEYS = ("batch_size", "imagenet_batch", "seed", "holdout", "widen")
_SHARED = ("m", "micro_batch")  # may be given as a part of the batch
_LEAST = 4  # images, of such a part
_OWN = (  # set by the sweep itself
    "out", "resume", "batch_size", "seed", "holdout", "config", "dry_run", "ranks", "local_rank",
)  # fmt: skip
Flags = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run: `flags` are train.py's without --out; `tuned` are those that trials try or chose."""

    label: str
    stage: str
    batch_size: int
    seed: int
    flags: Flags
    tuned: Flags = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run directory, relative to the sweep's; a trial's name holds the values it tries."""
        tuned = self.tuned if self.stage == "tune" else {}
        tried = "".join(f"-{k}{v!r}" for k, v in tuned.items())
        return f"{self.stage}/{self.label}-b{self.batch_size}-s{self.seed}{tried}"

    def argv(self) -> list[str]:
        """train.py's flags without --out."""
        words: list[str] = []
        for name, value in self.flags.items():
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no_{name}")
                continue
            several = isinstance(value, list | tuple)
            words += [f"--{name}", ",".join(map(str, value)) if several else str(value)]
        return words

    def record(self) -> dict[str, Any]:
        """The content of point.json: this run's place in its sweep."""
        return {
            "method": self.flags["optimizer"],
            "label": self.label,
            "stage": self.stage,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "tuned": self.tuned,
            "flags": self.flags,
        }

    @property
    def weight(self) -> float:
        """Forward and backward passes per image: the relative cost of a point."""
        row = method(self.flags["optimizer"])
        if not row.two_passes:
            return 1.0
        share = share_of_run(self.flags.get("look_from", 0), self.flags.get("look_until"))
        return 1.0 + share / (self.flags.get("k", 5) if row.settable_k else 1)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A sweep: every method at every batch size with every seed.

    candidates: label -> the flags tried for it, the same number for every label; {} where nothing
    is tuned. tuned_at: batch sizes at which trials run; the others take the nearest one's choice.
    widen: the most trials that are added to a method at one batch size, see `widen`.
    """

    settings: Flags
    methods: dict[str, Flags]
    batch_sizes: list[int]
    seeds: list[int]
    candidates: dict[str, list[Flags]]
    tuned_at: list[int]
    tune_seed: int = 0
    holdout: int = 0
    widen: int = 0

    def trial(self, label: str, batch_size: int, tried: Flags) -> Point:
        """The trial of one candidate at one batch size."""
        return self._point(label, "tune", batch_size, self.tune_seed, tried)

    def trials(self, label: str, batch_size: int) -> list[Point]:
        """The trials of one method at one batch size that the file asks for."""
        return [self.trial(label, batch_size, tried) for tried in self.candidates.get(label, [])]

    def nearest(self, batch_size: int) -> int:
        """The batch size whose trials choose for this one: the nearest by ratio."""
        return min(self.tuned_at, key=lambda b: (abs(log(b / batch_size)), b))

    def finals(self, chosen: Mapping[tuple[str, int], Flags]) -> Iterator[Point]:
        """The final points whose choice is known; seed by seed, so that each seed is complete
        before the next."""
        for seed, batch_size, label in product(self.seeds, self.batch_sizes, self.methods):
            if not self.candidates:
                yield self._point(label, "final", batch_size, seed, {})
            elif (label, self.nearest(batch_size)) in chosen:
                tuned = chosen[label, self.nearest(batch_size)]
                yield self._point(label, "final", batch_size, seed, tuned)

    @property
    def total(self) -> int:
        """Points in all."""
        trials = sum(len(c) for c in self.candidates.values()) * len(self.tuned_at)
        return trials + len(self.methods) * len(self.batch_sizes) * len(self.seeds)

    def _point(self, label: str, stage: str, batch_size: int, seed: int, tuned: Flags) -> Point:
        flags = {**self.settings, **self.methods[label], **tuned}
        flags |= {"batch_size": batch_size, "seed": seed}
        if stage == "tune":
            flags["holdout"] = self.holdout
        if isinstance(flags.get("init"), str):
            flags["init"] = flags["init"].replace("{seed}", str(seed))
        for name in _SHARED:
            flags |= {name: _part(flags[name], batch_size, name)} if name in flags else {}
        return Point(
            label=label, stage=stage, batch_size=batch_size, seed=seed, flags=flags, tuned=tuned
        )


def read(path: Path) -> Grid:
    """The sweep that a YAML file describes. ConfigError, in one sentence, for a mistake in it."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"sweep needs a YAML file, got {path} ({error.strerror}); see launch/sweeps/."
        ) from None
    try:
        file = files.yaml_of(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} must be YAML, got {' '.join(str(error).split())}.") from None
    grid = _grid(_mapping(file, f"{path}", KEYS))
    for label in grid.methods:  # every mistake in a setting now, not after a night of trials
        for point in grid.trials(label, grid.tuned_at[0]) if grid.candidates else []:
            _check(point)
        for batch_size in grid.batch_sizes:
            tuned = grid.candidates[label][0] if grid.candidates else {}
            _check(grid._point(label, "final", batch_size, grid.seeds[0], tuned))
    return grid


def settles(point: Point) -> bool:
    """Whether its flags are settings that a run may have."""
    try:
        parse(point.argv())
    except ConfigError:
        return False
    return True


def _check(point: Point) -> None:
    try:
        parse(point.argv())
    except ConfigError as error:
        raise ConfigError(f"{point.label} at batch size {point.batch_size}: {error}") from None


def _grid(file: Flags) -> Grid:
    settings = _flags(file.get("settings") or {}, "settings")
    methods, tried = {}, {}
    for label, value in _mapping(file.get("methods"), "methods").items():
        if not re.fullmatch(r"[\w.+-]+", str(label)):
            raise ConfigError(
                f"a method's label must be of letters, digits and . _ + -, got {label!r}."
            )
        own = dict(_mapping(value or {}, f"methods.{label}"))
        tried[str(label)] = _candidates(own.pop("tune", None), str(label))
        flags = {"optimizer": label, **_flags(own, f"methods.{label}")}
        try:
            method(str(flags["optimizer"]))
        except ConfigError as error:
            raise ConfigError(f"methods.{label}: {error}") from None
        methods[str(label)] = flags
    if not methods:
        raise ConfigError("methods must name at least one method, got none.")
    sizes = _sizes(file, file, settings, "")
    seeds = _numbers(file.get("seeds", [0]), "seeds", least=0)
    plain: Flags = {"settings": settings, "methods": methods, "batch_sizes": sizes, "seeds": seeds}
    if file.get("tune") is None:
        if any(tried.values()):
            raise ConfigError(
                "methods have lists to tune, but there is no `tune:` section; add one with "
                "batch_size, seed and holdout."
            )
        return Grid(**plain, candidates={}, tuned_at=[])
    tune = _mapping(file["tune"], "tune", TUNE_KEYS)
    at = _sizes(tune, file, settings, "tune.") if _SIZES & tune.keys() else sizes
    return _tuned(plain, tried, tune, at)


_SIZES = {"batch_size", "imagenet_batch"}


def _sizes(section: Flags, file: Flags, settings: Flags, where: str) -> list[int]:
    """Batch sizes, given as such, or as those on ImageNet that are the same share of the data."""
    if len(_SIZES & section.keys()) > 1:
        raise ConfigError(
            f"{where}batch_size and {where}imagenet_batch must not both be given; leave one out."
        )
    if "imagenet_batch" not in section:
        return _numbers(section.get("batch_size"), f"{where}batch_size", least=1)
    images = settings.get("train_images")
    if type(images) is not int:
        raise ConfigError(
            f"{where}imagenet_batch needs train_images among the settings, got {images}: it is a "
            f"share of them; give it."
        )
    [step] = _numbers(file.get("batch_multiple", 1), "batch_multiple", least=1)
    given = _numbers(section["imagenet_batch"], f"{where}imagenet_batch", least=1)
    sizes = share.batches(given, images=images, multiple=step)
    return _numbers(sizes, f"{where}imagenet_batch on {images} images", least=1)


def _part(value: Any, batch_size: int, name: str) -> Any:
    """`batch/16`: the divisor of the batch, at least _LEAST, whose ratio to a 16th is nearest to 1.

    Other values stay as they are.
    """
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"batch/(\d+)", value)
    if not parts or not int(parts[1]):
        raise ConfigError(
            f"{name} must be a whole number, or batch/N for an N-th of the batch, got {value!r}."
        )
    whole = [d for d in range(min(_LEAST, batch_size), batch_size + 1) if batch_size % d == 0]
    return min(whole, key=lambda d: abs(log(d * int(parts[1]) / batch_size)))


def _tuned(
    plain: dict[str, Any], tried: dict[str, list[Flags]], tune: Flags, tuned_at: list[int]
) -> Grid:
    budgets = {label: len(candidates) for label, candidates in tried.items()}
    if len(set(budgets.values())) > 1 or not all(budgets.values()):
        counts = ", ".join(f"{label} {n}" for label, n in budgets.items())
        raise ConfigError(
            f"every method must have the same number of trials, at least one, or the comparison "
            f"is not fair, got {counts}; lengthen or shorten the lists under `tune:`."
        )
    return Grid(
        **plain,
        candidates=tried,
        tuned_at=tuned_at,
        tune_seed=_numbers([tune.get("seed", 100)], "tune.seed", least=0)[0],
        holdout=_numbers([tune.get("holdout")], "tune.holdout", least=1)[0],
        widen=_numbers([tune.get("widen", 0)], "tune.widen", least=0)[0],
    )


def _candidates(lists: Any, label: str) -> list[Flags]:
    """Every combination of the lists, in the order of the file."""
    if lists is None:
        return []
    tried = _flags(_mapping(lists, f"methods.{label}.tune"), f"methods.{label}.tune")
    for name, values in tried.items():
        numbers = isinstance(values, list) and all(type(v) in (int, float) for v in values)
        if not numbers or not values or len(set(values)) < len(values):
            raise ConfigError(
                f"methods.{label}.tune.{name} must be a list of different numbers, got {values!r}."
            )
    return [dict(zip(tried, values)) for values in product(*tried.values())]


def _mapping(value: Any, where: str, allowed: tuple[str, ...] = ()) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be lines of `name: value`, got {value!r:.50}.")
    for name in value:
        if allowed and name not in allowed:
            raise ConfigError(f"{where} may hold {', '.join(allowed)}, got {name!r}.")
    return value


def _flags(values: Flags, where: str) -> Flags:
    """Settings of train.py by their names."""
    known = Settings.__dataclass_fields__
    for name in values:
        if name in _OWN or name not in known:
            why = "which the sweep sets itself" if name in _OWN else "no setting of train.py"
            raise ConfigError(f"{where} holds {name!r}, {why}; take it out.")
    return values


def _numbers(values: Any, where: str, *, least: int) -> list[int]:
    values = values if isinstance(values, list) else [values]
    if not values or any(type(v) is not int or v < least for v in values):
        raise ConfigError(f"{where} must be whole numbers >= {least}, got {values}.")
    if len(set(values)) < len(values):
        raise ConfigError(f"{where} must be different numbers, got {values}.")
    return values
