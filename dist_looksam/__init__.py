"""Large-batch distributed training with SAM, LookSAM and Look-LayerSAM."""

from .checkpoint import restore
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
