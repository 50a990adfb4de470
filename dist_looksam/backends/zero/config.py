"""The DeepSpeed configuration of a run: made from the flags, merged with the user's file.

A file may set anything that no flag sets. Where both say something, they must agree.
"""

from typing import Any

from ...errors import ConfigError
from .file import read

__all__ = ["clip_of", "make", "read", "stage_of"]

_FLOAT16 = ("torch.float16", "fp16", "float16", "half", None)  # None: torch's default on a GPU
_NOT_OURS = {
    "optimizer": "use --optimizer and --base",
    "scheduler": "use --schedule and --warmup_steps",
}


def stage_of(file: dict[str, Any], flag: int | None) -> int:
    """The ZeRO stage: the flag's, the file's, or 2. ConfigError if they differ."""
    stage = file.get("zero_optimization", {}).get("stage")
    if stage is not None and flag is not None and stage != flag:
        raise ConfigError(
            f"zero_stage must agree with the DeepSpeed config, got {flag} and {stage}; drop one."
        )
    return flag if flag is not None else 2 if stage is None else int(stage)


def clip_of(file: dict[str, Any], flag: float | None) -> float | None:
    """The maximum norm for our clipping, which replaces DeepSpeed's: the flag's or the file's.

    ConfigError if it is set in both places.
    """
    limit = file.get("gradient_clipping") or None
    if limit == "auto":
        return flag
    if limit is not None and flag is not None:
        raise ConfigError(
            f"clipping must be set once, got clip {flag:g} and gradient_clipping {limit} in "
            f"the DeepSpeed config; drop one."
        )
    return flag if limit is None else float(limit)


def make(
    file: dict[str, Any],
    *,
    stage: int,
    batch_size: int,
    micro_batch: int,
    ranks: int,
    precision: str,
    offload: bool,
) -> dict[str, Any]:
    """The configuration for deepspeed.initialize.

    Raises:
        ConfigError: the file contradicts a flag, or has a setting that would train wrongly.
    """
    _check_file(file, precision, stage)
    if not file.get("prescale_gradients"):
        check_predivide(file.get("gradient_predivide_factor", 1.0), stage, ranks)
    numbers = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": batch_size // (micro_batch * ranks),
    }
    for name, ours in numbers.items():
        if file.get(name, "auto") not in ("auto", ours):
            raise ConfigError(
                f"{name} must agree with the flags, got {file[name]} in the DeepSpeed config and "
                f"{ours}; use auto there, or drop it."
            )
    zero = {**file.get("zero_optimization", {}), "stage": stage}
    if offload:
        if zero.get("offload_optimizer", {}).get("device") == "none":
            raise ConfigError(
                "offload must agree with the DeepSpeed config, got true and an offload_optimizer "
                "of device none; drop one."
            )
        zero["offload_optimizer"] = {"device": "cpu", **zero.get("offload_optimizer", {})}
    made: dict[str, Any] = {
        "steps_per_print": 10**9,
        # For these times DeepSpeed lets the host wait for the device in each micro-batch.
        "timers": {"throughput": {"enabled": False}},
        **file,
        **numbers,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16" and stage > 0:
        # Before a step calls DeepSpeed it knows whether all is finite. DeepSpeed would look again:
        # a fifth of a step's operators at stage 2, and a wait for the device.
        made["bf16"] = {"check_grad_overflow": False, **file.get("bf16", {}), "enabled": True}
        made["data_types"] = {"grad_accum_dtype": "fp32", **file.get("data_types", {})}
    if precision == "fp16":
        made["fp16"] = {"initial_scale_power": 16, **file.get("fp16", {}), "enabled": True}
    return made


def _check_file(file: dict[str, Any], precision: str, stage: int) -> None:
    for name, instead in _NOT_OURS.items():
        if name in file:
            raise ConfigError(f"the DeepSpeed config must not have {name}, got one; {instead}.")
    for name in ("bf16", "fp16"):
        if file.get(name, {}).get("enabled") is True and precision != name:
            raise ConfigError(
                f"precision must agree with the DeepSpeed config, got {precision} and {name}; "
                f"use --precision {name}."
            )
    if precision == "fp16" and stage == 0:
        raise ConfigError(
            "fp16 needs ZeRO stage 1, 2 or 3, got stage 0, where DeepSpeed scales no loss; "
            "use --zero_stage 1 or --backend ddp."
        )
    autocast = file.get("torch_autocast", {})
    if autocast.get("enabled") and autocast.get("dtype") in _FLOAT16:
        raise ConfigError(
            f"torch_autocast must have dtype bfloat16, got {autocast.get('dtype')}, whose loss "
            f"scale is kept apart from the optimizer's; use bfloat16 there, or --precision fp16."
        )
    zero = file.get("zero_optimization", {})
    if zero.get("round_robin_gradients"):
        raise ConfigError(
            "round_robin_gradients must be false, got true, which moves layers about; remove it."
        )
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name, {}).get("device") == "nvme":
            raise ConfigError(f"{name} must be on cpu or none, got nvme; use device cpu.")


def check_predivide(factor: float, stage: int, ranks: int) -> None:
    """ConfigError where DeepSpeed divides gradients and does not multiply back."""
    if stage == 3 and factor == ranks != 1:
        raise ConfigError(
            f"gradient_predivide_factor must not be the number of ranks at ZeRO stage 3, got "
            f"{factor}, with which DeepSpeed makes gradients {ranks} times too small; remove it."
        )
