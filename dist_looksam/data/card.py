"""What exported weights say of themselves: the pixels that they want, and their classes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from . import Data


@dataclass(frozen=True, kw_only=True)
class Card:
    """How a picture becomes the input of a model: the middle square of `crop` times the shorter
    side, bilinear to `image_size`, scaled to 0..1, less `mean`, divided by `std`."""

    data: str
    class_names: tuple[str, ...]  # in the order of the logits
    channels: str  # "RGB" or "grey"
    image_size: tuple[int, int]  # height, width
    crop: float
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return len(self.mean), *self.image_size


def card(data: Data) -> Card:
    """Of the evaluation images of opened data."""
    source = data.test
    channels, height, width = source.shape
    return Card(
        data=data.name,
        class_names=tuple(source.class_names),
        channels={1: "grey", 3: "RGB"}.get(channels, f"{channels} channels"),
        image_size=(height, width),
        crop=source.crop,
        mean=tuple(source.mean),
        std=tuple(source.std),
    )


def metadata(stored: Card | Mapping[str, Any] | None) -> dict[str, str]:
    """As the metadata of a safetensors file, whose values are texts: those but `data` and
    `channels` are JSON. {} for None."""
    values = asdict(stored) if isinstance(stored, Card) else dict(stored or {})
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}


def of_metadata(texts: Mapping[str, str]) -> Card | None:
    """The card in the metadata of a file; None where it has none, or a damaged one."""
    try:
        height, width = json.loads(texts["image_size"])
        return Card(
            data=texts["data"],
            class_names=tuple(map(str, json.loads(texts["class_names"]))),
            channels=texts["channels"],
            image_size=(int(height), int(width)),
            crop=float(json.loads(texts["crop"])),
            mean=tuple(map(float, json.loads(texts["mean"]))),
            std=tuple(map(float, json.loads(texts["std"]))),
        )
    except (KeyError, TypeError, ValueError):
        return None


def sentence(texts: Mapping[str, str]) -> str:
    """For a user who will feed pictures to these weights."""
    known = of_metadata(texts)
    if known is None:
        return "Their pixels and classes are not known: the checkpoint is of an older version."
    height, width = known.image_size
    names = list(known.class_names)
    shown = ", ".join(names if len(names) <= 10 else [*names[:9], "..."])
    crop = "the middle square" if known.crop == 1 else f"the middle {known.crop:g} of the picture"
    return (
        f"Pictures: {known.channels}, {crop} at {height}x{width}, scaled to 0..1, "
        f"mean {' '.join(f'{x:g}' for x in known.mean)}, std "
        f"{' '.join(f'{x:g}' for x in known.std)}. {len(names)} classes: {shown}."
    )
