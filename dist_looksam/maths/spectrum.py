"""Eigenvalues and trace of a symmetric matrix of which only products with vectors are known.

Sources: Lanczos 1950, with full reorthogonalisation (Parlett, The Symmetric Eigenvalue Problem,
chapter 13); Hutchinson 1990 for the trace.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Times: TypeAlias = Callable[[Tensor], Tensor]  # v [P] -> H v [P]


@dataclass(frozen=True, kw_only=True)
class Ritz:
    """What Lanczos knows after some products.

    values     [j] float64, approximate eigenvalues, the largest first.
    residuals  [j] float64, ||H x - value x|| of each; an eigenvalue is at most so far from `value`.
    """

    values: Tensor
    residuals: Tensor

    def converged(self, count: int, tolerance: float) -> bool:
        """Whether the `count` largest have residuals of at most tolerance x |value|."""
        if len(self.values) < count:
            return False
        return bool((self.residuals <= tolerance * self.values.abs())[:count].all())


def lanczos(times: Times, start: Tensor) -> Iterator[Ritz]:
    """Yields after every product H v; ends where the vectors span all that `start` reaches.

    Args:
        start: [P], not zero. Vectors are kept in its dtype, one for each product.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while len(basis) <= len(start):
        v = basis[-1]
        w = times(v)
        diagonal.append(float(w.dot(v)))
        size = float(w.norm())
        for _ in range(2):  # once leaves rounding errors that grow into copies of eigenvalues
            for q in basis:
                w = w.sub(q * q.dot(w))
        left = float(w.norm())
        yield _ritz(diagonal, beside, left)
        if not left > 8 * torch.finfo(w.dtype).eps * max(size, abs(diagonal[0])):
            return
        beside.append(left)
        basis.append(w / left)


def _ritz(diagonal: list[float], beside: list[float], left: float) -> Ritz:
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, value in enumerate(beside):
        tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = value
    values, vectors = torch.linalg.eigh(tridiagonal)
    return Ritz(values=values.flip(0), residuals=(left * vectors[-1]).abs().flip(0))


def signs(size: int, *, seed: int) -> Tensor:
    """[size] float32 of +1 and -1, each with probability 1/2; the same on every machine."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (size,), generator=draws).float().mul_(2).sub_(1)


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """Mean of [n] estimates and its standard error; None where n is 1."""
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error
