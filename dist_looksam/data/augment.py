"""Parses --augment; augmentations of small images held in memory."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from .draws import CROP, FLIP, uniform

ALLOWED = (
    "auto, none, or some of crop, src, flip, randaugment[:MAGNITUDE[xOPS]], trivialaugment, "
    "3augment, jitter[:SHARE], erasing[:PROBABILITY], mixup[:A], cutmix[:A], repeat[:TIMES]"
)
AUGMENT_ON = ("host", "device")  # of --augment_on
# A run has one of each at most.
_ONE_OF = ({"randaugment", "trivialaugment", "3augment"}, {"crop", "src"})
_SWITCHES = {"crop": "crop", "src": "simple", "flip": "flip"}
_SWITCHES |= {"trivialaugment": "trivial", "3augment": "three"}
_NUMBERS: dict[str, tuple[str, float, float]] = {  # default, smallest, largest
    "jitter": ("0.3", 0.01, 1),
    "erasing": ("0.25", 0.01, 1),
    "mixup": ("0.2", 0.01, 100),
    "cutmix": ("1", 0.01, 100),
}
_PAD, _SIMPLE_PAD = 2, 4


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The augmentation of training images."""

    crop: bool = False  # folder: RandomResizedCrop; images in memory: pad by 2 and crop
    simple: bool = False  # simple random crop, instead of crop; images in memory: likewise
    flip: bool = False  # left-right, probability 1/2
    magnitude: float = 0.0  # of RandAugment, 0 to 10
    ops: int = 0  # number of RandAugment's operations; 0 is no RandAugment
    trivial: bool = False  # TrivialAugment
    three: bool = False  # 3-Augment
    jitter: float = 0.0  # most that brightness, contrast and saturation change by, as a share
    erasing: float = 0.0  # probability of random erasing
    mixup: float = 0.0  # alpha of Beta(alpha, alpha); 0 is no mixup
    cutmix: float = 0.0  # likewise
    repeat: int = 1  # times that an image is in a global batch; see order.places
    on_device: bool = False  # whether policy and jitter are made there: --augment_on

    @property
    def changes(self) -> bool:
        """Whether there is a policy or jitter: what may be made on the device."""
        return self.ops > 0 or self.trivial or self.three or self.jitter > 0

    @property
    def of_host(self) -> "Augment":
        """Without what is made on the device in its place."""
        if not self.on_device:
            return self
        return replace(self, ops=0, trivial=False, three=False, jitter=0.0)

    @property
    def mixes(self) -> bool:
        """Whether pairs of images are mixed; a micro-batch must then hold whole pairs."""
        return self.mixup > 0 or self.cutmix > 0


def parse(text: str, *, auto: str = "none", on: str = AUGMENT_ON[0]) -> Augment:
    """Parses --augment; `auto` is the value that the word auto stands for, `on` is --augment_on.
    ConfigError."""
    augment = _parse(auto if text.strip() == "auto" else text)
    if on == "device" and not augment.changes:
        raise ConfigError(
            f"augment_on device needs randaugment, trivialaugment, 3augment or jitter in "
            f"--augment, got '{text}'; add one of them, or leave --augment_on out."
        )
    return replace(augment, on_device=on == "device")


def _parse(text: str) -> Augment:
    words = [word.strip() for word in text.split(",")]
    if words == ["none"]:
        return Augment()
    settings: dict[str, bool | int | float] = {}
    seen: set[str] = set()
    for word in words:
        name, _, argument = word.partition(":")
        if name in seen:
            raise ConfigError(f"--augment names {name} twice, got '{text}'; name it once.")
        seen.add(name)
        settings |= _setting(name, argument if ":" in word else None, text)
    for words_of in _ONE_OF:
        if len(several := sorted(seen & words_of)) > 1:
            raise ConfigError(
                f"--augment takes one of {', '.join(sorted(words_of))}, "
                f"got {' and '.join(several)} in '{text}'; leave out the others."
            )
    return Augment(**settings)  # type: ignore[arg-type]


