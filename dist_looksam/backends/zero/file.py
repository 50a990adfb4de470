"""Reads and checks the user's DeepSpeed file, JSON."""

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from ...errors import ConfigError


def _number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and isfinite(value) and value >= 0


def _whole(value: Any) -> bool:
    return _number(value) and value == int(value)


Kind = tuple[str, Callable[[Any], bool]]
_OBJECT: Kind = ("an object", lambda value: isinstance(value, dict))
_FLAG: Kind = ("true or false", lambda value: isinstance(value, bool))
_WHOLE: Kind = ("a whole number", _whole)
_POSITIVE: Kind = ("a whole number from 1", lambda value: _whole(value) and value > 0)
_NUMBER: Kind = ("a number from 0", _number)
_TEXT: Kind = ("a text", lambda value: isinstance(value, str))
_DEVICE: Kind = ("cpu, none or nvme", lambda value: value in ("cpu", "none", "nvme"))

# By dotted name, an object before its entries. Values may be "auto" or null, which means not set;
# objects at the top may not be "auto".
_KINDS: dict[str, Kind] = {
    "train_batch_size": _WHOLE,
    "train_micro_batch_size_per_gpu": _WHOLE,
    "gradient_accumulation_steps": _WHOLE,
    "gradient_clipping": _NUMBER,
    "steps_per_print": _POSITIVE,
    "zero_optimization": _OBJECT,
    "zero_optimization.stage": ("0, 1, 2 or 3", lambda value: _whole(value) and value <= 3),
    "zero_optimization.round_robin_gradients": _FLAG,
    "zero_optimization.overlap_comm": _FLAG,
    "zero_optimization.reduce_bucket_size": _POSITIVE,
    "zero_optimization.allgather_bucket_size": _POSITIVE,
    "zero_optimization.stage3_prefetch_bucket_size": _WHOLE,
    "zero_optimization.prefetch_bucket_size": _WHOLE,
    "zero_optimization.stage3_param_persistence_threshold": _WHOLE,
    "zero_optimization.param_persistence_threshold": _WHOLE,
    "zero_optimization.offload_optimizer": _OBJECT,
    "zero_optimization.offload_optimizer.device": _DEVICE,
    "zero_optimization.offload_param": _OBJECT,
    "zero_optimization.offload_param.device": _DEVICE,
    "bf16": _OBJECT,
    "bf16.enabled": _FLAG,
    "fp16": _OBJECT,
    "fp16.enabled": _FLAG,
    "data_types": _OBJECT,
    "data_types.grad_accum_dtype": _TEXT,
    "torch_autocast": _OBJECT,
    "torch_autocast.enabled": _FLAG,
    "torch_autocast.dtype": _TEXT,
}


def read(path: str | None) -> dict[str, Any]:
    """The user's file, or {}. Values that set nothing are left out, old forms are replaced.

    Raises:
        ConfigError: it does not exist, is no JSON object, or a value that is used here is of a type
            that DeepSpeed does not take.
    """
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise ConfigError(
            f"deepspeed_config must be a JSON file, got {path} ({error.strerror}); name another."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"deepspeed_config must be JSON, got {path} with {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed_config must be a JSON object, got {path} with another value.")
    _renew(content)
    for name, kind in _KINDS.items():
        *sections, key = name.split(".")
        section = content
        for part in sections:
            section = section.get(part, {})
        if key in section:
            _check(section, key, name, kind)
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Names must be unique, as for DeepSpeed."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} twice")
    return dict(pairs)


def _renew(content: dict[str, Any]) -> None:
    """DeepSpeed still takes `"zero_optimization": true`, which is stage 1, and `bfloat16`."""
    zero = content.get("zero_optimization")
    if isinstance(zero, bool):
        content["zero_optimization"] = {"stage": int(zero)}
    if "bfloat16" in content:
        old = content.pop("bfloat16")
        if content.get("bf16") is None:
            content["bf16"] = old


def _check(section: dict[str, Any], key: str, name: str, kind: Kind) -> None:
    value = section[key]
    if value is None or (value == "auto" and not (kind is _OBJECT and name == key)):
        del section[key]
        return
    words, fits = kind
    if not fits(value):
        raise ConfigError(
            f"{name} must be {words} in the DeepSpeed config, got {json.dumps(value)[:60]}; "
            f"correct it or leave it out."
        )
    if kind in (_WHOLE, _POSITIVE):
        section[key] = int(value)
