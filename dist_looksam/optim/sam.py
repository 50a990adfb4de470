"""SAM, LookSAM and Look-LayerSAM around any torch optimizer."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from .rule import Rule, check_choice
from .sharpness import Sharpness

ALONG = ("gradient", "momentum")


class SAM(Sharpness):
    """Sharpness-aware minimisation: the base gets the gradient at w + eps.

    Args:
        params: parameters, or group dictionaries (which may carry `rho`).
        base_optimizer: an instance over the same parameters.
        rho: radius of the ascent; with scope "layer" relative to ||w_i||.
        p: norm of the ascent, in (1, inf].
        k: look at every k-th step; g itself at the others (SAM-5 of the LookSAM paper).
        look_from: number of the first step that may look; before it the base gets g. Default 0.
        look_until: number of the first step that may not look any more; None: there is none.
        looks: "periodic", or "adaptive": in 1 of k steps, where ||g|| is large (k >= 2).
        scope: "model" or "layer" ascent. layer_ascent: "scaled" or "literal".
        alpha: GSAM's weight: on a look the base gets g_s minus alpha times the part of g that is
            orthogonal to g_s; None for SAM. decompose: scope of that part, "model" or "layer".
        along: "gradient", or "momentum" for MSAM: one pass a step, see optim/ahead.py.
        model: a step changes its buffers (BatchNorm statistics) as one pass would.

    Source: Foret et al., arXiv:2010.01412; layer scope: Liu et al., arXiv:2203.02714; GSAM: Zhuang
    et al., arXiv:2203.08065, which has k = 1 and, for ViTs, alpha 0.6; MSAM: Becker et al.,
    arXiv:2401.12033, which has rho 3 for ViTs.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        p: float = 2.0,
        *,
        k: int = 1,
        scope: str = "model",
        layer_ascent: str = "scaled",
        alpha: float | None = None,
        decompose: str = "model",
        along: str = "gradient",
        look_from: int = 0,
        look_until: int | None = None,
        looks: str = "periodic",
        model: nn.Module | None = None,
    ) -> None:
        check_choice("along", along, ALONG)
        rule = Rule(
            ascent=scope,
            k=k,
            along_momentum=along == "momentum",
            surrogate_gap=alpha is not None,
            p=p,
            layer_ascent=layer_ascent,
            decompose=decompose,
            looks=looks,
            look_from=look_from,
            look_until=look_until,
        )
        super().__init__(
            params, base_optimizer, rule=rule, rho=rho, alpha=alpha or 0.0, model=model
        )


class LookSAM(Sharpness):
    """LookSAM: the second gradient at every k-th step; its part g_v is reused at the others.

    Args:
        params, base_optimizer, rho, p, model: as in `SAM`.
        look_from, look_until, looks: as in `SAM`. Outside the window no g_v exists or is reused.
        alpha: weight of the reused part; 0 gives SAM every k-th step.
        k: steps between looks; 1 is SAM.
        decompose: "model" or "layer", scope of the projection and of the reuse.
        reuse: "paper", g + alpha (||g||/||g_v||) g_v, or "natural", g + alpha g_v.

    Source: Liu et al., arXiv:2203.02714, Algorithm 1.
    """

    scope = "model"

    def __init__(
        self,
        params: Any,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        alpha: float = 0.7,
        k: int = 5,
        *,
        p: float = 2.0,
        layer_ascent: str = "scaled",
        decompose: str = "model",
        reuse: str = "paper",
        look_from: int = 0,
        look_until: int | None = None,
        looks: str = "periodic",
        model: nn.Module | None = None,
    ) -> None:
        rule = Rule(
            ascent=self.scope,
            k=k,
            reuses_gv=True,
            p=p,
            layer_ascent=layer_ascent,
            decompose=decompose,
            reuse=reuse,
            looks=looks,
            look_from=look_from,
            look_until=look_until,
        )
        super().__init__(params, base_optimizer, rule=rule, rho=rho, alpha=alpha, model=model)


class LookLayerSAM(LookSAM):
    """Look-LayerSAM: LookSAM whose ascent is relative to each layer's weights.

    The arguments are those of `LookSAM`. rho is relative, ||eps_i|| / ||w_i||, so it is smaller
    than SAM's. layer_ascent is "scaled", or "literal" for Algorithm 2 as printed.

    Source: Liu et al., arXiv:2203.02714, Algorithm 2.
    """

    scope = "layer"

    def __init__(
        self,
        params: Any,
        base_optimizer: Optimizer,
        rho: float = 0.001,
        alpha: float = 0.7,
        k: int = 5,
        **settings: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, alpha=alpha, k=k, **settings)
