"""Large-batch distributed training with SAM, LookSAM and Look-LayerSAM.

A name is imported when it is first used: torch takes seconds, and `dist-looksam --help` needs none.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.restore import restore
    from .engine import Engine
    from .errors import ConfigError
    from .optim.base import Lamb, Lars
    from .optim.huggingface import TrainerMixin
    from .optim.sam import SAM, LookLayerSAM, LookSAM

__all__ = [
    "SAM", "ConfigError", "Engine", "Lamb", "Lars", "LookLayerSAM", "LookSAM", "TrainerMixin",
    "restore",
]  # fmt: skip
__version__ = "0.1.0"

_HOMES = {
    "ConfigError": "errors",
    "Engine": "engine",
    "restore": "checkpoint",
    "TrainerMixin": "optim.huggingface",
    **dict.fromkeys(("Lamb", "Lars"), "optim.base"),
    **dict.fromkeys(("SAM", "LookLayerSAM", "LookSAM"), "optim.sam"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    return found
