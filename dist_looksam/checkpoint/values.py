"""Python values as JSON, without pickle; tensors with dimensions are replaced by names."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .form import BY_CODE, DTYPES

_MARK = "!"  # key of a JSON object that represents a value of another type


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a value; tensors in it are put into `tensors`, under names that begin with `name`.

    Raises:
        ConfigError: it holds something else than numbers, text, tensors and containers of them.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return _pack_tensor(value, name, tensors)
    if isinstance(value, list | tuple):
        packed = [pack(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
        return packed if isinstance(value, list) else {_MARK: "tuple", "of": packed}
    if isinstance(value, dict):
        if all(isinstance(k, str) and k != _MARK for k in value):
            return {k: pack(v, f"{name}/{k}", tensors) for k, v in value.items()}
        items = [[k, v] for k, v in value.items()]
        return {_MARK: "dict", "of": pack(items, name, tensors)}
    raise _foreign(value, name)


def _pack_tensor(value: Tensor, name: str, tensors: dict[str, Tensor]) -> Any:
    if type(value) not in (Tensor, nn.Parameter) or value.dtype not in DTYPES:
        raise _foreign(value, name)
    if value.ndim == 0 and not value.is_complex():
        return {_MARK: "number", "dtype": DTYPES[value.dtype], "value": value.item()}
    tensors[name] = value.detach()
    return {_MARK: "tensor", "name": name}


def _foreign(value: Any, name: str) -> ConfigError:
    kind = type(value).__name__ + (f" of {value.dtype}" if isinstance(value, Tensor) else "")
    return ConfigError(
        f"a checkpoint holds numbers, text, tensors and lists or dictionaries of them, got a "
        f"{kind} as {name}; keep the state of the optimizer in these."
    )


def packable(value: Any) -> bool:
    """Whether `pack` takes it."""
    try:
        pack(value, "", {})
    except ConfigError:
        return False
    return True


def unpack(packed: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The value that was given to `pack`; `tensor` returns a tensor by its name."""
    if isinstance(packed, list):
        return [unpack(p, tensor) for p in packed]
    if not isinstance(packed, dict):
        return packed
    kind = packed.get(_MARK)
    if kind is None:
        return {k: unpack(p, tensor) for k, p in packed.items()}
    if kind == "number":
        return torch.tensor(packed["value"], dtype=BY_CODE[packed["dtype"]])
    if kind == "tensor":
        return tensor(packed["name"])
    of = unpack(packed["of"], tensor)
    return dict(of) if kind == "dict" else tuple(of)
