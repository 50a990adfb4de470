"""Base optimizers by name: one file here is one row, found by its place in this folder."""

from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer

from ...rows import found


@dataclass(frozen=True, kw_only=True)
class Base:
    """One base optimizer. A module of this folder binds it to the name ROW.

    make          the torch optimizer's class, or a function of the same arguments: param groups
                  with their own weight_decay, lr, what `uses` names, and fused.
    lr, weight_decay, eps  defaults of the flags.
    uses          which of the flags betas, momentum and eps `make` takes.
    fused         make takes fused=True: torch's kernels that can skip a step on the device.
    trusted       a step adds up squared norms of layers over the ranks that split them, once.
    state         fp32 tensors of a layer's size that are kept between steps.
    counter_bytes bytes a layer keeps besides: its number of steps.
    temporaries   fp32 tensors of a layer's size that a step makes and frees.
    traffic       tensors of a layer's size that a step reads or writes, 4 bytes an entry.
    place         in lists of names; rows without one come last, by name.

    state, counter_bytes, temporaries and traffic are what `dist-looksam plan` counts with: see
    plan/memory.py and plan/times.py, whose tests hold them against real runs.
    """

    name: str
    make: Callable[..., Optimizer]
    lr: float
    weight_decay: float
    eps: float = 1e-8
    uses: frozenset[str]
    fused: bool = False
    trusted: bool = False
    state: int
    counter_bytes: int = 0
    temporaries: int = 0
    traffic: int
    place: int = 99


BASES: dict[str, Base] = found(__name__, __path__)
