"""Which network is trained: `create` by name, `call` with the samples' keys."""

from dist_looksam.models.named import (
    call,
    check,
    create,
    flops_per_image,
    names,
    resolve,
    takes_keys,
)
from dist_looksam.models.vit import ViT

__all__ = ["ViT", "call", "check", "create", "flops_per_image", "names", "resolve", "takes_keys"]
