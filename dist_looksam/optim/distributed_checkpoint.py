"""How a two-gradient optimizer works with torch.distributed.checkpoint."""

from typing import Any

import torch

from ..errors import ConfigError


def counters_in(state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """The counters in a state_dict, or in its groups; None for another optimizer's state.

    Raises:
        ConfigError: there is g_v without the counters.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ConfigError(
            f"state_dict must be an optimizer's, got one without state or param_groups "
            f"({', '.join(map(str, list(state_dict)[:3])) or 'empty'}); pass what "
            f"optimizer.state_dict() returned."
        )
    for place in (state_dict, *state_dict["param_groups"]):
        if "sharpness" in place:
            return place["sharpness"]
    if any("g_v" in state for state in state_dict["state"].values()):
        raise ConfigError(
            "state_dict must hold the counters of steps, got g_v without them, as torch's "
            "flatten_optimizer_state_dict leaves it; save without that option."
        )
    return None


def made_state(optimizer: Any) -> bool:
    """Initialise empty state if that is why torch has called `step`; returns whether it was.

    torch then has set every gradient and learning rate to 0 and calls step without a closure. The
    base steps, and g_v becomes 0. No step is counted.
    """
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"] if p.requires_grad]
    if optimizer.state or not params or any(group.get("lr") != 0 for group in groups):
        return False
    if any(p.grad is None or bool(p.grad.any()) for p in params):
        return False
    optimizer.base_optimizer.step()
    for p in params if optimizer.rule.reuses_gv else ():
        optimizer.state[p]["g_v"] = torch.zeros_like(p)
    return True
