"""Checks of parameters and base optimizers: what a step cannot train correctly is refused."""

import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError

HALVES = (torch.float16, torch.bfloat16)


def check_real(params: Iterable[Tensor]) -> None:
    """ConfigError for complex parameters: norms and sums would use the real part only."""
    for p in params:
        if p.is_complex():
            raise ConfigError(
                f"parameters must be real, got one of shape {tuple(p.shape)} in {p.dtype}; keep "
                f"torch.view_as_real of it as the parameter, or leave it out of the optimizer."
            )


def check_no_fsdp1(params: Iterable[Tensor]) -> None:
    """ConfigError for FSDP1's flattened parameters."""
    for p in params:
        if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
            raise ConfigError(
                "parameters must be whole or those of fully_shard, got those of "
                "FullyShardedDataParallel (FSDP1); call fully_shard (FSDP2) and give the module "
                "to Engine."
            )


def check_whole(params: Sequence[Tensor]) -> None:
    """ConfigError for sharded parameters: the norm of a rank's shard is not that of the layer."""
    check_no_fsdp1(params)
    for p in params:
        if hasattr(p, "full_tensor"):
            raise ConfigError(
                "step needs whole parameters, got those of fully_shard (DTensor); give the module "
                "and this optimizer to Engine, which adds norms over ranks."
            )


def check_fp32(params: Iterable[Tensor]) -> None:
    """ConfigError for trained weights in 16 bits, where w + eps rounds back to most of w."""
    for p in params:
        if p.requires_grad and p.dtype in HALVES:
            raise ConfigError(
                f"trained weights must be fp32, got one of shape {tuple(p.shape)} in {p.dtype}, "
                f"which rounds most of a perturbation away; leave the module in fp32 and compute "
                f'in 16 bits with Engine(precision="bf16") or torch.autocast.'
            )


def check_one_device(params: Iterable[Tensor]) -> None:
    """ConfigError for trained weights on several devices, whose norms no one of them can add."""
    devices = sorted({str(p.device) for p in params if p.requires_grad})
    if len(devices) > 1:
        raise ConfigError(
            f"trained weights must be on one device, got {' and '.join(devices)}; move the module "
            f"to one, or cut it over ranks with fully_shard."
        )


def warn_of_halves(params: Iterable[Tensor]) -> None:
    """Like `check_fp32`, with a warning instead of the error."""
    try:
        check_fp32(params)
    except ConfigError as warning:
        warnings.warn(str(warning), stacklevel=3)


def check_base(base: Any) -> None:
    """ConfigError unless this is an optimizer whose step can be called without a closure."""
    if isinstance(base, type):
        raise ConfigError(
            f"base_optimizer must be an instance, got the class {base.__name__}; make it over the "
            f"same parameters first: SAM(params, {base.__name__}(params, lr=...), rho=...)."
        )
    if not isinstance(base, Optimizer):
        raise ConfigError(
            f"base_optimizer must be an instance of torch.optim.Optimizer, got a "
            f"{type(base).__name__}; make it over the same parameters first."
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if hasattr(base, "base_optimizer") or (closure and closure.default is closure.empty):
        raise ConfigError(
            f"base_optimizer must step from gradients alone, got {type(base).__name__}, which "
            f"calls a closure itself; use SGD, AdamW, Lamb or another without a closure."
        )


def check_minimises(groups: Iterable[dict[str, Any]]) -> None:
    """ConfigError for groups that maximise: for them the gradient points away from the loss's rise,
    and w + eps would be the better point, not the worse one."""
    if any(group.get("maximize") for group in groups):
        raise ConfigError(
            "base_optimizer must minimise, got maximize=True, with which the perturbation would "
            "improve what it is to make worse; leave maximize out and give the negative as loss."
        )


def check_no_scaler() -> None:
    """ConfigError in a step that GradScaler.step calls, which takes a closure without a word if it
    is not named: the base would get gradients that are still multiplied by the scale."""
    frame = inspect.currentframe()
    for _ in range(8):  # past torch's wrappers of `step`, and accelerate's
        frame = frame and frame.f_back
        if frame and frame.f_code.co_name == "_maybe_opt_step":  # of an enabled GradScaler
            raise ConfigError(
                "step must get gradients that are not scaled, got a call of it by GradScaler, "
                'which unscales no pass; use Engine(precision="fp16"), or bfloat16 by '
                "torch.autocast without GradScaler."
            )


def check_inside(params: Iterable[Tensor], module: nn.Module) -> None:
    """ConfigError for parameters that are not the module's: they would not be averaged over ranks,
    unscaled or saved."""
    known = {id(p) for p in module.parameters()}
    for p in params:
        if id(p) not in known:
            raise ConfigError(
                f"the optimizer's parameters must be the module's, got one of shape "
                f"{tuple(p.shape)} that is not; give Engine one module that holds all that is "
                f"trained (a head or a temperature in the loss, too)."
            )


def check_same(own: Optimizer, base: Optimizer) -> None:
    """ConfigError if the two optimizers are not over the same parameters."""
    mine, theirs = ({id(p) for g in o.param_groups for p in g["params"]} for o in (own, base))
    if mine != theirs:
        raise ConfigError(
            f"params must be those of base_optimizer, got {len(mine)} tensors against "
            f"{len(theirs)}, {len(mine & theirs)} of them shared; build both from the same list."
        )
