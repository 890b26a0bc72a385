"""What people and machines read: progress and remarks on stderr, results on stdout."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from nucleus.metrics.headlines import HEADLINES
from nucleus.progress import Advance

__all__ = [
    "TrainingDisplay",
    "note",
    "print_json",
    "print_markdown",
    "print_scores",
    "print_table",
    "show_progress",
    "warn",
]

_COLUMNS = (
    TextColumn("[progress.description]{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def _console() -> Console:
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """A remark on stderr."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    """A warning on stderr."""
    click.secho(f"Warning: {text}", err=True, fg="yellow")


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=1, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """A table on stdout; to a pipe, lines of tab-separated values under a line of names."""
    console = Console(highlight=False)
    if not console.is_terminal:
        for row in [columns, *rows]:
            click.echo("\t".join(str(cell) for cell in row))
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)


def print_markdown(text: str) -> None:
    """Markdown, rendered on a terminal and as it stands elsewhere."""
    console = Console()
    if console.is_terminal:
        from rich.markdown import Markdown

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


@contextmanager
def show_progress(title: str) -> Iterator[Advance]:
    """Give a function that shows progress: a bar on a terminal, one line at the end elsewhere."""
    console = _console()
    started = time.monotonic()
    if console.is_terminal:
        with Progress(*_COLUMNS, console=console) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        return
    last = (0, 0)

    def remember(done: int, total: int) -> None:
        nonlocal last
        last = (done, total)

    yield remember
    note(f"{title}: {last[0]} of {last[1]} in {time.monotonic() - started:.1f} s")


class TrainingDisplay:
    """A `job.events.Listener` that shows a run: a bar for the epoch on a terminal, and one line an epoch."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: Any = None
        console = _console()
        if console.is_terminal:
            self._progress = Progress(*_COLUMNS, console=console)

    def __enter__(self) -> "TrainingDisplay":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def stage(self, text: str) -> None:
        """A line for a new stage."""
        self._line(text)

    def warn(self, text: str) -> None:
        """A line for a warning."""
        self._line(f"Warning: {text}")

    def steps(self, epoch: int, epochs: int, done: int, total: int) -> None:
        """Move the bar."""
        if self._progress is None:
            return
        text = f"epoch {epoch + 1}/{epochs}"
        if self._task is None:
            self._task = self._progress.add_task(text, total=total)
        self._progress.update(self._task, description=text, completed=done, total=total)

    def epoch(self, metrics: dict[str, float]) -> None:
        """A line for an epoch."""
        line = f"epoch {metrics['epoch'] + 1:.0f}: loss {metrics['loss']:.4f}"
        if "val_iou" in metrics:
            names = {"loss": "val loss", "map": "val mAP", "ap_50": "AP.5", "iou": "IoU", "dice": "Dice"}
            line += "".join(f", {text} {metrics[f'val_{key}']:.4f}" for key, text in names.items())
        self._line(f"{line} ({metrics['images_per_second']:.1f} images/s)")

    def _line(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False)
        else:
            note(text)
