"""Tables that would be wider than the terminal: which columns go, and which go into a table of their own.

Rich would shorten names until nobody can tell them apart. To a pipe, every table is whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

__all__ = ["Column", "columns_that_fit", "print_columns", "print_in_blocks"]

_GAP = 1
"""Between columns, where `nucleus.cli.output.print_table` has little room."""


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, and a cell for each row."""

    title: str
    cells: Sequence[str]

    @property
    def width(self) -> int:
        """Characters that it takes."""
        return max(len(self.title), *map(len, self.cells), 0)


def columns_that_fit(columns: Sequence[Column], importance: Sequence[str]) -> list[Column]:
    """The columns that a terminal has room for, in their order; all of them where stdout is none.

    Args:
        columns: In the order in which they are shown.
        importance: Titles, that of the column which goes last first; the first stays whatever its width is.
    """
    room = _room()
    if room is None:
        return list(columns)
    kept: list[Column] = []
    by_title = {column.title: column for column in columns}
    for title in importance:
        if not kept or _width([*kept, by_title[title]]) <= room:
            kept.append(by_title[title])
    return [column for column in columns if column in kept]


def print_columns(columns: Sequence[Column], *, title: str | None = None) -> None:
    """A table as `nucleus.cli.output.print_table` prints it."""
    from nucleus.cli.output import print_table

    rows = list(zip(*(column.cells for column in columns), strict=True))
    print_table([column.title for column in columns], rows, title=title)


def print_in_blocks(fixed: Sequence[Column], groups: Sequence[Sequence[Column]], *, title: str | None = None) -> None:
    """A table, or several below each other where a terminal has no room for all columns side by side.

    Args:
        fixed: Stand in each table.
        groups: Columns that stay together; the first group stands in each table too.
        title: Of the first table.
    """
    room = _room()
    head = [*fixed, *groups[0]]
    block = list(head)
    for group in groups[1:]:
        if room is not None and len(block) > len(head) and _width([*block, *group]) > room:
            print_columns(block, title=title)
            block, title = list(head), None
        block += group
    print_columns(block, title=title)


def _width(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def _room() -> int | None:
    """Characters in a line of the terminal that stdout is; None if it is none."""
    console = Console()
    return console.width if console.is_terminal else None