def _setting(name: str, argument: str | None, text: str) -> dict[str, bool | int | float]:
    if name in ("auto", "none"):
        raise ConfigError(f"--augment {name} stands alone, got '{text}'; use {ALLOWED}.")
    if name in _SWITCHES:
        if argument is not None:
            raise ConfigError(f"--augment {name} takes no number, got '{text}'; use {ALLOWED}.")
        return {_SWITCHES[name]: True}
    if name == "randaugment":
        magnitude, _, ops = (argument or "9x2").partition("x")
        strength = _number(magnitude, name, text, low=0, high=10)
        return {"magnitude": strength, "ops": int(_number(ops or "2", name, text, whole=True))}
    if name in _NUMBERS:
        default, low, high = _NUMBERS[name]
        given = default if argument is None else argument
        return {name: _number(given, name, text, low=low, high=high)}
    if name == "repeat":
        given = "3" if argument is None else argument
        return {name: int(_number(given, name, text, high=16, whole=True))}
    raise ConfigError(f"--augment knows no '{name}', got '{text}'; use {ALLOWED}.")


def _number(
    digits: str, name: str, text: str, *, low: float = 1, high: float = 8, whole: bool = False
) -> float:
    try:
        number = float(digits)
    except ValueError:
        number = float("nan")
    if not low <= number <= high or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(
            f"--augment {name} takes {kind} from {low} to {high}, got '{digits}' in '{text}'; "
            f"use {ALLOWED}."
        )
    return number


def text(augment: Augment, mixup_until: float | None = None) -> str:
    """What is done to the images, in the order in which it is done; "" for nothing."""
    parts = ["crop"] * augment.crop + ["simple crop"] * augment.simple + ["flip"] * augment.flip
    where = " on the device" if augment.on_device else ""
    if augment.ops:
        parts.append(f"{augment.ops} of RandAugment's operations at {augment.magnitude:g}{where}")
    parts += [f"TrivialAugment{where}"] * augment.trivial + [f"3-Augment{where}"] * augment.three
    if augment.jitter:
        parts.append(f"colours by up to {augment.jitter:.0%}{where}")
    if augment.erasing:
        parts.append(f"erasing of {augment.erasing:.0%} of the images")
    mixes = [f"{name} {a:g}" for name in ("mixup", "cutmix") if (a := getattr(augment, name))]
    if mixes and mixup_until != 0:
        until = "" if mixup_until is None else f" before step {mixup_until:,}"
        parts.append(" or ".join(mixes) + until)
    return ", ".join(parts)


def check_repeat(augment: Augment, batch_size: int) -> None:
    """ConfigError if the batch is not made of whole repetitions."""
    if batch_size % augment.repeat:
        below = batch_size // augment.repeat * augment.repeat
        nearest = [str(size) for size in (below, below + augment.repeat) if size]
        raise ConfigError(
            f"batch_size must be a multiple of {augment.repeat} with --augment "
            f"repeat:{augment.repeat}, got {batch_size}; use {' or '.join(nearest)}, or leave "
            f"repeat out."
        )


def shift_crop(images: Tensor, seed: int, keys: Tensor, *, simple: bool = False) -> Tensor:
    """Pads uint8 [n, C, H, W] with 2 pixels of 0 all round and cuts H x W out at random; `simple`:
    with 4 pixels of reflection, as simple_crop.py."""
    height, width = images.shape[-2:]
    pad = _SIMPLE_PAD if simple else _PAD
    padded = F.pad(images, (pad,) * 4, mode="reflect" if simple else "constant")
    draws = uniform(seed, keys[:, None], CROP + torch.arange(2))
    offsets = (draws * (2 * pad + 1)).long()
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    samples = torch.arange(len(images))[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()


def flips(seed: int, keys: Tensor) -> Tensor:
    """Which samples are mirrored, bool [n]."""
    return uniform(seed, keys, FLIP) < 0.5
