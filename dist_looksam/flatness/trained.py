"""Opens what a run has trained: its settings, weights, model and data, of any version."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import checkpoint, files, models
from ..backends.averages import KEY as EMA
from ..checkpoint.commands import weights_of
from ..checkpoint.form import digest_of
from ..data import Data, load
from ..data.card import Card, card, metadata, of_metadata
from ..data.sets import data_set
from ..errors import ConfigError, RunError
from ..optim.table import METHODS
from ..record import rundir
from ..settings.config import DEFAULTS

_OF_DATA = ("data", "data_dir", "image_size", "holdout", "train_images")
_OF_OWN_DATA = ("data_dir", "holdout", "train_images")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Weights and their settings: of a run directory `path`, or `path` itself. `weights` is
    model.safetensors or another such file, or the checkpoint of `step` steps."""

    path: Path
    config: dict[str, Any]  # config.yaml, with the defaults of settings that it lacks
    label: str
    weights: Path
    step: int | None
    ema: bool = False  # the averages of the weights
    card: Card | None = None  # stored with the weights; those of older versions have none

    def of_same_data(self, facts: dict[str, Any]) -> bool:
        """Whether `facts` of flatness.json are of weights that were measured on the same data."""
        config = facts.get("config") or {}
        return all(config.get(name) == self.config[name] for name in _OF_DATA)

    @property
    def data_settings(self) -> tuple[Any, ...]:
        """Runs with the same ones have the same data."""
        return tuple(self.config[name] for name in _OF_DATA)

    def data(self) -> Data:
        """The data as the run had it, without augmentation. ConfigError where it is missing."""
        name, folder, *_ = self.data_settings
        more = {name: self.config[name] for name in _OF_DATA[2:]}
        try:
            data = load(name, folder, augment="none", **more)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        if self.card is not None:
            self._check_card(self.card, card(data))
        return data

    def _check_card(self, own: Card, other: Card) -> None:
        """ConfigError where other classes or pixels would be scored than those of training."""
        for name in ("class_names", "channels", "image_size", "crop", "mean", "std"):
            want, got = getattr(own, name), getattr(other, name)
            if want != got:
                raise ConfigError(
                    f"data must have the {name} that {self.weights} was trained with, "
                    f"{want!s:.80}, got {got!s:.80}; give data of the same classes and pixels."
                )

    def model(self, data: Data | Card) -> nn.Module:
        """The model with its weights, on the CPU. ConfigError if they are of another model."""
        name = self.config["model"]
        try:
            model = models.create(name, num_classes=data.num_classes, image_shape=data.shape)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        own = model.state_dict()
        weights = models.own_names(self._read(), own)
        for key in [*own, *weights]:
            got, want = (list(w[key].shape) if key in w else None for w in (weights, own))
            if got != want:
                raise ConfigError(
                    f"weights must be those of {name} for {data.num_classes} classes, "
                    f"got {self.weights} in which {key} has "
                    f"{f'shape {got}' if got else 'no entry'} instead of "
                    f"{f'shape {want}' if want else 'none'}; give the directory of the run that "
                    f"trained them."
                )
        model.load_state_dict(weights)
        return model

    def _read(self) -> dict[str, Tensor]:
        if self.step is not None:
            reader = checkpoint.Reader(self.weights)
            reader.verify()
            return weights_of(reader, key=EMA if self.ema else "weight")
        try:
            return load_file(self.weights)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{self.weights} cannot be read ({error}).") from error

    def digest(self) -> str:
        """Of the weights; of a checkpoint's manifest, which holds those of its parts."""
        whole = self.weights if self.step is None else self.weights / checkpoint.MANIFEST
        return digest_of(whole)

    def facts(self) -> dict[str, Any]:
        """For flatness.json."""
        names = ("optimizer", "base", "batch_size", "seed", "data", "model", "holdout")
        return {
            "run": str(self.path),
            "label": self.label,
            **{name: self.config[name] for name in names},
            "step": self.step,
            "weights": str(self.weights.relative_to(self.path)),
            "weights_sha256": self.digest(),
            "config": self.config,
        }


def open_(path: Path, *, step: int | None, ema: bool = False, **given: Any) -> Trained:
    """A run directory's settings; checks that its weights are there.

    Args:
        step: of the checkpoint; None: the weights at the end. ema: the averages of either.
        given: settings instead of the run's own; None: the run's own.

    Raises:
        ConfigError: it is no run directory, or has no such weights.
    """
    known = _config(path)
    file = _weights(path, step, rundir.WEIGHTS_EMA if ema else rundir.WEIGHTS)
    if ema and step is not None:
        _check_averages(checkpoint.Reader(file))
    return _trained(path, known, file, given, step=step, ema=ema)


