"""Tables of rows: every module of a folder is one row, bound to the name ROW."""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


def load_rows(package: str, path: Iterable[str]) -> dict[str, Any]:
    """The ROWs of all modules of a package by their `name`, ordered by `place`, then by name.

    Args:
        package, path: its `__name__` and `__path__`.

    Raises:
        ValueError: two rows of one name.
    """
    modules = [module.name for module in pkgutil.iter_modules(path)]
    rows = [importlib.import_module(f"{package}.{name}").ROW for name in modules]
    table = {row.name: row for row in sorted(rows, key=lambda row: (row.place, row.name))}
    if len(table) < len(rows):
        names = sorted(row.name for row in rows)
        raise ValueError(f"names must differ, got {', '.join(names)} in {package}.")
    return table
