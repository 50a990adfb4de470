"""Networks: `create` makes one by name, `call` calls it with the samples' keys."""

from .named import (
    call,
    check,
    checkpoint_activations,
    create,
    flops_per_image,
    names,
    patch,
    resolve,
    takes_keys,
)
from .vit import ViT

__all__ = [
    "ViT", "call", "check", "checkpoint_activations", "create", "flops_per_image", "names",
    "patch", "resolve", "takes_keys",
]  # fmt: skip
