"""Base optimizers by name: every module of this folder is one row."""

from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer

from ...rows import load_rows


@dataclass(frozen=True, kw_only=True)
class Base:
    """One base optimizer. A module of this folder binds it to the name ROW.

    make          the torch optimizer's class, or a function of the same arguments: param groups
                  with their own weight_decay, lr, what `uses` names, and fused.
    lr, weight_decay, eps  defaults of the flags.
    uses          which of the flags betas, momentum and eps `make` takes.
    fused         make takes fused=True: torch's kernels that can skip a step on the device.
    trusted       has trust ratios: one reduce a step, of the layers' squared norms.
    state         fp32 tensors of a layer's size that are kept between steps.
    counter_bytes bytes of a layer's number of steps, kept between steps.
    temporaries   fp32 tensors of a layer's size that a step makes and frees.
    traffic       tensors of a layer's size that a step reads or writes, 4 bytes an entry.
    place         position in lists of names; rows without one come last, by name.

    `dist-looksam plan` computes with state, counter_bytes, temporaries and traffic: see
    plan/memory.py and plan/times.py, whose tests compare them with real runs.
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


BASES: dict[str, Base] = load_rows(__name__, __path__)
