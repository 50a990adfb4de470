"""MSAM: the weights are perturbed before the only pass of a step, against the base's momentum.

v is the base's running sum or mean of gradients ("momentum_buffer", "exp_avg"). In each step
w is replaced by w + eps, eps = -rho v / ||v||, the gradient of that pass goes to the base, and w is
restored before the base steps. -v is the direction in which the base moves, so that eps is an
extrapolation of its last step. While v is zero or not there, as in the first step, eps is 0.

The paper's algorithm leaves the weights at w + eps from one step to the next, and takes eps off
within the base's step. That is the same: the same v gives the same eps. Here w is what evaluation,
checkpoints and exports see, and what a base's coupled weight decay uses. BatchNorm's statistics are
those of the only pass, at w + eps.

Source: Becker et al., arXiv:2401.12033, Algorithm 1, and its authors' AdamW_MSAM.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..maths.ascent import cosine
from ..maths.look import Update
from ..maths.shards import Shards
from .look import Look
from .seen import Seen
from .step import TwoGradients


def momentum_key(base: Optimizer) -> str:
    """The key of the momentum in the base's state. ConfigError for a base that has none."""
    for setting, key in (("betas", "exp_avg"), ("momentum", "momentum_buffer")):
        if setting not in base.defaults:
            continue
        values = [group[setting] for group in base.param_groups]
        if all(float(v[0] if setting == "betas" else v) > 0 for v in values):
            return key
        raise ConfigError(
            f"an ascent along the momentum needs a base with momentum, got {type(base).__name__} "
            f"with {setting} {values[0]}; give all its groups momentum, usually 0.9."
        )
    raise ConfigError(
        f"an ascent along the momentum needs a base with momentum, got {type(base).__name__}; use "
        f"SGD, AdamW, Lamb or Lars with momentum."
    )


class Ahead(TwoGradients):
    """`TwoGradients` that can also perturb before the pass, by `perturb_ahead`.

    In such a step the calls are, in order: `perturb_ahead`, pass, `decide`, `apply_`, `finish`.
    """

    _ahead: Look | None = None

    @property
    def perturbed(self) -> bool:
        """True while a look, or a step that has perturbed before its pass, is not finished."""
        return self._ahead is not None or super().perturbed

    def perturbs_ahead(self) -> bool:
        """Whether this step perturbs before its pass: with MSAM, from look_from to look_until."""
        return self.rule.along_momentum and self.rule.in_window(self.steps)

    @torch.no_grad()
    def perturb_ahead(self, params: Shards | None = None) -> bool:
        """Before the pass: replace w by w + eps in the parameters that have momentum. One reduce.

        Args:
            params: by default those of the groups.

        Returns:
            Whether there are any: the same on all ranks.

        Raises:
            ConfigError: the base keeps its momentum under another name.
        """
        key = momentum_key(self.base_optimizer)
        moved: dict[Tensor, Tensor] = {}
        for p in self._layers() if params is None else params:
            frozen = isinstance(p, nn.Parameter) and not p.requires_grad
            state = self.state[p] if p in self.state and not frozen else {}
            kept = state.keys() - {"g_v"}  # not of the base
            if kept and key not in kept:
                raise ConfigError(
                    f"an ascent along the momentum needs a base that keeps it as {key}, got "
                    f"{type(self.base_optimizer).__name__} with {', '.join(sorted(kept))}; use "
                    f"SGD, AdamW, Lamb or Lars."
                )
            if state.get(key) is not None:
                moved[p] = state[key]
        if not moved:
            return False
        layers, momenta = list(moved), list(moved.values())
        perturbation = self.perturbation(layers, self._split(layers, momenta))
        self._ahead = Look()
        self._ahead.keep(layers)
        self._perturb_kept_(self._ahead, layers, momenta, perturbation)
        return True

    def restore(self, params: Shards | None = None) -> None:
        super().restore(params)
        if self._ahead is not None:
            with torch.no_grad():
                self._ahead.restore(params)

    def abandon(self) -> None:
        super().abandon()
        self._ahead = None

    def finish(self, update: Update) -> Seen:
        ahead, self._ahead = self._ahead, None
        seen = super().finish(update)
        if ahead is not None and ahead.cosine_sums:
            cos = cosine(self.reduce(torch.cat(ahead.cosine_sums, -1)))
            seen = self.seen = replace(seen, eps_cosine=cos)
        return seen
