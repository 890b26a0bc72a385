"""Output of the commands: notes and warnings on stderr; tables, Markdown and JSON on stdout."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nucleus.metrics.scores import SCORE_COLUMNS, Metrics, score_cells

__all__ = [
    "note",
    "print_facts",
    "print_json",
    "print_markdown",
    "print_scores",
    "print_table",
    "warn",
]

_ENDLESS = 1 << 16
"""Line width in characters, larger than any table."""


def note(text: str) -> None:
    """Print a line on stderr."""
    click.echo(text, file=sys.stderr)  # not `err=True`, which would bypass the stderr of a progress bar


def warn(text: str) -> None:
    """Print a warning on stderr."""
    click.secho(f"Warning: {text}", file=sys.stderr, fg="yellow")


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(value, indent=1, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """Print a table on stdout, below its title; in a pipe, tab-separated values below a line of column names."""
    if not sys.stdout.isatty():
        click.echo("\n".join("\t".join(map(str, row)) for row in [columns, *rows]))
        return
    console = Console(highlight=False)
    table = _table(columns, rows, 2)
    if title is not None:
        console.print(title, style="bold", markup=False)
    console.print(table if _width(table, console) <= console.width else _table(columns, rows, 1))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], gap: int) -> Table:
    """Return a table without lines, with `gap` spaces between columns; cells that do not fit are wrapped, not cut."""
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def _width(table: Table, console: Console) -> int:
    """Return the width of a table without wrapped cells, in characters."""
    return console.measure(table, options=console.options.update(width=_ENDLESS)).maximum


def print_markdown(text: str) -> None:
    """Print Markdown on stdout: rendered on a terminal, unchanged in a pipe."""
    console = Console()
    if console.is_terminal:
        from rich.markdown import Markdown  # noqa: PLC0415  needed on a terminal only

        console.print(Markdown(text))
    else:
        click.echo(text)


def print_scores(metrics: Metrics) -> None:
    """Print a table of the main scores by split and kind of image."""
    print_table(SCORE_COLUMNS, score_cells(metrics))


def print_facts(rows: Mapping[str, object], columns: tuple[str, str] = ("what", "value")) -> None:
    """Print a table of two columns on stdout, without wrapping lines, so that URIs and commands can be copied."""
    if not sys.stdout.isatty():
        print_table(columns, list(rows.items()))
        return
    table = _table(columns, list(rows.items()), 2)
    console = Console(highlight=False)
    console.width = _width(table, console)
    console.print(table, soft_wrap=True)
