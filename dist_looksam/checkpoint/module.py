"""The parts of a module that are in no slot: buffers, whole frozen parameters, extra state."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..backends.backend import Backend
from ..backends.names import name_in
from ..optim.replay import running_statistics

_EXTRA = "_extra_state"  # torch's name for the result of a module's get_extra_state


def unlayered(backend: Backend) -> dict[str, tuple[Tensor, bool]]:
    """Persistent buffers and the parameters in no piece, whole on every rank.

    Returns name -> (tensor, whether its values differ between ranks, as running statistics do).
    """
    module, pieces = backend.module, {p.name for p in backend.pieces()}
    statistics = {id(b) for b in running_statistics(module)}
    persistent = set(module.state_dict().keys())
    named: list[tuple[str, Tensor]] = [(n, b) for n, b in module.named_buffers() if n in persistent]
    named += module.named_parameters()
    tensors = {name_in(module, n): (t.detach(), id(t) in statistics) for n, t in named}
    return {name: pair for name, pair in tensors.items() if name not in pieces}


def aliases(module: nn.Module) -> dict[str, str]:
    """Other names of tied parameters -> the name in the checkpoint."""
    names: dict[int, str] = {}
    aliases = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        name = name_in(module, name)
        first = names.setdefault(id(tensor), name)
        if first != name and isinstance(tensor, Tensor):
            aliases[name] = first
    return aliases


def _with_extra_state(module: nn.Module) -> dict[str, nn.Module]:
    """Modules with extra state, by its name in a state_dict."""
    split = {n: n.rpartition(".") for n in module.state_dict()}
    return {
        name_in(module, n): module.get_submodule(path)
        for n, (path, _, last) in split.items()
        if last == _EXTRA
    }


def extra_states(module: nn.Module) -> dict[str, Any]:
    """The results of the modules' get_extra_state, by name."""
    return {name: part.get_extra_state() for name, part in _with_extra_state(module).items()}


def put_extra_states(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Call set_extra_state of the modules that still have such state."""
    for name, part in _with_extra_state(module).items():
        if name in values:
            part.set_extra_state(values[name])