def open_weights(path: Path, *, ema: bool = False, **given: Any) -> Trained:
    """A safetensors file or a checkpoint alone, with the settings that are known of it.

    Args:
        ema: the averages of the checkpoint's weights.

    Raises:
        ConfigError: it is neither, has no averages, or the settings it lacks are not given.
        RunError: it is damaged.
    """
    if (path / checkpoint.MANIFEST).is_file():
        reader = checkpoint.Reader(path)
        if ema:
            _check_averages(reader)
        config = dict(reader.extra.get("settings") or {})
        return _trained(path, config, path, given, step=reader.step, ema=ema)
    beside = path.parent / rundir.CONFIG
    config = _config(path.parent) if beside.is_file() else {}
    about = _metadata(path)
    config |= {name: about[name] for name in ("model", "data") if about.get(name)}
    if (known := of_metadata(about)) is not None:
        config["image_size"] = known.image_size[0]
    return _trained(path, config, path, given)


def _check_averages(reader: checkpoint.Reader) -> None:
    if EMA not in reader.keys:
        raise ConfigError(
            f"--weights ema needs a checkpoint with averages of the weights, got {reader.path}, "
            f"which holds {', '.join(['weights', *reader.keys])}; leave out --weights ema."
        )


def _trained(
    path: Path,
    known: dict[str, Any],
    weights: Path,
    given: Mapping[str, Any],
    *,
    step: int | None = None,
    ema: bool = False,
) -> Trained:
    if given.get("data"):  # other data have no held-out images, nor the run's folder
        known = {k: v for k, v in known.items() if k not in _OF_OWN_DATA}
    config: dict[str, Any] = known | {k: v for k, v in given.items() if v is not None}
    for name in ("model", "data"):
        if name not in config:
            raise ConfigError(f"{path} does not say its {name}; name it with --{name}.")
    config = DEFAULTS | config
    source = path / rundir.CONFIG if path != weights else path
    try:
        data_set(config["data"]).check_dir(config["data_dir"])
        models.check(config["model"], None)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    method = config["optimizer"]
    own = METHODS[method].base if method in METHODS else None
    config["base"] = config["base"] or own
    label = method if config["base"] == own else f"{method} on {config['base']}"
    label = (files.json_object(path / rundir.POINT) or {}).get("label", label)
    return Trained(
        path=path,
        config=config,
        label=str(label),
        weights=weights,
        step=step,
        ema=ema,
        card=_card(weights, step),
    )


def _card(weights: Path, step: int | None) -> Card | None:
    """As stored with the weights; None where they cannot be read, which is said later."""
    try:
        if step is None:
            return of_metadata(_metadata(weights))
        return of_metadata(metadata(checkpoint.Reader(weights).extra.get("card")))
    except RunError:
        return None


def _metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file. RunError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read ({error}).") from error


def _config(path: Path) -> dict[str, Any]:
    file = path / rundir.CONFIG
    try:
        config = files.yaml_of(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"RUN must be a run directory, got {path} whose {rundir.CONFIG} cannot be read "
            f"({error.strerror}); give what train.py --out wrote."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(config, dict) or not {"optimizer", "data", "model"} <= config.keys():
        raise ConfigError(
            f"{file} must name optimizer, data and model, got {config!r:.60}; give what train.py "
            f"--out wrote."
        )
    return config


def _weights(path: Path, step: int | None, name: str) -> Path:
    folders = {p.name: p for p in checkpoint.found(path / "checkpoints")}
    if step is not None:
        if f"step-{step}" not in folders:
            raise ConfigError(
                f"--step must name a checkpoint of the run, got {step}, and {path} has "
                f"{', '.join(reversed(folders)) or 'none'}."
            )
        return folders[f"step-{step}"]
    if name != rundir.WEIGHTS and (path / rundir.WEIGHTS).is_file() > (path / name).is_file():
        raise ConfigError(
            f"RUN must hold {name}, which a run with averaged weights writes, got {path} without "
            f"it; leave out --weights ema."
        )
    if not (path / name).is_file():
        newest = next(iter(folders), "")
        instead = f"use --step {newest.removeprefix('step-')}" if newest else "let the run finish"
        raise ConfigError(
            f"RUN must hold {name}, which a finished run writes, got {path} without it; {instead}."
        )
    return path / name
