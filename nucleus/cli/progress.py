"""How far work is: a bar on a terminal, one line at its end elsewhere; all on stderr."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich import filesize
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

from nucleus.cli.output import note
from nucleus.progress import Advance

__all__ = [
    "TimeLeftColumn",
    "Unit",
    "bar_column",
    "clock",
    "draws_bars",
    "made_bar",
    "progress_console",
    "show_progress",
]

Unit = Literal["items", "bytes"]

_WIDEST_BAR = 40


def progress_console() -> Console:
    """The console for bars and the lines above them."""
    return Console(stderr=True, highlight=False)


def draws_bars(console: Console) -> bool:
    """Whether bars may be drawn: on a terminal that can move its cursor, and that is no CI service's.

    FORCE_COLOR lets rich take a pipe for a terminal; a bar has no place there.
    """
    return console.is_interactive and console.file.isatty() and os.environ.get("CI", "").lower() in {"", "0", "false"}


def clock(seconds: float) -> str:
    """Seconds as `0:05`, `12:34` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TimeLeftColumn(ProgressColumn):
    """How long a task will still take, and when it is done, how long it took.

    Args:
        left: The seconds that are left of a task, if they are known.
    """

    max_refresh = 0.5

    def __init__(self, left: Callable[[Task], float | None] = lambda task: task.time_remaining) -> None:
        self._left = left
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        """The text of the column."""
        if task.finished:
            return Text(f"in {clock(task.finished_time or 0)}")
        left = self._left(task)
        return Text("" if left is None else f"{clock(left)} left")


class _SpeedColumn(ProgressColumn):
    """Bytes a second, over all of a task: rich's own has none for what comes in one piece."""

    def render(self, task: Task) -> Text:
        """The text of the column."""
        return Text(_speed(task.completed, task.finished_time or task.elapsed or 0))


def _speed(done: float, seconds: float) -> str:
    return f"{filesize.decimal(round(done / seconds))}/s" if seconds else ""


def bar_column() -> BarColumn:
    """A bar that gives way where the terminal is narrow."""
    return BarColumn(bar_width=None, table_column=Column(max_width=_WIDEST_BAR))


def made_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """A bar; what is written to stderr meanwhile stands above it.

    Stdout is left alone: where Ray may write, `job.cluster` turns it to stderr, and would undo that in another order.
    """
    return Progress(*columns, console=console, redirect_stdout=False)


def _bar(unit: Unit, console: Console) -> Progress:
    title = TextColumn("[progress.description]{task.description}")
    whole = Column(no_wrap=True)  # else it would take two lines before the bar gives way
    items, sizes = MofNCompleteColumn(table_column=whole), DownloadColumn(table_column=whole)
    counts = [items] if unit == "items" else [sizes, _SpeedColumn(whole)]
    return made_bar(console, title, bar_column(), *counts, TimeLeftColumn())


@contextmanager
def show_progress(title: str, unit: Unit = "items", console: Console | None = None) -> Iterator[Advance]:
    """Give a function that shows progress: a bar on a terminal, one line at the end elsewhere.

    Of bytes nothing is shown before the first word of them, for what is wanted may be there already.

    Args:
        title: What is done.
        unit: Of what the function is told.
        console: That of a display around this one.
    """
    console = console or progress_console()
    if draws_bars(console):
        yield from _bar_to_end(title, unit, console)
    else:
        yield from _line_at_end(title, unit)


def _bar_to_end(title: str, unit: Unit, console: Console) -> Iterator[Advance]:
    """Give a function that moves a bar. One of items is over with the last, so that the next stands below it."""
    progress = _bar(unit, console)
    task: TaskID | None = None

    def begin(total: int | None = None) -> TaskID:
        progress.start()
        return progress.add_task(title, total=total)

    def tell(done: int, total: int) -> None:
        nonlocal task
        task = begin(total) if task is None else task
        progress.update(task, completed=done, total=total)
        if unit == "items" and done == total:
            progress.stop()

    try:
        task = begin() if unit == "items" else None
        yield tell
    finally:
        progress.stop()


def _line_at_end(title: str, unit: Unit) -> Iterator[Advance]:
    """Give a function that is told of progress; write one line when all is done, or else when the block ends."""
    started = time.monotonic()
    last: tuple[int, int] | None = None
    written = False

    def tell(done: int, total: int) -> None:
        nonlocal last, started, written
        if last is None and unit == "bytes":
            started = time.monotonic()
        last = (done, total)
        if unit == "items" and done == total and not written:  # bytes may begin anew
            written = True
            note(f"{title}: {done} of {total} in {time.monotonic() - started:.1f} s")

    yield tell
    seconds = time.monotonic() - started
    if unit == "items" and not written:
        done, total = last or (0, 0)
        note(f"{title}: {done} of {total} in {seconds:.1f} s")
    elif unit == "bytes" and last is not None:
        note(f"{title}: {filesize.decimal(last[0])} in {seconds:.1f} s ({_speed(last[0], seconds)})")
