"""Opens what a run has trained: its settings, weights, model and data, of any version."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import checkpoint, files, models
from ..checkpoint.commands import weights_of
from ..checkpoint.form import digest_of
from ..data import Data, load
from ..data.sets import data_set
from ..errors import ConfigError, RunError
from ..optim.table import METHODS
from ..record import rundir
from ..settings.config import DEFAULTS

_OF_DATA = ("data", "data_dir", "image_size", "holdout", "train_images")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One run directory. `weights` is model.safetensors, or the checkpoint of `step` steps."""

    path: Path
    config: dict[str, Any]  # config.yaml, with the defaults of settings that it lacks
    label: str
    weights: Path
    step: int | None

    @property
    def data_settings(self) -> tuple[Any, ...]:
        """Runs with the same ones have the same data."""
        return tuple(self.config[name] for name in _OF_DATA)

    def data(self) -> Data:
        """The data as the run had it, without augmentation. ConfigError where it is missing."""
        name, folder, *_ = self.data_settings
        more = {name: self.config[name] for name in _OF_DATA[2:]}
        try:
            return load(name, folder, augment="none", **more)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def model(self, data: Data) -> nn.Module:
        """The model with its weights, on the CPU. ConfigError if they are of another model."""
        name = self.config["model"]
        try:
            model = models.create(name, num_classes=data.num_classes, image_shape=data.shape)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        weights, own = self._read(), model.state_dict()
        for key in [*own, *weights]:
            got, want = (list(w[key].shape) if key in w else None for w in (weights, own))
            if got != want:
                raise ConfigError(
                    f"weights must be those of {name} for {data.num_classes} classes, as in "
                    f"{self.path / rundir.CONFIG}, got {self.weights} in which {key} has "
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
            return weights_of(reader)
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


def open_(path: Path, *, step: int | None, data_dir: str | None) -> Trained:
    """A run directory's settings; checks that its weights are there.

    Args:
        step: of the checkpoint; None: the weights at the end. data_dir: instead of the run's own.

    Raises:
        ConfigError: it is no run directory, or has no such weights.
    """
    config: dict[str, Any] = DEFAULTS | _config(path)
    if data_dir is not None:
        config["data_dir"] = data_dir
    try:
        data_set(config["data"]).check_dir(config["data_dir"])
        models.check(config["model"], None)
    except ConfigError as error:
        raise ConfigError(f"{path / rundir.CONFIG}: {error}") from None
    method = config["optimizer"]
    own = METHODS[method].base if method in METHODS else None
    config["base"] = config["base"] or own
    label = method if config["base"] == own else f"{method} on {config['base']}"
    label = (files.json_object(path / rundir.POINT) or {}).get("label", label)
    weights = _weights(path, step)
    return Trained(path=path, config=config, label=str(label), weights=weights, step=step)


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


def _weights(path: Path, step: int | None) -> Path:
    folders = {p.name: p for p in checkpoint.found(path / "checkpoints")}
    if step is not None:
        if f"step-{step}" not in folders:
            raise ConfigError(
                f"--step must name a checkpoint of the run, got {step}, and {path} has "
                f"{', '.join(reversed(folders)) or 'none'}."
            )
        return folders[f"step-{step}"]
    if not (path / rundir.WEIGHTS).is_file():
        newest = next(iter(folders), "")
        instead = f"use --step {newest.removeprefix('step-')}" if newest else "let the run finish"
        raise ConfigError(
            f"RUN must hold {rundir.WEIGHTS}, which a finished run writes, got {path} without it; "
            f"{instead}."
        )
    return path / rundir.WEIGHTS
