"""What people and machines read: progress and remarks on stderr, results on stdout."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nucleus.metrics.headlines import HEADLINES

__all__ = ["note", "print_facts", "print_json", "print_scores", "print_table", "warn"]


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
    """A table on stdout; to a pipe, lines of tab-separated values under a line of names."""
    console = Console(highlight=False)
    if not sys.stdout.isatty():
        for row in [columns, *rows]:
            click.echo("\t".join(str(cell) for cell in row))
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)


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
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for what, value in rows.items():
        table.add_row(f"[bold]{escape(what)}[/bold]", Text(str(value), no_wrap=True))
    widest = max(len(what) for what in (*columns, *rows)) + max(len(str(value)) for value in (*columns, *rows.values()))
    Console(highlight=False, width=widest + 4).print(table, soft_wrap=True)
