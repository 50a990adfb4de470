"""What flatness.json holds: loss around w, eigenvalues and trace of the Hessian, rounding."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError
from ..maths.ascent import layer_perturbation, model_perturbation
from ..maths.directions import filter_normalised, gaussian, scaled_to
from ..maths.rounding import rounded
from ..maths.shards import dots, per_model, whole
from ..maths.spectrum import lanczos, mean_and_error, signs
from .groups import BITS
from .objective import Objective, Score, flat

_ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Streams of random numbers; those of the trace's vectors begin at _PROBE.
_START, _RANDOM, _LINE, _PROBE, _STREAMS = 0, 1, 2, 10, 10_000
# Costs in units of a forward over the same samples, measured roughly: for the time left.
_GRADIENT, _PRODUCT = 3, 7


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to measure. Recorded in flatness.json as `settings`.

    m: samples of a group. rho, layer_rho: radii of the two scopes. eigenvalues, iterations,
    tolerance: largest ones to find, products at most, residual / value at which to stop. probes:
    vectors of the trace. points: of a line. seed: of all directions.
    """

    samples: int
    test_samples: int
    m: int
    rho: tuple[float, ...]
    layer_rho: tuple[float, ...]
    eigenvalues: int
    iterations: int
    tolerance: float
    probes: int
    points: int
    precision: str
    seed: int

    def radii(self) -> list[tuple[str, float]]:
        """(scope, radius) of every point around w."""
        return [("model", rho) for rho in self.rho] + [("layer", rho) for rho in self.layer_rho]

    def stream(self, number: int) -> int:
        """The seed of one purpose."""
        return self.seed * _STREAMS + number

    def cost(self) -> int:
        """Of everything, in forwards over all samples."""
        scores = 1 + 3 * len(self.radii()) + 2 * self.points + len(BITS)
        products = self.iterations + self.probes
        return scores + 2 * _GRADIENT + _PRODUCT * products


