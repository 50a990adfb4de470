"""The units of a network: modules that FSDP2 gathers for their forward and backward, then frees."""

from collections.abc import Iterator

from torch import nn


def units(module: nn.Module) -> list[nn.Module]:
    """The entries of a network's outermost ModuleLists and Sequentials; for a ViT its blocks.

    An entry that shares a parameter with the rest of the network is no unit: its parameters must be
    gathered with those of the rest.
    """
    return [m for m in _listed(module) if [*m.parameters()] and not _shares(m, module)]


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(
            child, nn.ModuleList | nn.Sequential
        ):
            yield child
        else:
            yield from _listed(child)


def _shares(part: nn.Module, whole: nn.Module) -> bool:
    inside = set(part.modules())
    rest = {p for m in whole.modules() if m not in inside for p in m.parameters(recurse=False)}
    return not rest.isdisjoint(part.parameters())
