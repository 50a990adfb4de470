"""Rows found by where their files lie: one module of a folder is one row, bound to the name ROW."""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


def found(package: str, path: Iterable[str]) -> dict[str, Any]:
    """The ROWs of all modules of a package by their `name`, in the order of `place`, then of name.

    Args:
        package, path: its `__name__` and `__path__`.

    Raises:
        ValueError: two rows of one name.
    """
    names = [module.name for module in pkgutil.iter_modules(path)]
    rows = [importlib.import_module(f"{package}.{name}").ROW for name in names]
    made = {row.name: row for row in sorted(rows, key=lambda row: (row.place, row.name))}
    if len(made) < len(rows):
        taken = sorted(row.name for row in rows)
        raise ValueError(f"names must differ, got {', '.join(taken)} in {package}.")
    return made
