"""The parts of a network whose weights are gathered together, for their own forward and backward.

A *unit* is a module that FSDP2 gathers before its forward and its backward, and frees after them.
"""

from collections.abc import Iterator

from torch import Tensor, nn


def units(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network: what its outermost ModuleLists and Sequentials hold.

    For a ViT its blocks. A part that shares a parameter with the rest of the network is none: its
    parameters must be gathered with those of the rest.
    """
    return [m for m in _listed(module) if _parameters(m) and not _shares(m, module)]


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(
            child, nn.ModuleList | nn.Sequential
        ):
            yield child
        else:
            yield from _listed(child)


def _parameters(module: nn.Module) -> set[Tensor]:
    return set(module.parameters())


def _shares(part: nn.Module, whole: nn.Module) -> bool:
    inside = set(part.modules())
    rest = {p for m in whole.modules() if m not in inside for p in m.parameters(recurse=False)}
    return not rest.isdisjoint(_parameters(part))
