"""Restores an engine: finds and verifies a checkpoint, compares it with the model, loads it."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.backend import Backend
from ..backends.names import name_in
from ..engine import Engine
from ..errors import ConfigError, RunError
from .module import put_extra_states, unlayered
from .reader import Reader, candidates


def restore(engine: Engine, path: str | Path) -> Reader:
    """Load a checkpoint into an engine: weights, frozen layers, buffers, the optimizer's state, the
    settings of its param groups (lr, weight_decay, rho, ...), counters and loss scale. Collective.

    Args:
        engine: of the same model, made as the one that was saved; any backend, any number of ranks.
        path: a checkpoint, `.../step-N`, or a folder of them, whose newest undamaged one is taken.

    Returns:
        The checkpoint: `step` is the number of steps done, `extra` that given to the writer.

    Raises:
        ConfigError: there is no checkpoint, or it is of another model or other param groups.
        RunError: all are damaged. The engine is unchanged in either case.
    """
    check_engine(engine)
    if not isinstance(path, str | Path):
        raise ConfigError(f"path must be a checkpoint or a folder of them, got {path!r}.")
    backend = engine.backend
    reader, damaged = choose(backend, candidates(Path(path)))
    if reader is None:
        if damaged:
            raise RunError(damaged[0])
        raise ConfigError(
            f"path must be a checkpoint or a folder of checkpoints, got {path}, which holds none; "
            f"name one like RUN/checkpoints."
        )
    if backend.rank == 0:
        for problem in damaged:
            warnings.warn(f"{problem} {reader.path} is taken instead.", stacklevel=2)
    take(engine, reader, settings=True)
    return reader


def check_engine(engine: Any) -> None:
    """ConfigError for anything but an Engine, whose backend knows where weights and state are."""
    if not isinstance(engine, Engine):
        raise ConfigError(
            f"a checkpoint is of an Engine, got a {type(engine).__name__}; pass the Engine first "
            f"(one around the module and its optimizer will do)."
        )


def choose(backend: Backend, paths: Sequence[Path]) -> tuple[Reader | None, list[str]]:
    """The first undamaged checkpoint among rank 0's `paths`, and a sentence on each one before it.

    Collective: every rank verifies some of the parts.
    """
    damaged: list[str] = []
    for path in backend.gather([str(p) for p in paths])[0]:
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
def take(engine: Engine, reader: Reader, *, settings: bool) -> None:
    """Load a checkpoint that `choose` has verified. Collective.

    Args:
        settings: False leaves the settings of the param groups unchanged.

    Raises:
        ConfigError, RunError: it does not fit; on every rank, before anything is changed.
    """
    backend, lacking = engine.backend, set[str]()
    own = unlayered(backend)
    problem: tuple[type[Exception], str] | None = None
    try:
        lacking = _compare(backend, reader, own, settings)
    except (ConfigError, RunError) as error:
        problem = type(error), str(error)
    for kind, sentence in filter(None, backend.gather(problem)):
        raise kind(sentence)

    def read(name: str, key: str, start: int, stop: int) -> Tensor | None:
        return None if name in lacking else reader(name, key, start, stop)

    counters = reader.counters
    backend.load(read, counters)
    for name, (tensor, _) in own.items():
        if name not in lacking:
            tensor.copy_(reader.unlayered(name, backend.rank, backend.size))
    put_extra_states(backend.module, reader.extra_states)
    if settings and "groups" in counters:
        backend.load_groups(_settings(backend.counters()["groups"], counters["groups"]))
    if reader.passes is not None:
        engine.passes = int(reader.passes)


def _compare(
    backend: Backend, reader: Reader, own: dict[str, tuple[Tensor, bool]], settings: bool
) -> set[str]:
    """The names that an older version did not write; ConfigError or RunError if it does not fit."""
    needed = {p.name: list(p.shape) for p in backend.pieces()}
    needed |= {name: list(tensor.shape) for name, (tensor, _) in own.items()}
    saved = reader.tensor_shapes()
    if saved.keys() != needed.keys() and saved.keys() == {f"module.{name}" for name in needed}:
        reader.drop_prefix("module.")  # of DistributedDataParallel
        saved = reader.tensor_shapes()
    lacking = needed.keys() - saved.keys()
    # Format 2 did not have frozen layers that were sharded.
    allowed = _frozen(backend.module) if reader.manifest["format"] == 2 else set()
    for name in [*sorted(lacking - allowed), *sorted(needed.keys() & saved.keys())]:
        if needed[name] != saved.get(name):
            raise ConfigError(
                f"the checkpoint must be of the same model, got "
                f"{f'{name} of shape {saved[name]}' if name in saved else f'no {name}'} instead of "
                f"shape {needed[name]} in {reader.path}."
            )
    if unknown := sorted(saved.keys() - needed.keys()):
        raise ConfigError(
            f"the checkpoint must be of the same model, got {unknown[0]} in {reader.path}, which "
            f"the model has not."
        )
    reader.check_complete()
    counters, mine = reader.counters, backend.counters()
    backend.check_fits(counters)
    if counters.get("base", mine["base"]) != mine["base"]:
        raise ConfigError(
            f"the base optimizer must be {counters['base']} as in {reader.path}, got "
            f"{mine['base']}; make the optimizer as it was."
        )
    if settings and "groups" in counters:
        _settings(mine["groups"], counters["groups"])
    return lacking


def _frozen(module: nn.Module) -> set[str]:
    return {name_in(module, n) for n, p in module.named_parameters() if not p.requires_grad}


Groups = Sequence[dict[str, Any]]


def _settings(own: Groups, saved: Groups) -> list[dict[str, Any] | None]:
    """For each group the saved settings of its layers; None where no layer was saved."""
    own_names, saved_names = ({n for g in groups for n in g["layers"]} for groups in (own, saved))
    settings: list[dict[str, Any] | None] = []
    for number, group in enumerate(own):
        names = saved_names.intersection(group["layers"])
        same = [g["settings"] for g in saved if names == own_names.intersection(g["layers"])]
        if names and not same:
            raise ConfigError(
                f"param groups must hold the same layers as in the checkpoint, got group {number} "
                f"with {sorted(names)[0]} and {len(names) - 1} others, which were not one group; "
                f"make the groups as they were."
            )
        settings.append(same[0] if names else None)
    return settings