class Measurement:
    """Measures one model. All methods are collective.

    Args:
        tick: gets the cost that is done since the last call, and a word for what is measured.
    """

    def __init__(
        self, objective: Objective, wanted: Wanted, tick: Callable[[float, str], None]
    ) -> None:
        self.objective, self.wanted, self.tick = objective, wanted, tick

    def all(self) -> dict[str, Any]:
        """The measured part of flatness.json. RunError if the loss at w is not finite."""
        at_w = self._score("loss at w")
        if not math.isfinite(at_w["train"]["loss"]):
            raise RunError("the training loss at the weights is not finite: the run diverged.")
        return {
            "at_w": at_w,
            "ascent": self._whole() + self._groups(),
            "eigenvalues": self._eigenvalues(),
            "trace": self._trace(),
            "lines": [self._line(number) for number in range(2)],
            "rounding": [self._rounding(bits) for bits in BITS],
        }

    def _score(self, what: str) -> dict[str, Any]:
        score = _as_json(self.objective.score())
        self.tick(1, what)
        return score

    def _whole(self) -> list[dict[str, Any]]:
        """Along the gradient over all samples, and along a random direction of the same norms."""
        rows, weights = [], self.objective.saved
        grads = self.objective.gradient()
        self.tick(_GRADIENT, "gradient")
        drawn = gaussian(weights, seed=self.wanted.stream(_RANDOM))
        for scope, rho in self.wanted.radii():
            kinds = {"gradient": climb(weights, grads, scope, rho), "random": _random(
                weights, drawn, scope, rho)}  # fmt: skip
            for kind, eps in kinds.items():
                with self.objective.moved(eps):
                    score = self._score("loss at w + eps")
                m = None if kind == "random" else self.wanted.samples
                rows.append({"scope": scope, "direction": kind, "m": m, "rho": rho, **score})
        return rows

    def _groups(self) -> list[dict[str, Any]]:
        """Every group of m samples at its own w + eps: means over the groups."""
        objective, radii = self.objective, self.wanted.radii()
        device = objective.saved[0].device
        sums = torch.zeros(len(radii), 2, 3, dtype=torch.float64, device=device)
        groups = objective.train.num_groups
        for group in range(groups):
            grads = objective.gradient(group)
            for row, (scope, rho) in enumerate(radii):
                with objective.moved(climb(objective.saved, grads, scope, rho)):
                    sums[row] += objective.scores([group])
            self.tick((_GRADIENT + len(radii)) / groups, f"groups of {self.wanted.m}")
        rows = []
        for (scope, rho), of_row in zip(radii, sums, strict=True):
            score = _as_json(objective.reduced(of_row))
            at = {"scope": scope, "direction": "gradient", "m": self.wanted.m, "rho": rho}
            rows.append(at | score)
        return rows

    def _eigenvalues(self) -> dict[str, Any]:
        objective, wanted = self.objective, self.wanted
        start = flat(gaussian(objective.saved, seed=wanted.stream(_START)))
        ritz, done, converged = None, 0, False
        for ritz in lanczos(objective.hessian_times, start):
            done += 1
            self.tick(_PRODUCT, "eigenvalues")
            ready = ritz.converged(wanted.eigenvalues, wanted.tolerance)
            # One decision for all ranks, whose rounding may differ.
            flag = objective.total(start.new_full((1,), float(ready)))
            converged = bool(flag > 0)
            if converged or done == wanted.iterations:
                break
        assert ritz is not None
        self.tick(_PRODUCT * (wanted.iterations - done), "eigenvalues")
        return {
            "largest": ritz.values[: wanted.eigenvalues].tolist(),
            "residuals": ritz.residuals[: wanted.eigenvalues].tolist(),
            "smallest": float(ritz.values[-1]),
            "smallest_residual": float(ritz.residuals[-1]),
            "iterations": done,
            "converged": converged,
        }

    def _trace(self) -> dict[str, Any] | None:
        if not self.wanted.probes:
            return None
        weights, values = flat(self.objective.saved), []
        for number in range(self.wanted.probes):
            v = signs(len(weights), seed=self.wanted.stream(_PROBE + number)).to(weights)
            values.append(self.objective.hessian_times(v).dot(v).double())
            self.tick(_PRODUCT, "trace")
        mean, error = mean_and_error(torch.stack(values))
        return {"mean": mean, "standard_error": error, "probes": self.wanted.probes}

    def _line(self, number: int) -> list[dict[str, Any]]:
        """The loss along a filter-normalised direction d, at w + t d, t from -1 to 1."""
        weights = self.objective.saved
        direction = filter_normalised(weights, seed=self.wanted.stream(_LINE + number))
        points = []
        for t in torch.linspace(-1, 1, self.wanted.points, dtype=torch.float64).tolist():
            with self.objective.moved([d * t for d in direction]):
                points.append({"t": t, **self._score("random lines")})
        return points

    def _rounding(self, bits: int) -> dict[str, Any]:
        objective = self.objective
        rounds = {id(p) for p in matrices(objective.model)}
        pairs = zip(objective.weights, objective.saved, strict=True)
        weights = [rounded(w, bits=bits) if id(p) in rounds else w for p, w in pairs]
        with objective.at(weights):
            return {"bits": bits, **self._score("rounding")}


def matrices(model: nn.Module) -> Iterator[Tensor]:
    """The weights of linear layers and convolutions, which `rounding` rounds; nothing else."""
    return (m.weight for m in model.modules() if isinstance(m, _ROUNDED))


def climb(
    weights: Sequence[Tensor], grads: Sequence[Tensor], scope: str, rho: float
) -> list[Tensor]:
    """eps of the ascent of one scope, p = 2."""
    if scope == "model":
        return list(model_perturbation(grads, rho=rho, reduce=whole).eps(grads))
    return list(layer_perturbation(weights, grads, rho=rho, reduce=whole).eps(grads))


def _random(
    weights: Sequence[Tensor], drawn: Sequence[Tensor], scope: str, rho: float
) -> list[Tensor]:
    """The drawn direction with the norm that eps has: rho, or rho ||w_i|| of every layer."""
    if scope == "layer":
        return scaled_to(drawn, rho * dots(weights, weights).sqrt())
    sq_norms = dots(drawn, drawn)
    return scaled_to(drawn, rho * (sq_norms / per_model(sq_norms)).sqrt())


def _as_json(scores: dict[str, Score]) -> dict[str, dict[str, float]]:
    return {split: vars(score) for split, score in scores.items()}
