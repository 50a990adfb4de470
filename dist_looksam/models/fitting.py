"""Weights of a file for a model that may have other names, another head, another image size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .parts import in_head
from .timm_form import timm_name

LEAST = 0.5  # share of the parameters without the head; with fewer a file is of another model
_NAMED = 4  # entries that a sentence names
POSITIONS, CLASS = "pos_embed", "cls_token"
PATCHES = "patch_embed.proj.weight"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """weights: what the model takes, by the model's names, for load_state_dict(strict=False).

    head: entries of the head that stay new. new: other entries that do. unused: entries of the
    file that the model has not. resized: (side, side) of the file's grid of positions and
    (height, width) of the model's. share: of the parameters without the head that are taken.
    """

    weights: dict[str, Tensor]
    head: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    resized: tuple[tuple[int, int], tuple[int, int]] | None
    share: float

    def notes(self, source: str, classes: int | None) -> list[str]:
        """What was taken and what was not, for the log. classes: of the data; None: not known."""
        entries = len(self.weights) + len(self.head) + len(self.new)
        text = f"init: {len(self.weights)} of {entries} entries are from {source}"
        if self.resized:
            (a, b), (height, width) = self.resized
            text += f"; positions interpolated from {a}x{b} to {height}x{width}"
        if self.head and classes is None:
            unless = "unless the data, not known here, have the classes of the file"
            text += f"; made anew, {unless}: {_few(self.head)}"
        elif self.head:
            text += f"; made anew for {classes} classes: {_few(self.head)}"
        warning = []
        if self.new:
            warning.append(f"warning: init: not in {source}, made anew: {_few(self.new)}")
        if self.unused:
            warning.append(f"warning: init: in {source}, not in the model: {_few(self.unused)}")
        return [text, *warning]


def fitted(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    image_shape: tuple[int, int, int],
    source: str,
    same_classes: bool = True,
) -> Fitted:
    """What a model can take of a file. The model may be without memory, and is not changed.

    The model may be ours or timm's, and so may the names in the file. Of the head nothing is taken
    where its shape differs. Positions of another grid are interpolated.

    Args:
        image_shape: (C, H, W) of the model. source: the file's name, for the error.
        same_classes: False leaves the head new in any case.

    Raises:
        ConfigError: less than half of the parameters would be taken.
    """
    given = {timm_name(name.removeprefix("module.")): w for name, w in weights.items()}
    taken: dict[str, Tensor] = {}
    resized = of_class = None
    own = {n: w for n, w in model.state_dict(keep_vars=True).items() if isinstance(w, Tensor)}
    for name, want in own.items():
        weight = given.get(timm_name(name))
        if weight is None or (in_head(model, name) and not same_classes):
            continue
        if timm_name(name) == PATCHES and _flat(weight) == _flat(want):
            weight = weight.reshape(want.shape)
        if name == POSITIONS and weight.shape != want.shape:
            weight, resized, of_class = _positions(model, given, want, image_shape)
        if weight.shape == want.shape:
            taken[name] = weight.to(want.dtype)
    if of_class is not None and CLASS in taken:  # the model adds none to its class token
        taken[CLASS] = taken[CLASS] + of_class.to(taken[CLASS].dtype)
    missing = [name for name in own if name not in taken]
    body = {n: p for n, p in model.named_parameters() if not in_head(model, n)}
    share = sum(p.numel() for n, p in body.items() if n in taken) / max(
        1, sum(p.numel() for p in body.values())
    )
    found = Fitted(
        weights=taken,
        head=tuple(name for name in missing if in_head(model, name)),
        new=tuple(name for name in missing if not in_head(model, name)),
        unused=tuple(sorted(given.keys() - {timm_name(name) for name in own})),
        resized=resized if POSITIONS in taken else None,
        share=share,
    )
    if share < LEAST:
        raise ConfigError(_refusal(model, given, own, found, source))
    return found


def own_names(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of a model's state_dict `own`, where theirs are timm's."""
    names = {timm_name(name): name for name in own}
    found = {names.get(timm_name(name), name): weight for name, weight in weights.items()}
    patches = names.get(PATCHES, "")
    if patches in found and _flat(found[patches]) == _flat(own[patches]):
        found[patches] = found[patches].reshape(own[patches].shape)
    return found


def _refusal(
    model: nn.Module,
    given: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    found: Fitted,
    source: str,
) -> str:
    name = found.new[0]
    got = given.get(timm_name(name))
    there = f"no {name}" if got is None else f"{name} of shape {tuple(got.shape)}"
    if got is None and found.unused:
        there += f" but {found.unused[0]}"
    return (
        f"init must hold weights of the model, got {source} with {found.share:.0%} of the "
        f"parameters of this {type(model).__name__}, {there} instead of shape "
        f"{tuple(own[name].shape)}; name the --model that the weights are of."
    )


def _flat(weight: Tensor) -> tuple[int, int]:
    return len(weight), weight[0].numel()


def _few(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _positions(
    model: nn.Module,
    given: Mapping[str, Tensor],
    want: Tensor,
    image_shape: tuple[int, int, int],
) -> tuple[Tensor, tuple[tuple[int, int], tuple[int, int]] | None, Tensor | None]:
    """(positions of the file on the model's grid, both grids if they differ, that of the class
    token where the model has no place for it); what the file has, and no more, if that has another
    width, or is no square."""
    weight = given[POSITIONS]
    if weight.ndim != 3 or want.ndim != 3 or weight.shape[-1] != want.shape[-1]:
        return weight, None, None
    tokens = weight.shape[1]
    lengths = {n: given[n].shape[1] for n in (CLASS, "dist_token", "reg_token") if n in given}
    for first in (sum(lengths.values()), lengths.get(CLASS, 0), 0):
        side = math.isqrt(max(0, tokens - first))
        if 0 < side * side == tokens - first:
            break
    else:
        return weight, None, None
    grid = _grid(model, image_shape)
    own_first = want.shape[1] - grid[0] * grid[1]
    if own_first < 0:
        return weight, None, None
    kept = weight[:, : min(first, own_first)]
    kept = F.pad(kept, (0, 0, 0, own_first - kept.shape[1]))
    resampled = resample(weight[:, first:], (side, side), grid)
    both = None if grid == (side, side) else ((side, side), grid)
    of_class = weight[:, :1] if first and CLASS in given and not own_first else None
    return torch.cat([kept.to(resampled.dtype), resampled], 1), both, of_class


def _grid(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Rows and columns of patches."""
    size = getattr(model, "size", None)  # of our ViT
    if size is not None:
        return image_shape[1] // size.patch, image_shape[2] // size.patch
    rows, columns = model.patch_embed.grid_size  # type: ignore[union-attr,misc]
    return int(rows), int(columns)


def resample(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions [1, old tokens, dim] -> [1, new tokens, dim], bicubic with antialiasing, in fp32,
    as timm's resample_abs_pos_embed."""
    if old == new:
        return positions.float()
    grid = positions.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return grid.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1)
