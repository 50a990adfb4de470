"""What torch.distributed.checkpoint asks of an optimizer without state: to make it."""

from typing import Any

import torch


def made_state(optimizer: Any) -> bool:
    """True if the caller of `step` wants state made and nothing else, which then is done.

    torch sets every gradient and learning rate to 0 and calls step without a closure. The base then
    steps; g_v is 0. No step is counted.
    """
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"] if p.requires_grad]
    if optimizer.state or not params or any(group.get("lr") != 0 for group in groups):
        return False
    if any(p.grad is None or bool(p.grad.any()) for p in params):
        return False
    optimizer.base_optimizer.step()
    for p in params if optimizer.rule.keeps else ():
        optimizer.state[p]["g_v"] = torch.zeros_like(p)
    return True
