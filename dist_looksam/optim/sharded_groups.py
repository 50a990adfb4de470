"""Groups of samples, one after the other, where the optimizer's parameters are shards of layers."""

from typing import Any

import torch
from torch import Tensor

from ..maths.ascent import Perturbation, perturb_
from ..maths.shards import Shards, whole
from .look import Look, add
from .rule import Rule


class ShardedGroups:
    """The part of `TwoGradients` for backends that split parameters or state over ranks.

    For each group: `perturb_group_` or `perturb_whole_group`, second pass, `close_group`; after the
    last `set_group_means`. Gradients are given, since they are not in `.grad`.
    """

    rule: Rule
    visible_dtype: torch.dtype | None
    _perturbed: Look | None

    def column(self, name: str, params: Shards) -> Tensor | float:
        raise NotImplementedError

    def _perturb_kept_(
        self, look: Look, params: Shards, grads: Shards, perturbation: Perturbation
    ) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def perturb_group_(self, params: Shards, grads: Shards, perturbation: Perturbation) -> None:
        """Add a group's g to the sum of g, and replace w by w + eps, in some or all parameters."""
        look = self._perturbed = self._perturbed or Look()
        add(look.grads, params, grads)
        look.keep(params)
        self._perturb_kept_(look, params, grads, perturbation)

    @torch.no_grad()
    def perturb_whole_group(self, params: Shards, layers: Shards, grads: Shards) -> None:
        """The same of whole layers, which every rank has, where `params` are its shards of them.

        Args:
            layers, grads: in the order of the layers of `params`. Layers are written to; they must
                be the same tensors for every group. No collective.
        """
        how: dict[str, Any] = {"rho": self.column("rho", params), "reduce": whole}
        how["mask"] = self.column("perturb", params)
        perturbation = self.rule.perturbation(layers, grads, **how)
        look = self._perturbed = self._perturbed or Look()
        add(look.grads, layers, grads)
        look.keep(layers)
        sums = perturb_(layers, grads, perturbation, visible_dtype=self.visible_dtype)
        if sums is not None:
            look.cosine_sums.append(sums)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def close_group(self, params: Shards, grads: Shards, *, last: bool) -> list[Tensor]:
        """After a group's second pass: restore w, add its gradient to the sum of g_s.

        Returns:
            After the last group: the sum of g_s, which is not kept here.
        """
        assert self._perturbed is not None
        self._perturbed.restore(free=last)
        add(self._perturbed.sums, params, grads)
        if not last:
            return []
        sums = self._perturbed.take_sum()
        return [sums[p] for p in params]

    def sum_of_g(self, params: Shards) -> list[Tensor]:
        """The sum of the groups' g in these parameters, itself."""
        assert self._perturbed is not None
        return self._perturbed.grads_of(params)

    def set_group_means(self, params: Shards, means: Shards) -> None:
        """After the last group: g, one mean for each parameter, which `apply_` writes to."""
        assert self._perturbed is not None
        self._perturbed.grads = dict(zip(params, means, strict=True))
