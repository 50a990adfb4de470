"""When to look, and which gradient the base optimizer gets: a method's settings, without state."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..maths import look
from ..maths.ascent import Perturbation, layer_perturbation, model_perturbation
from ..maths.shards import Reduce, Scope, Shards, per_layer, per_model
from .when import DECIDERS, Decider

SCOPES = ("model", "layer")
LAYER_ASCENTS = ("scaled", "literal")
REUSES = ("paper", "natural")


def check_choice(name: str, got: object, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `got` is one of `allowed`."""
    if got not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {got!r}.")


def check_k(k: object) -> None:
    """Raise ConfigError unless k is a whole number >= 1."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigError(f"k must be a whole number >= 1, got {k}. 1 looks every step.")


def check_window(look_from: Any, look_until: Any) -> None:
    """Raise ConfigError unless these are whole numbers of steps with a step between them."""
    for name, step in {"look_from": look_from, "look_until": look_until}.items():
        if step is None and name == "look_until":
            continue
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ConfigError(f"{name} must be a whole number of steps >= 0, got {step!r}.")
    if look_until is not None and look_from >= look_until:
        raise ConfigError(
            f"look_from must be before look_until, got step {look_from} and step {look_until}, "
            f"between which no step can look; lower look_from, or leave look_until out."
        )


def check_number(name: str, got: Any, usual: float) -> None:
    """Raise ConfigError unless `got` is one number, of Python, NumPy or a tensor."""
    try:
        float(got)
        number = not isinstance(got, str)
    except (TypeError, ValueError, RuntimeError):
        number = False
    if not number:
        raise ConfigError(f"{name} must be a number, got {got!r}. One that will do is {usual}.")


def check_rho(rho: float) -> None:
    """Raise ConfigError unless rho is a finite number >= 0."""
    check_number("rho", rho, 0.05)
    if not 0 <= rho < float("inf"):
        raise ConfigError(f"rho must be >= 0 and finite, got {rho}. Use 0 for no perturbation.")


def check_alpha(alpha: float) -> None:
    """Raise ConfigError unless alpha is a finite number >= 0."""
    check_number("alpha", alpha, 0.7)
    if not 0 <= alpha < float("inf"):
        raise ConfigError(f"alpha must be >= 0 and finite, got {alpha}. Use 0 to reuse nothing.")


def check_perturb(perturb: object) -> None:
    """Raise ConfigError unless perturb is True or False."""
    if not isinstance(perturb, bool):
        raise ConfigError(
            f"perturb of a group must be True or False, got {perturb!r}; False keeps its layers "
            f"at w on a look."
        )


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which gradient the base optimizer gets.

    ascent        None (never look), "model" or "layer".
    k             steps per look, inside the window.
    looks         "periodic", at every k-th step, or "adaptive": see optim/when.py.
    look_from     first step of the window: earlier ones never look, nor perturb.
    look_until    first step after the window, from which on none looks; None: it has no end.
    reuses_gv     remember g_v and add it between looks; else the base gets g there.
    along_momentum  perturb before the only pass of each step, against the base's momentum (MSAM:
                  see optim/ahead.py); never look.
    surrogate_gap on a look the base gets GSAM's combination of g_s and g; else g_s.
    p             norm of the model-wide ascent, in (1, inf].
    layer_ascent  "scaled", or "literal" for Algorithm 2 as printed.
    decompose     scope of the decomposition, of the reuse and of GSAM, "model" or "layer".
    reuse         "paper" (alpha ||g||/||g_v||) or "natural" (alpha).
    """

    ascent: str | None
    k: int = 1
    reuses_gv: bool = False
    along_momentum: bool = False
    surrogate_gap: bool = False
    p: float = 2.0
    layer_ascent: str = "scaled"
    decompose: str = "model"
    reuse: str = "paper"
    looks: str = "periodic"
    look_from: int = 0
    look_until: int | None = None

    def __post_init__(self) -> None:
        if self.ascent is not None:
            check_choice("ascent scope", self.ascent, SCOPES)
        check_choice("layer_ascent", self.layer_ascent, LAYER_ASCENTS)
        check_choice("decompose", self.decompose, SCOPES)
        check_choice("reuse", self.reuse, REUSES)
        check_k(self.k)
        check_window(self.look_from, self.look_until)
        check_choice("looks", self.looks, tuple(DECIDERS))
        if self.looks == "adaptive" and self.k == 1:
            raise ConfigError(
                "k must be >= 2 with looks adaptive, got 1, at which every step looks; use a "
                "larger k, or looks periodic."
            )
        check_number("p", self.p, 2)
        if not self.p > 1:
            raise ConfigError(f"p must be > 1 (inf is allowed), got {self.p}. The usual p is 2.")
        if self.ascent == "layer" and self.p != 2:
            raise ConfigError(f"p must be 2 with layer-wise ascent, got {self.p}. Leave p out.")

        if self.along_momentum and (self.k != 1 or self.surrogate_gap or self.reuses_gv):
            raise ConfigError(
                f"an ascent along the momentum has one pass a step and no g_s, got k {self.k}"
                f"{' and an alpha' if self.surrogate_gap else ''}; leave out k and alpha."
            )

    @property
    def two_passes(self) -> bool:
        """Whether some steps compute a second gradient."""
        return self.ascent is not None and not self.along_momentum

    @property
    def scope(self) -> Scope:
        """Which layers share a number in the decomposition and the reuse."""
        return per_layer if self.decompose == "layer" else per_model

    def check_m(self, got: str) -> None:
        """ConfigError where samples cannot climb apart; `got`: what asks for it, "" for nothing."""
        if self.along_momentum and got:
            raise ConfigError(
                f"m must be the whole batch with an ascent along the momentum (msam), which is the "
                f"same for all samples, got {got}; leave it out, or take another method, such as "
                f"sam."
            )

    def in_window(self, step: int) -> bool:
        """True if this step, counted from 0, may look or reuse g_v."""
        end = self.look_until
        return self.ascent is not None and self.look_from <= step and (end is None or step < end)

    def num_looks(self, steps: int) -> int:
        """Looks of a run of so many steps in which none is skipped; with looks adaptive, about."""
        return -(-self.num_in_window(steps) // self.k) if self.two_passes else 0

    def num_in_window(self, steps: int) -> int:
        """How many steps of such a run are in the window."""
        if self.ascent is None:
            return 0
        end = steps if self.look_until is None else min(steps, self.look_until)
        return max(0, end - self.look_from)

    def decider(self) -> Decider:
        """A new decider of which steps in the window look."""
        return DECIDERS[self.looks](k=self.k, first=self.look_from, end=self.look_until)

    def perturbation(
        self,
        weights: Shards,
        grads: Shards,
        *,
        rho: Tensor | float,
        mask: Tensor | float,
        reduce: Reduce,
    ) -> Perturbation:
        """How to perturb each layer; `grads` is the momentum where the ascent is along that."""
        how: dict[str, Any] = {"rho": rho, "mask": mask, "reduce": reduce}
        if self.along_momentum:
            how["rho"] = -rho
        if self.ascent == "layer":
            literal = self.layer_ascent == "literal"
            return layer_perturbation(weights, grads, literal=literal, **how)
        return model_perturbation(grads, p=self.p, **how)

    def learn(
        self,
        sam: Shards,
        grads: Shards,
        *,
        alpha: Tensor | float,
        clip: float | None,
        reduce: Reduce,
    ) -> look.Update:
        """The update on a look."""
        scope = self.scope
        if self.surrogate_gap:
            return look.gap(sam, grads, alpha=alpha, scope=scope, clip=clip, reduce=reduce)
        return look.learn(sam, grads, scope=scope, clip=clip, reduce=reduce)

    def reuse_step(
        self,
        grads: Shards,
        gv: Shards | None,
        *,
        alpha: Tensor | float,
        clip: float | None,
        reduce: Reduce,
    ) -> look.Update:
        """The update of any other step; without g_v the base gets g."""
        if gv is None:
            return look.plain(grads, clip=clip, reduce=reduce)
        natural, scope = self.reuse == "natural", self.scope
        return look.reuse(
            grads, gv, alpha=alpha, natural=natural, scope=scope, clip=clip, reduce=reduce
        )
