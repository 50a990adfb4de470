"""`dist-looksam predict RUN|WEIGHTS IMAGE...`: the classes of pictures, with probabilities."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .. import models
from ..cli.arguments import Parser
from ..data import Batch
from ..data.card import Card, card
from ..data.decode import square
from ..data.pictures import centre
from ..errors import ConfigError, RunError
from ..settings import assemble
from ..settings.config import Settings
from ..world import World
from .evaluation import arithmetic, choose_weights, opened

FORMAT = 1
_AT_ONCE = 64  # pictures of a forward
_MODES = {"RGB": "RGB", "grey": "L"}


def main(argv: Sequence[str]) -> int:
    """Print the most probable classes of each picture. Raises ConfigError, RunError."""
    flags = _parser().parse_args(argv)
    if flags.top < 1:
        raise ConfigError(f"top must be >= 1, got {flags.top}.")
    trained = opened(flags, data_dir=flags.data_dir)
    known = trained.card or card(trained.data())  # older weights do not name their pixels
    device = assemble.device_of(Settings(device=flags.device), World())
    pictures = [pixels(path, known) for path in flags.images]
    model = trained.model(known).to(device).eval()
    found = []
    with torch.no_grad(), arithmetic(trained, device):
        for start in range(0, len(pictures), _AT_ONCE):
            images = torch.stack(pictures[start : start + _AT_ONCE])
            none = torch.zeros(len(images), dtype=torch.int64)
            batch = Batch(images=images, labels=none, keys=none, mean=known.mean, std=known.std)
            found.append(models.call(model, batch.to(device).images, None).double().softmax(-1))
    shares = torch.cat(found).cpu()
    if not shares.isfinite().all():
        raise RunError(f"{trained.weights} gives no finite probabilities; its training diverged.")
    rows = [
        {"image": str(path), "classes": _classes(share, known, flags.top)}
        for path, share in zip(flags.images, shares, strict=True)
    ]
    if flags.json:
        about = {"format": FORMAT, "weights": str(trained.weights), "step": trained.step}
        print(json.dumps({**about, "predictions": rows}, indent=1))
    else:
        print(*map(_line, rows), sep="\n")
    return 0


def pixels(path: Path, known: Card) -> Tensor:
    """[C, H, W] uint8 of a picture, as evaluations of the training data see it. ConfigError if it
    cannot be read."""
    height, width = known.image_size
    if known.channels not in _MODES or height != width:
        raise ConfigError(
            f"weights must take square RGB or grey images, got those of {known.data}: "
            f"{known.channels}, {height}x{width}."
        )
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"IMAGE must be a picture, got {path}, which cannot be read ({error.strerror})."
        ) from None
    try:
        picture = square(encoded, lambda width, height: centre(width, height, known.crop), height)
    except Exception as error:  # decoders raise nearly anything for a damaged file
        foreign = isinstance(error, UnidentifiedImageError)
        why = "no image" if foreign else " ".join(str(error).split()) or repr(error)
        raise ConfigError(f"IMAGE must be a picture, got {path} ({why}).") from None
    return _planes(picture.convert(_MODES[known.channels]))


def _planes(picture: Image.Image) -> Tensor:
    levels = torch.from_numpy(np.array(picture))
    return levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1)


def _classes(share: Tensor, known: Card, top: int) -> list[dict[str, Any]]:
    """The most probable first."""
    values, places = share.topk(min(top, len(share)))
    return [
        {"class": known.class_names[place], "probability": value}
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
    ]


def _line(row: dict[str, Any]) -> str:
    shown = (f"{entry['class']} {entry['probability']:.4f}" for entry in row["classes"])
    return f"{row['image']}: {', '.join(shown)}"


def _parser() -> Parser:
    parser = Parser(
        prog="dist-looksam predict",
        description="Print the most probable classes of pictures. Pixels are those of the run's "
        "evaluations: middle square, size, channels, mean and std as its weights name them.",
    )
    choose_weights(parser)
    add = parser.add_argument
    add("images", metavar="IMAGE", nargs="+", type=Path, help="picture file")
    add("--top", type=int, default=5, help="number of classes to print; default 5")
    add("--json", action="store_true", help="print JSON")
    add("--data_dir", help="folder of the data, for weights of older versions; default: the run's")
    return parser
