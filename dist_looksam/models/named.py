"""Models by name: our own sizes of ViT, and every timm model where timm imports."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..errors import ConfigError
from .vit import Size, ViT

_WIDTHS = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}


def _family(name: str, which: tuple[str, ...], *, patch: int = 16, **rest: Any) -> dict[str, Size]:
    """Sizes of a paper, by our names."""
    made = {}
    for width in which:
        dim, depth, heads = _WIDTHS[width]
        made[name.format(width)] = Size(patch=patch, dim=dim, depth=depth, heads=heads, **rest)
    return made


# The variants: DeiT (arXiv:2012.12877), DeiT III (2204.07118), DINOv2 with registers (2309.16588),
# and the q and k of ViT-22B (2302.05442) in smaller sizes.
SIZES = {
    **_family("vit_{}16", ("ti", "s", "b", "l")),
    "vit_28": Size(patch=7, dim=96, depth=4, heads=3),
    "vit_28_mini": Size(patch=7, dim=32, depth=2, heads=2),
    "vit_28_p4": Size(patch=4, dim=64, depth=4, heads=2),
    "vit_8": Size(patch=2, dim=64, depth=4, heads=2),
    **_family("deit_{}16", ("ti", "s", "b"), class_token=True, class_position=True),
    **_family("deit3_{}16", ("s", "b", "l"), class_token=True, layer_scale=1e-4),
    **_family(
        "dinov2_{}14_reg4", ("s", "b", "l"),
        patch=14, class_token=True, registers=4, layer_scale=1e-5,
    ),
    **_family("vit_{}16_qk", ("s", "b", "l"), qk_norm=True),
}  # fmt: skip
# `auto`: the first whose patch divides the image and whose largest side is not exceeded.
_AUTO = [("vit_8", 16), ("vit_28", 28), ("vit_28_p4", 64), ("vit_s16", None)]


def names() -> list[str]:
    """The names for `create` besides those of timm."""
    return ["auto", *SIZES]


def gray_side(name: str) -> int | None:
    """Pixels of a side of the gray images that a small size is for; None for other models."""
    found = re.match(r"vit_(8|28)(_|$)", name)
    return int(found[1]) if found else None


def resolve(name: str, image_shape: tuple[int, int, int]) -> str:
    """The model that `auto` stands for at this (C, H, W); any other name is returned unchanged.

    Raises ConfigError if none of our sizes fits the images.
    """
    if name != "auto":
        return name
    _, height, width = image_shape
    for candidate, largest in _AUTO:
        side = SIZES[candidate].patch
        if height % side == 0 and width % side == 0 and max(height, width) <= (largest or 10**9):
            return candidate
    raise ConfigError(
        f"model=auto finds no ViT for {height}x{width} images: sides must be multiples of 2 up to "
        "16, of 7 up to 28, of 4 up to 64, or of 16; resize the images or name a model."
    )


def create(
    name: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    drop_path: float = 0.0,
) -> nn.Module:
    """A new model that maps images [n, C, H, W] to logits [n, num_classes].

    `name` is one of `names()` or of timm's; `image_shape` is (C, H, W); `drop_path` in [0, 1) is
    the probability of dropping the last block's branches. A timm model is returned without wrapper,
    so that names in its state_dict are timm's.
    Raises ConfigError for an unknown name, a size that the patch does not divide, a wrong rate.
    """
    if not 0 <= drop_path < 1:
        raise ConfigError(f"drop_path must be in [0, 1), got {drop_path}; 0 turns it off.")
    if num_classes < 1:
        raise ConfigError(f"num_classes must be at least 1, got {num_classes}; count the labels.")
    check(name, image_shape)
    name = resolve(name, image_shape)
    if name not in SIZES:
        return _from_timm(name, num_classes, image_shape, drop_path)
    return ViT(SIZES[name], num_classes=num_classes, image_shape=image_shape, drop_path=drop_path)


def check(name: str, image_shape: tuple[int, int, int] | None) -> None:
    """ConfigError for an unknown name, or a size that the patch does not divide; makes no model.

    image_shape: None if not yet known.
    """
    name = name if image_shape is None else resolve(name, image_shape)
    if name not in names():
        _timm(name)
        return
    if image_shape is None:
        return
    side = SIZES[name].patch
    _, height, width = image_shape
    if height % side or width % side:
        raise ConfigError(
            f"model {name} cuts images into {side}x{side} patches, got "
            f"{height}x{width} images: resize them to multiples of {side} or take a model "
            f"whose patch divides them (model=auto looks for one)."
        )


def patch(name: str, image_shape: tuple[int, int, int]) -> int | None:
    """Side of the patches in pixels of a model that takes images of several sizes; None for others,
    which are timm's."""
    size = SIZES.get(resolve(name, image_shape))
    return None if size is None else size.patch


