"""All ranks agree on the checkpoint to go on from, each having checked its share of it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backends.backend import Backend
from ..errors import ConfigError, RunError
from .reader import Reader
from .writer import unlayered


def choose(backend: Backend, candidates: Sequence[Path]) -> tuple[Reader | None, list[str]]:
    """The first whole checkpoint among rank 0's `candidates`, and sentences on those before it.

    Collective: every rank checks some of the parts, so that 100 GB are not read by one.
    """
    paths = backend.gather([str(p) for p in candidates])[0]
    damaged: list[str] = []
    for path in paths:
        reader, problem = None, None
        try:
            reader = Reader(Path(path))
            reader.verify(range(backend.rank, len(reader.manifest["parts"]), backend.size))
        except RunError as error:
            problem = str(error)
        problems = [p for p in backend.gather(problem) if p]
        if not problems:
            return reader, damaged
        damaged.append(problems[0])
    return None, damaged


@torch.no_grad()
def load_buffers(module: nn.Module, found: dict[str, Tensor], path: Path) -> None:
    """Put running statistics and frozen parameters back.

    ConfigError if the checkpoint's are of another model.
    """
    own = {name: tensor for name, (tensor, _) in unlayered(module).items()}
    for name, tensor in own.items():
        if name not in found or found[name].shape != tensor.shape:
            raise ConfigError(
                f"the checkpoint must be of the same model, got no {name} of shape "
                f"{list(tensor.shape)} in {path}."
            )
        tensor.copy_(found[name])
