"""Tables for the terminal, all in one style. rich is imported at the first table, not with the module."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

WIDTH = 120  # columns where there is no terminal to ask


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: Collection[int] = (), title: str | None = None
) -> Table:
    """A table under a header line.

    Args:
        numeric: columns (counted from 0) that are right-aligned.
        title: bold, above the table.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=title and escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for index, name in enumerate(columns):
        made.add_column(escape(name), justify="right" if index in numeric else "left", no_wrap=index in numeric)
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def as_text(*parts: RenderableType, width: int = WIDTH) -> str:
    """What rich would print without a terminal: plain text without trailing blanks."""
    from rich.console import Console

    out = StringIO()
    console = Console(file=out, width=width, highlight=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
