"""A table for the terminal, its columns aligned."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_WIDE = 10_000  # characters: no cell is ever wrapped or cut, so that pipes read whole lines


def text(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, indent: str = ""
) -> str:
    """The rows below `head`, which is left out where all its cells are empty.

    The first `left` columns are left-aligned, the others right-aligned.
    """
    table = Table(box=None, pad_edge=False, show_header=any(head), header_style="")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=_WIDE, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(indent + line.rstrip() for line in captured.get().splitlines())
