"""Parts of a network by their names: the head, the layers from input to output, frozen parameters.

Layers are those of the fine-tuning of BEiT (Bao et al., arXiv:2106.08254) and MAE (He et al.,
arXiv:2111.06377, appendix A): embeddings, each block, then the last norm and the head.
"""

import re
from typing import Any

from torch import nn

from ..errors import ConfigError

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def heads(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules that give the logits: of timm's models as timm says, else `head`."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def in_head(model: nn.Module, name: str) -> bool:
    """Whether a parameter is one of the head's."""
    return any(name.startswith(f"{head}.") for head in heads(model))


def lr_scales(model: nn.Module, *, layer_decay: float, head_lr: float) -> dict[int, float]:
    """The factor of lr by id of each parameter; {} where all are 1.

    Block i of n has layer_decay^(n - i), what stands before the blocks in the order of the
    parameters (patches, positions, tokens, a stem) layer_decay^(n + 1), the rest 1; the head also
    times head_lr.

    Raises:
        ConfigError: layer_decay of a model without numbered blocks, head_lr of one without a head.
    """
    if layer_decay == 1 and head_lr == 1:
        return {}
    names = [name for name, _ in model.named_parameters()]
    blocks = [int(found[1]) for name in names if (found := _BLOCK.match(name))]
    if layer_decay != 1 and not blocks:
        raise ConfigError(
            f"layer_decay needs a model of blocks.0, blocks.1, ..., got {type(model).__name__} "
            f"with {names[0]}; leave it out."
        )
    if head_lr != 1 and not any(in_head(model, name) for name in names):
        raise ConfigError(
            f"head_lr needs a model with {' or '.join(heads(model))}, got {type(model).__name__} "
            f"with {names[-1]}; leave it out."
        )
    top, layer, scales = max(blocks, default=0) + 2, 0, {}
    for name, p in model.named_parameters():
        if found := _BLOCK.match(name):
            layer = int(found[1]) + 1
        elif layer or not blocks:
            layer = top
        scales[id(p)] = layer_decay ** (top - layer) * (head_lr if in_head(model, name) else 1.0)
    return scales


def freeze(model: nn.Module, pattern: str | None) -> list[str]:
    """Turn gradients off for the parameters in whose name `pattern` is found; returns their names.

    Raises:
        ConfigError: it is no regular expression, or fits none, or all of them.
    """
    if pattern is None:
        return []
    check_pattern(pattern)
    named = dict(model.named_parameters())
    frozen = [name for name in named if re.search(pattern, name)]
    if len(frozen) in (0, len(named)):
        which = "all" if frozen else "none"
        raise ConfigError(
            f"freeze must fit some of the {len(named)} parameters of {type(model).__name__}, got "
            f"{pattern!r}, which fits {which}, such as {next(iter(named))}; use another expression."
        )
    for name in frozen:
        named[name].requires_grad_(False)
    return frozen


def check_pattern(pattern: str) -> None:
    """ConfigError unless `freeze` can search for it."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"freeze must be a regular expression of names of parameters, got {pattern!r} "
            f"({error}); correct it."
        ) from None
