"""What people and machines read: progress and remarks on stderr, results on stdout."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nucleus.metrics.scores import HEADLINES

__all__ = [
    "Column",
    "columns_that_fit",
    "note",
    "print_columns",
    "print_facts",
    "print_in_blocks",
    "print_json",
    "print_markdown",
    "print_scores",
    "print_table",
    "warn",
]


_ROOM = 1 << 16


def note(text: str) -> None:
    """A remark on stderr."""
    click.echo(text, file=sys.stderr)  # which a bar has replaced meanwhile; `err=True` would find the one before


def warn(text: str) -> None:
    """A warning on stderr."""
    click.secho(f"Warning: {text}", file=sys.stderr, fg="yellow")


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=1, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """A table on stdout, under its title; to a pipe, lines of tab-separated values under a line of names."""
    if not sys.stdout.isatty():
        for row in [columns, *rows]:
            click.echo("\t".join(str(cell) for cell in row))
        return
    console = Console(highlight=False)
    table = _table(columns, rows, 2)
    if title is not None:
        console.print(title, style="bold", markup=False)
    console.print(table if _width(table, console) <= console.width else _table(columns, rows, 1))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], gap: int) -> Table:
    """A table without lines, so many blanks between its columns; what has no room is folded, not cut off."""
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def _width(table: Table, console: Console) -> int:
    """How many columns a table takes where there is room."""
    return console.measure(table, options=console.options.update(width=_ROOM)).maximum


def print_markdown(text: str) -> None:
    """Markdown, rendered on a terminal and as it stands elsewhere."""
    console = Console()
    if console.is_terminal:
        from rich.markdown import Markdown  # noqa: PLC0415  only on a terminal

        console.print(Markdown(text))
    else:
        click.echo(text)


def print_scores(metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """The headline metrics by split and kind of image."""
    print_table(
        ("split", "kind", "images", *(title for _, title in HEADLINES)),
        [
            (split, kind, f"{scores['images']:.0f}", *(f"{scores[name]:.4f}" for name, _ in HEADLINES))
            for split, kinds in metrics.items()
            for kind, scores in kinds.items()
        ],
    )


def print_facts(rows: Mapping[str, object], columns: tuple[str, str] = ("what", "value")) -> None:
    """A table of two columns on stdout; addresses and commands stay whole on a narrow terminal, to be copied."""
    if not sys.stdout.isatty():
        print_table(columns, list(rows.items()))
        return
    table = _table(columns, list(rows.items()), 2)
    console = Console(highlight=False)
    console.width = _width(table, console)
    console.print(table, soft_wrap=True)


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
        if not kept or _columns_width([*kept, by_title[title]]) <= room:
            kept.append(by_title[title])
    return [column for column in columns if column in kept]


def print_columns(columns: Sequence[Column], *, title: str | None = None) -> None:
    """A table as `nucleus.cli.output.print_table` prints it."""

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
        if room is not None and len(block) > len(head) and _columns_width([*block, *group]) > room:
            print_columns(block, title=title)
            block, title = list(head), None
        block += group
    print_columns(block, title=title)


def _columns_width(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def _room() -> int | None:
    """Characters in a line of the terminal that stdout is; None if it is none."""
    console = Console()
    return console.width if console.is_terminal else None
