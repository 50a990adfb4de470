"""`--perturb`: the layers that are perturbed on a look, by name or by the module they are in.

Perturbing only normalisation layers: Mueller et al., arXiv:2306.04226 (SAM-ON).
"""

import re

from torch import nn

from ..errors import ConfigError

ALL, NORMS = "all", "norms"
# The class, or one that it is derived from: LayerNorm, BatchNorm2d, RMSNorm, timm's RmsNorm, ...
_NORM = re.compile(r"norm(\dd)?$", re.IGNORECASE)


def _check_which(which: str) -> None:
    """ConfigError unless this is `all`, `norms` or a regular expression."""
    try:
        re.compile(which)
    except re.error as error:
        raise ConfigError(
            f"perturb must be {ALL}, {NORMS} or a regular expression of layer names, got {which!r} "
            f"({error}); correct it."
        ) from None
    if not which:
        raise ConfigError(
            f"perturb must be {ALL}, {NORMS} or a regular expression of layer names, got an empty "
            f"one; use {ALL}."
        )


def perturbed(model: nn.Module, which: str) -> set[int]:
    """The ids of the trainable parameters that are perturbed.

    Args:
        which: `all`; `norms`, the weights and biases of normalisation layers; or a regular
            expression that is searched in the names of parameters.

    Raises:
        ConfigError: there is none.
    """
    _check_which(which)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if which == NORMS:
        inside = {id(p) for m in model.modules() if _norm(m) for p in m.parameters(recurse=False)}
        found = inside & {id(p) for p in named.values()}
    else:
        found = {id(p) for name, p in named.items() if which == ALL or re.search(which, name)}
    if not found:
        what = "normalisation layers" if which == NORMS else "a layer's name"
        raise ConfigError(
            f"perturb must fit {what} of {type(model).__name__}, got {which!r}, which fits none of "
            f"its {len(named)} layers, such as {next(iter(named), 'none')}; use {ALL}, or another "
            f"expression."
        )
    return found


def _norm(module: nn.Module) -> bool:
    return any(_NORM.search(kind.__name__) for kind in type(module).__mro__)
