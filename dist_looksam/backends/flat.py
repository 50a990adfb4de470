"""Layers in a row in one tensor, cut into equal partitions by rank: where each shard lies.

A *flat* is one fp32 tensor of this rank that the optimizer is given as a parameter. Layers lie in
it one after another; one that is not on this rank is an empty shard.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backend import Piece, Read
from .plain import like_the_layer, numbers


@dataclass(frozen=True)
class Flat:
    """One flat, the layers in it, and where each starts: piece i is flat[offsets[i]:][:length]."""

    master: Tensor
    group: int
    pieces: tuple[Piece, ...]
    offsets: tuple[int, ...]

    def views(self, like: Tensor) -> list[Tensor]:
        """One shard per layer, of a tensor laid out as the flat; padding is left out."""
        whole = like.view(-1)
        return [
            whole[at : at + p.stop - p.start]
            for p, at in zip(self.pieces, self.offsets, strict=True)
        ]


def cut(
    layers: Sequence[Tensor], names: dict[int, str], master: Tensor, group: int, low: int
) -> Flat:
    """The flat that begins `low` entries into the row of `layers`; `names` by id of the layer."""
    high = low + master.numel()
    pieces, offsets, at = [], [], 0
    for p in layers:
        start = min(max(low - at, 0), p.numel())
        stop = max(start, min(high - at, p.numel()))
        pieces.append(Piece(names[id(p)], tuple(p.shape), start, stop))
        offsets.append(min(max(at + start - low, 0), master.numel()))
        at += p.numel()
    return Flat(master, group, tuple(pieces), tuple(offsets))


State = MutableMapping[Tensor, dict[str, Any]]


def slots_of(flats: Sequence[Flat], state: State) -> list[dict[str, Tensor]]:
    """For each piece of each flat, its weight and all state that is laid out as the flat."""
    found = []
    for flat in flats:
        views = {
            key: flat.views(value)
            for key, value in like_the_layer(state.get(flat.master, {}), flat.master).items()
        }
        views["weight"] = flat.views(flat.master.detach())
        found += [{k: v[i] for k, v in views.items()} for i in range(len(flat.pieces))]
    return found


@torch.no_grad()
def fill(flats: Sequence[Flat], state: State, read: Read, counters: dict[str, Any]) -> None:
    """Weights and state of every piece, from a checkpoint.

    Where layers of a flat differ in a number, such as their steps, it takes the largest.
    """
    for flat in flats:
        own = state[flat.master]
        for i, piece in enumerate(flat.pieces):
            for key in ("weight", *counters["keys"]):
                values = read(piece.name, key, piece.start, piece.stop)
                if values is None:
                    continue
                if key == "weight":
                    flat.views(flat.master.detach())[i].copy_(values)
                    continue
                if key not in own:
                    own[key] = torch.zeros_like(flat.master)
                flat.views(own[key])[i].copy_(values)
        found = [counters["layers"].get(p.name, {}) for p in flat.pieces]
        for key in sorted({k for row in found for k in row}):
            own[key] = torch.tensor(max(row[key] for row in found if key in row))


def counters_of(flats: Sequence[Flat], state: State) -> dict[str, Any]:
    """The names of all slots but the weight, and each layer's numbers, which are its flat's."""
    states = [(flat, state.get(flat.master, {})) for flat in flats]
    return {
        "keys": sorted({k for flat, s in states for k in like_the_layer(s, flat.master)}),
        "layers": {p.name: numbers(s) for flat, s in states for p in flat.pieces},
    }
