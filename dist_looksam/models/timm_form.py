"""Weights of our ViT under timm's names, for timm's VisionTransformer of the same arithmetic.

Files of others have timm's names but for a few: of LayerScale in those of DeiT III
(github.com/facebookresearch/deit, models_v2.py), of the registers in those of DINOv2.
"""

import math
import re

from torch import Tensor

from .vit import Size

_TIMMS = (
    (re.compile(r"^(blocks\.\d+)\.(fc[12]\.)"), r"\1.mlp.\2"),
    (re.compile(r"^patch_embed\.(weight|bias)$"), r"patch_embed.proj.\1"),
    (re.compile(r"^(blocks\.\d+)\.gamma_([12])$"), r"\1.ls\2.gamma"),  # DeiT III
    (re.compile(r"^register_tokens$"), "reg_token"),  # DINOv2
)


def timm_name(name: str) -> str:
    """timm's name of an entry of our ViT, of DeiT III or DINOv2; others are returned unchanged."""
    for pattern, theirs in _TIMMS:
        name = pattern.sub(theirs, name)
    return name


def as_timm(weights: dict[str, Tensor], size: Size) -> tuple[dict[str, Tensor], str]:
    """(the same weights with timm's names and shapes, the call that makes timm's model for them).

    timm embeds patches by a convolution, ours by a matrix; its MLP is a separate module.
    """
    patch, names = size.patch, {}
    for name, weight in weights.items():
        if name == "patch_embed.weight":
            weight = weight.view(size.dim, -1, patch, patch).contiguous()
        names[timm_name(name)] = weight
    side = math.isqrt(weights["pos_embed"].shape[1] - size.class_position) * patch
    channels, classes = names["patch_embed.proj.weight"].shape[1], len(weights["head.bias"])
    call = (
        f"timm.models.VisionTransformer(img_size={side}, patch_size={patch}, in_chans={channels}, "
        f"embed_dim={size.dim}, depth={size.depth}, num_heads={size.heads}, num_classes={classes}, "
        f"{_variant(size)})"
    )
    return names, call


def _variant(size: Size) -> str:
    """The arguments of timm's VisionTransformer beyond width and depth."""
    pool = "token" if size.class_token else "avg"
    text = f"class_token={size.class_token}, global_pool={pool!r}, fc_norm=False"
    if size.added_tokens and not size.class_position:
        text += f", no_embed_class=True, reg_tokens={size.registers}"
    if size.layer_scale:
        text += f", init_values={size.layer_scale:g}"
    return text + (", qk_norm=True" if size.qk_norm else "")