def _timm(name: str) -> Any:
    """The library timm. ConfigError unless it is installed and has this model."""
    own = ", ".join(names())
    try:
        import timm
    except (ImportError, RuntimeError) as reason:  # RuntimeError: torchvision of another torch
        missing = isinstance(reason, ModuleNotFoundError) and reason.name == "timm"
        state, cure = (
            ("is not installed", "pip install timm")
            if missing
            else (f"does not import ({str(reason).splitlines()[0]})", "repair it")
        )
        raise ConfigError(
            f"model must be one of {own} or a timm model, got {name!r}, and timm {state} here: "
            f"{cure} or take one of ours."
        ) from reason
    if not timm.is_model(name):
        raise ConfigError(
            f"model must be one of {own} or a model of the installed timm {timm.__version__}, got "
            f"{name!r}: timm.list_models('*vit*') names some."
        )
    return timm


def _from_timm(
    name: str, num_classes: int, image_shape: tuple[int, int, int], drop_path: float
) -> nn.Module:
    timm = _timm(name)
    channels, height, width = image_shape
    settings = {"num_classes": num_classes, "drop_path_rate": drop_path, "in_chans": channels}
    try:
        return timm.create_model(name, img_size=(height, width), **settings)
    except TypeError as error:  # convolutional models take any size, and no such argument
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, **settings)


def pretrained(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the weights that timm has for one of its models, timm's description of them). Fetches them
    where they are not on this machine. ConfigError if that fails, or timm has none."""
    timm = _timm(name)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # of huggingface_hub, requests, the system, timm itself
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"init timm:{name} must be a model whose weights timm can fetch, got {reason}; fetch "
            f"them on a machine with access, or name a file."
        ) from None
    return model.state_dict(), dict(model.pretrained_cfg)


def checkpoint_activations(model: nn.Module) -> None:
    """Keep of each block its input alone, and compute the rest again in backward: a fourth forward
    in place of most of the memory of activations. The gradients are the same, bit for bit.

    ConfigError for a model that has no such switch: ours and timm's transformers have one.
    """
    if isinstance(model, ViT):
        model.checkpoints = True
        return
    switch: Any = getattr(model, "set_grad_checkpointing", None)  # timm's
    if switch is not None:
        switch()
    else:
        raise ConfigError(
            f"checkpoint_activations needs one of our models or a timm model that can, got "
            f"{type(model).__name__}; leave it out."
        )


def takes_keys(model: nn.Module) -> bool:
    """Whether forward takes the samples' keys, also inside DDP, DeepSpeed and torch.compile."""
    inner: object = model
    while isinstance(inner, nn.Module):
        if getattr(inner, "takes_keys", False):
            return True
        inner = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
    return False


def call(model: nn.Module, images: Tensor, keys: Tensor | None) -> Tensor:
    """Logits [n, num_classes]; passes `keys` (int64 [n]) to the models that take them.

    Images are cast to the dtype of the weights, which DeepSpeed may have made 16 bits.
    """
    images = images.to(next(model.parameters()).dtype)
    return model(images, keys) if keys is not None and takes_keys(model) else model(images)


def flops_per_image(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Forward floating point operations of one (C, H, W) image.

    By formula for our ViT, else counted in one forward in eval mode (the mode is then restored).
    """
    if isinstance(model, ViT):
        return model.flops_per_image()
    weight = next(model.parameters())
    image = torch.zeros(1, *image_shape, device=weight.device, dtype=weight.dtype)
    training = model.training
    model.eval()
    # The CPU's fused attention is not counted by torch; the plain one is.
    plain, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    with torch.no_grad(), plain, counter:
        model(image)
    model.train(training)
    return counter.get_total_flops()
