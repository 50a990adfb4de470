"""`--init`: reads the weights that a run starts from, and puts them into its model.

A file of tensors (safetensors, or torch's, from which nothing is run), a run directory, one of its
checkpoints, or timm:NAME.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import checkpoint, models
from ..checkpoint.commands import weights_of
from ..checkpoint.reader import candidates
from ..data import Data
from ..data.card import Card, card, metadata, of_metadata
from ..data.extent import Extent
from ..errors import ConfigError, RunError
from ..record import rundir
from ..settings.config import Settings

TIMM = "timm:"
_INSIDE = ("state_dict", "model", "model_state_dict")  # where trainers put the weights in a file


@dataclass
class Init:
    """Weights by name. source: their file. card: what our own files say of their classes. pixels:
    (mean, std) that timm's weights were trained with. notes: for the log, after `fit`."""

    weights: dict[str, Tensor]
    source: str
    card: Card | None = None
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    notes: list[str] = field(default_factory=list)

    def fit(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        class_names: tuple[str, ...],
    ) -> models.Fitted:
        """What the model takes, for data of these classes, () where they are not known; adds the
        notes. The head is new for others than those of the file. Errors as of `models.fitted`."""
        known = bool(class_names)
        same = known and (self.card is None or self.card.class_names == class_names)
        found = models.fitted(
            model, self.weights, image_shape=shape, source=self.source, same_classes=same
        )
        self.notes += found.notes(self.source, len(class_names) if known else None)
        return found

    def put(self, model: nn.Module, data: Data) -> None:
        """Copy the weights into the model of a rank, before it is sharded."""
        own = card(data)
        found = self.fit(model, data.shape, own.class_names)
        model.load_state_dict(found.weights, strict=False)
        if self.pixels not in (None, (own.mean, own.std)):
            self.notes.append(
                f"warning: init: {self.source} was trained on pixels of mean and std "
                f"{self.pixels}, this run's have {(own.mean, own.std)}"
            )

    def digest(self) -> str:
        """Of all weights."""
        total = hashlib.sha256()
        for name, weight in sorted(self.weights.items()):
            total.update(name.encode())
            flat = weight.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().data)
        return total.hexdigest()


def begin(settings: Settings, ranks: int) -> Init | None:
    """The weights of --init on this rank; None without it, and where a checkpoint is resumed, which
    has the weights. Collective: two small gathers. ConfigError, RunError on every rank alike.
    """
    if settings.init is None:
        return None
    gather = settings.backend_row.gather if ranks > 1 else lambda value: [value]
    out = Path(settings.out)
    if gather(bool(rundir.to_resume(out, settings.resume)))[0]:  # rank 0 decides
        return None
    found: Init | None = None
    outcome = ("", "")
    try:
        found = read(settings.init)
        outcome = ("", found.digest())
    except (ConfigError, RunError) as error:
        outcome = (type(error).__name__, str(error))
    everyone = gather(outcome)
    for kind, text in everyone:
        if kind:
            raise (ConfigError if kind == "ConfigError" else RunError)(text)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise ConfigError(
                f"init must be the same file on all ranks, got another {settings.init} on rank "
                f"{rank} than on rank 0; copy it to every host."
            )
    return found


def read(init: str) -> Init:
    """Read weights. ConfigError where there are none, RunError where they are damaged."""
    if init.startswith(TIMM):
        weights, about = models.pretrained(init.removeprefix(TIMM))
        pixels = tuple(about["mean"]), tuple(about["std"])
        return Init(weights, init, pixels=pixels)
    path = Path(init)
    if path.is_dir() and not (path / checkpoint.MANIFEST).is_file():
        if (path / rundir.WEIGHTS).is_file():
            return _of_file(path / rundir.WEIGHTS)
    elif path.is_file():
        return _of_file(path)
    if not (saved := candidates(path)):
        raise ConfigError(
            f"init must be a file of weights, a run directory, a checkpoint or timm:NAME, got "
            f"{init}, which {'holds no weights' if path.is_dir() else 'does not exist'}."
        )
    reader = checkpoint.Reader(saved[0])
    reader.verify()
    return _known(weights_of(reader), saved[0], metadata(reader.extra.get("card")))


def _known(weights: dict[str, Tensor], path: Path, about: dict[str, str]) -> Init:
    return Init(weights, str(path), of_metadata(about))


def _of_file(path: Path) -> Init:
    """safetensors by their content, not by their name; else a file of torch.save."""
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _known(weights, path, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        if path.suffix == ".safetensors":
            raise RunError(f"{path} cannot be read ({error}).") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds for bytes that are none of its
        raise ConfigError(
            f"init must be a file of safetensors, or of tensors alone that torch.save wrote, got "
            f"{path}, which is neither; save its state_dict by itself."
        ) from None
    return Init(_tensors(content, path), str(path))


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The state_dict in the content of a file: of timm, DeiT, MAE, or alone."""
    for name in _INSIDE:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    named = content.items() if isinstance(content, dict) else ()
    weights = {name: w for name, w in named if isinstance(name, str) and isinstance(w, Tensor)}
    if not weights:
        raise ConfigError(
            f"init must be a file with tensors by name, got {path} with none; save a state_dict."
        )
    return weights


def absent(init: str) -> bool:
    """Whether a file, run or checkpoint is not on this machine."""
    return not init.startswith(TIMM) and not Path(init).exists()


def outlook(settings: Settings, model: nn.Module, data: Extent) -> list[str]:
    """For --dry_run: the notes that a start would log; [] where it would read no weights. timm is
    asked for nothing. Raises as `read` and `models.fitted`."""
    if settings.init is None or rundir.to_resume(Path(settings.out), settings.resume):
        return []
    if settings.init.startswith(TIMM):
        models.check(settings.init.removeprefix(TIMM), None)
        return [f"init: {settings.init}, which --dry_run does not fetch"]
    if absent(settings.init):
        return [f"init: {settings.init} is not on this machine; a start here would be refused"]
    init = read(settings.init)
    init.fit(model, data.shape, data.class_names)
    return init.notes
