"""The numbers of a model that a plan needs: layers, operations, activations of an image."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from .. import models
from ..backends import units
from ..models.vit import ViT
from ..optim import table
from ..optim.perturbed import ALL

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model on images of one shape.

    groups      sizes of the layers, in the optimizer's param groups: see `table.groups`.
    order       sizes of the layers in the order of forward.
    units       (rows, entries of a row) of the layers in each of FSDP2's units, in the order of
                forward; the last holds the remaining layers.
    flops       of the forward of one image; a backward costs twice that.
    saved       numbers that autograd keeps of one image: (of the arithmetic's precision, of the
                residual stream's, of fp32).
    block       those of `saved` that are of one block, where blocks can be checkpointed.
    depth       number of blocks.
    working     further numbers that backward needs, of the arithmetic's precision.
    pixels      numbers of one image.
    frozen      numbers of the layers that are not trained, which none of the above counts but
                flops and saved.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    units: tuple[tuple[tuple[int, int], ...], ...]
    flops: int
    saved: tuple[int, int, int]
    block: tuple[int, int, int]
    depth: int
    working: int
    pixels: int
    frozen: int = 0

    @property
    def parameters(self) -> int:
        """Those that are trained."""
        return sum(self.order)

    @property
    def layers(self) -> int:
        return len(self.order)

    def activations(
        self, images: int, *, arithmetic: int, residual: int, checkpointed: bool = False
    ) -> int:
        """Bytes of a micro-batch's forward and backward; sizes are of one number.

        checkpointed: of each block its input, half of what it keeps of the residual stream; and all
        of one block, which is computed again.
        """
        own, stream, fp32 = self.saved
        if checkpointed:
            others = max(0, self.depth - 1)
            own, fp32 = own - others * self.block[0], fp32 - others * self.block[2]
            stream -= others * self.block[1] // 2
        each = own * arithmetic + stream * residual + 4 * fp32
        return images * (each + self.working * arithmetic + self.pixels * arithmetic)


@lru_cache(maxsize=64)
def workload(
    model: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    perturb: str = ALL,
    freeze: str | None = None,
) -> Workload:
    """By train.py's names; no memory is taken for our own models. Raises as `models.create` and
    `models.freeze`."""
    name = models.resolve(model, image_shape)
    with torch.device("meta"):
        net = models.create(name, num_classes=num_classes, image_shape=image_shape)
    models.freeze(net, freeze)
    block = (0, 0, 0)
    if isinstance(net, ViT):
        saved, block, working = _vit(net, num_classes)
    else:
        saved, working = counted(net, image_shape)
    groups = tuple(
        tuple(p.numel() for p in group["params"]) for group in table.groups(net, 1.0, perturb)
    )
    channels, height, width = image_shape
    return Workload(
        name=name,
        groups=groups,
        order=tuple(p.numel() for p in net.parameters() if p.requires_grad),
        units=_units(net),
        flops=models.flops_per_image(net, image_shape),
        saved=saved,
        block=block,
        depth=net.size.depth if isinstance(net, ViT) else 0,
        working=working,
        pixels=channels * height * width,
        frozen=sum(p.numel() for p in net.parameters() if not p.requires_grad),
    )


def _units(net: nn.Module) -> tuple[tuple[tuple[int, int], ...], ...]:
    parts = [[p for p in part.parameters() if p.requires_grad] for part in units.units(net)]
    inside = {id(p) for part in parts for p in part}
    parts.append([p for p in net.parameters() if p.requires_grad and id(p) not in inside])
    return tuple(tuple((len(p), p.numel() // len(p)) for p in part) for part in parts)


_Saved = tuple[int, int, int]


def _vit(net: ViT, num_classes: int) -> tuple[_Saved, _Saved, int]:
    """`saved`, `block` and `working`, by formula; tests compare them with allocations.

    A block keeps its norms' outputs, q, k, v, the attention's output, the MLP's inner layer before
    and after GELU: 14 x tokens x dim in the arithmetic's precision; twice the residual stream; and
    in fp32 the attention's log-sums and the norms' means and deviations. LayerScale adds both
    branches' outputs; norms of q and k add their own, a copy, and their means and deviations.
    For a class token the last norm's output is kept whole.
    """
    size, tokens = net.size, net.num_tokens
    stream = tokens * size.dim
    more = 2 * (size.layer_scale > 0) + 3 * size.qk_norm
    norms = 4 * (1 + size.heads * size.qk_norm)
    block = (14 + more) * stream, 2 * stream, tokens * (size.heads + norms)
    own = block[0] * size.depth + net.num_patches * net.patch_embed.in_features + 2 * size.dim
    own += (stream - size.dim) * size.class_token
    fp32 = block[2] * size.depth + 2 * tokens + 2 * num_classes
    return (own, block[1] * size.depth + stream, fp32), block, 5 * stream


def counted(net: nn.Module, image_shape: tuple[int, int, int]) -> tuple[tuple[int, int, int], int]:
    """The same for any model: what a third image adds, counted on the CPU."""
    real = net.to_empty(device="cpu")
    for p in real.parameters():
        nn.init.normal_(p, std=0.02)
    two, three = (_saved_bytes(real, image_shape, images) for images in (2, 3))
    own = (three - two) // 4
    return (own, 0, 0), own // 20


def _saved_bytes(net: nn.Module, image_shape: tuple[int, int, int], images: int) -> int:
    """Bytes of the distinct tensors that autograd keeps, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    sizes: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in own:
            sizes[place] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(torch.zeros(images, *image_shape))
    del out
    return sum(sizes.values())
