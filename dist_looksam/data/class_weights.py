"""`--class_weights`: how much each class counts in the training loss."""

import math
from pathlib import Path

import torch
import yaml
from torch import Tensor

from ..errors import ConfigError
from .source import Source

BALANCED = "balanced"
_USE = f"use {BALANCED}, or a YAML file with a line `class name: weight` for every class"


def read(which: str) -> dict[str, float] | None:
    """The weights of a file, by class name; None for `balanced`.

    Raises:
        ConfigError: no such file, or something else than numbers >= 0 by name in it.
    """
    if which == BALANCED:
        return None
    try:
        content = yaml.safe_load(Path(which).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"class_weights {which} cannot be read ({reason}); {_USE}.") from None
    if not isinstance(content, dict) or not content:
        got = f"a {type(content).__name__}" if content else "nothing"
        raise ConfigError(f"class_weights must be weights by class name, got {got}; {_USE}.")
    for name, weight in content.items():
        number = not isinstance(weight, bool) and isinstance(weight, int | float)
        if not number or not 0 <= weight < math.inf:
            raise ConfigError(f"a class weight must be >= 0, got {weight!r} of {name}; {_USE}.")
    return {str(name): float(weight) for name, weight in content.items()}


def scaled(which: str, train: Source) -> Tensor:
    """Weights float32 [classes] in the order of the labels, whose mean over all samples of `train`
    is 1, so that the loss keeps its size.

    `balanced`: inversely proportional to the number of training samples of the class.

    Raises:
        ConfigError: as `read`; names of the file are not those of the classes; or all training
            samples weigh 0, or a class has none of them to balance.
    """
    names, given = train.class_names, read(which)
    counts = torch.bincount(train.labels, minlength=len(names)).double()
    if given is None:
        if 0 in counts:
            empty = names[int(counts.argmin())]
            raise ConfigError(
                f"class_weights {BALANCED} needs training images of every class, got none of "
                f"{empty}; add some, or give a file of weights."
            )
        weights = 1 / counts
    else:
        strange = [n for n in given if n not in names] or [n for n in names if n not in given]
        if strange:
            raise ConfigError(
                f"class_weights must name the {len(names)} classes of the data, got "
                f"{'a weight of' if strange[0] in given else 'none of'} {strange[0]}; {_USE}."
            )
        weights = torch.tensor([given[name] for name in names], dtype=torch.float64)
    mean = (weights * counts).sum() / counts.sum()
    if not mean > 0:
        raise ConfigError(f"class_weights must not be 0 for every training image; {_USE}.")
    return (weights / mean).float()
