"""What of a module is no layer, and so in no slot: buffers, frozen parameters, extra state."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..backends.backend import Backend
from ..backends.names import name_in
from ..optim.replay import running_statistics

_EXTRA = "_extra_state"  # torch's name for what a module's get_extra_state returns


def unlayered(backend: Backend) -> dict[str, tuple[Tensor, bool]]:
    """Name -> (tensor, whether each rank has its own), whole on every rank.

    Persistent buffers, of which each rank's running statistics are its own, and parameters that no
    piece holds.
    """
    module, pieces = backend.module, {p.name for p in backend.pieces()}
    own = {id(b) for b in running_statistics(module)}
    kept = set(module.state_dict().keys())
    named: list[tuple[str, Tensor]] = [(n, b) for n, b in module.named_buffers() if n in kept]
    named += module.named_parameters()
    found = {name_in(module, n): (t.detach(), id(t) in own) for n, t in named}
    return {name: pair for name, pair in found.items() if name not in pieces}


def aliases(module: nn.Module) -> dict[str, str]:
    """Other names of tied parameters, each with the one that a checkpoint has."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        name = name_in(module, name)
        known = first.setdefault(id(tensor), name)
        if known != name and isinstance(tensor, Tensor):
            found[name] = known
    return found


def _with_extra_state(module: nn.Module) -> dict[str, nn.Module]:
    """Modules that have state besides parameters and buffers, by its name in a state_dict."""
    kept = {n for n in module.state_dict() if n.rpartition(".")[2] == _EXTRA}
    parts = {n: module.get_submodule(n.rpartition(".")[0]) for n in kept}
    return {name_in(module, n): part for n, part in parts.items()}


def extra_states(module: nn.Module) -> dict[str, Any]:
    """What the modules' get_extra_state return."""
    return {name: part.get_extra_state() for name, part in _with_extra_state(module).items()}


def put_extra_states(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Give them back to the modules that still have such state."""
    for name, part in _with_extra_state(module).items():
        if name in values:
            part.set_extra_state(values[name])
