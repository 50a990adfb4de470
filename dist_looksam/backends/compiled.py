"""`--compile blocks`: the forward of a network's blocks as one compiled graph for all of them."""

import importlib.util
import os
import shutil
from collections import Counter
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .units import units

COMPILES = ("off", "blocks")
_LEAST = (2, 5)  # torch: earlier versions compile every block of its own
_MOST_GRAPHS = 32  # importing timm lifts torch's limit of 8 to 1,000,000 for the whole process


def blocks(module: nn.Module) -> list[nn.Module]:
    """The units of the most frequent class; ConfigError if there are not two of one class, or
    torch is too old to compile one graph for all of them."""
    if version() < _LEAST:
        raise ConfigError(
            f"compile blocks needs torch >= {_LEAST[0]}.{_LEAST[1]}, got {torch.__version__}; "
            f"install a newer one or use --compile off."
        )
    parts = units(module)
    kind, count = Counter(type(part) for part in parts).most_common(1)[0] if parts else (None, 0)
    if count < 2:
        raise ConfigError(
            f"compile blocks needs a network with a list of blocks of one class, got "
            f"{type(module).__name__} without one; use --compile off."
        )
    return [part for part in parts if type(part) is kind]


def compiled_kinds(module: nn.Module) -> list[type[nn.Module]]:
    """The classes of blocks that `compile_blocks` has compiled."""
    return list(dict.fromkeys(type(m) for m in module.modules() if "forward" in vars(m)))


def compile_blocks(module: nn.Module, *, backend: str = "inductor") -> list[nn.Module]:
    """Compile the training forward of the `blocks` of a network, in place; returns them.

    All of them, both passes of a look and all micro-batches share one graph: weights are its
    inputs. Evaluation runs as without. Names of parameters stay as they are, hooks stay outside of
    the graph, and a deepcopy is compiled, too. Call it before the module is wrapped or sharded.

    Raises:
        ConfigError: as `blocks`. In the first step: a block cannot be compiled as one graph, or
            needs too many.
    """
    parts = blocks(module)
    kind = type(parts[0])
    eager: Any = kind.forward
    limits: Any = importlib.import_module("torch._dynamo.config")
    limits.cache_size_limit = min(limits.cache_size_limit, _MOST_GRAPHS)
    compiled = torch.compile(eager, fullgraph=True, backend=backend)

    def forward(block: nn.Module, *args: Any, **how: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return eager(block, *args, **how)
        try:
            return compiled(block, *args, **how)
        except _refusals() as error:
            text = next((line for line in str(error.__cause__ or error).splitlines() if line), "")
            raise ConfigError(
                f"compile blocks needs a block that is one graph, got {kind.__name__}, for which "
                f"torch.compile says: {text}; use --compile off."
            ) from error

    for part in parts:
        part.forward = MethodType(forward, part)
    return parts


def _refusals() -> tuple[type[Exception], ...]:
    """What torch.compile raises for what is no graph, or one graph too many."""
    names = ("TorchDynamoException", "FailOnRecompileLimitHit", "FailOnCacheLimitHit")
    return tuple(getattr(torch._dynamo.exc, n) for n in names if hasattr(torch._dynamo.exc, n))


def version() -> tuple[int, ...]:
    """torch's, as (major, minor)."""
    return tuple(int(n) for n in torch.__version__.split(".")[:2])


def lacking(device: str) -> str | None:
    """A sentence on what this machine lacks for torch.compile; None: nothing."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and importlib.util.find_spec("triton") is None:
        return "compile blocks needs triton on GPUs, which is not installed; pip install triton."
    compilers = [os.environ.get("CC" if on_gpu else "CXX"), "gcc" if on_gpu else "g++"]
    compilers += ["clang" if on_gpu else "clang++"]
    if any(shutil.which(name) for name in compilers if name):
        return None
    return (
        f"compile blocks needs a C{'' if on_gpu else '++'} compiler, got none of "
        f"{', '.join(filter(None, compilers))} on the path; install one or use --compile off."
    )
