"""Networks: `create` makes one by name, `call` calls it with the samples' keys."""

from .fitting import Fitted, fitted, own_names
from .named import (
    call,
    check,
    checkpoint_activations,
    create,
    flops_per_image,
    gray_side,
    names,
    patch,
    pretrained,
    resolve,
    takes_keys,
)
from .parts import check_pattern, freeze, lr_scales
from .vit import ViT

__all__ = [
    "Fitted", "ViT", "call", "check", "check_pattern", "checkpoint_activations", "create", "fitted",
    "flops_per_image", "freeze", "gray_side", "lr_scales", "names", "own_names", "patch",
    "pretrained", "resolve", "takes_keys",
]  # fmt: skip
