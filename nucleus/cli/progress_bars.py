"""Progress on stderr: bars on a terminal, elsewhere one line at the end of the work; and the display of a run."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

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
    TaskProgressColumn,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

from nucleus.cli.output import note
from nucleus.metrics.scores import epoch_scores
from nucleus.progress import Advance
from nucleus.training.callbacks import Callback

__all__ = [
    "TimeLeftColumn",
    "TrainingDisplay",
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
"""Largest width of a bar, columns."""
_WIDE = 100
"""Smallest width of a terminal for lines with the speed, which the bar shows too, columns."""


def progress_console() -> Console:
    """Return a console on stderr for bars and the lines above them."""
    return Console(stderr=True, highlight=False)


def draws_bars(console: Console) -> bool:
    """Return whether bars can be drawn: on a terminal that can move its cursor and does not belong to a CI service.

    With FORCE_COLOR, rich takes a pipe for a terminal; bars are not drawn there.
    """
    return console.is_interactive and console.file.isatty() and os.environ.get("CI", "").lower() in {"", "0", "false"}


def clock(seconds: float) -> str:
    """Return seconds as `0:05`, `12:34` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TimeLeftColumn(ProgressColumn):
    """Column with the remaining time of a task or, once it is finished, its duration.

    Args:
        left: Function that returns the remaining seconds of a task, or None if they are unknown.
    """

    max_refresh = 0.5

    def __init__(self, left: Callable[[Task], float | None] = lambda task: task.time_remaining) -> None:
        self._left = left
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        if task.finished:
            return Text(f"in {clock(task.finished_time or 0)}")
        left = self._left(task)
        return Text("" if left is None else f"{clock(left)} left")


class _SpeedColumn(ProgressColumn):
    """Column with the mean bytes per second; rich's own column is empty if all bytes arrive at once."""

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        return Text(_speed(task.completed, task.finished_time or task.elapsed or 0))


def _speed(done: float, seconds: float) -> str:
    return f"{filesize.decimal(round(done / seconds))}/s" if seconds else ""


def bar_column() -> BarColumn:
    """Return a bar that shrinks on a narrow terminal."""
    return BarColumn(bar_width=None, table_column=Column(max_width=_WIDEST_BAR))


def made_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """Return a bar. Lines that are written to stderr while it is shown appear above it.

    Rich does not redirect stdout, because `job.cluster` redirects it while Ray may write to it, and the two would not
    be undone in reverse order.
    """
    return Progress(*columns, console=console, redirect_stdout=False)


def _bar(unit: Unit, console: Console) -> Progress:
    title = TextColumn("[progress.description]{task.description}")
    whole = Column(no_wrap=True)  # otherwise these would wrap before the bar shrinks
    items, sizes = MofNCompleteColumn(table_column=whole), DownloadColumn(table_column=whole)
    counts = [items] if unit == "items" else [sizes, _SpeedColumn(whole)]
    return made_bar(console, title, bar_column(), *counts, TimeLeftColumn())


@contextmanager
def show_progress(title: str, unit: Unit = "items", console: Console | None = None) -> Iterator[Advance]:
    """Yield a function `advance(done, total)` that shows progress: a bar on a terminal, elsewhere one line at the end.

    With the unit `bytes`, nothing is shown before the first call, because there may be nothing to transfer.

    Args:
        title: Title of the bar.
        unit: Unit of `done` and `total`.
        console: Console of an enclosing display; None for a new one.
    """
    console = console or progress_console()
    if draws_bars(console):
        yield from _bar_to_end(title, unit, console)
    else:
        yield from _line_at_end(title, unit)


def _bar_to_end(title: str, unit: Unit, console: Console) -> Iterator[Advance]:
    """Yield a function that moves a bar. A bar of items ends with the last item; the next bar appears below it."""
    progress = _bar(unit, console)
    task: TaskID | None = None

    def begin(total: int | None = None) -> TaskID:
        progress.start()
        return progress.add_task(title, total=total)

    def advance(done: int, total: int) -> None:
        nonlocal task
        task = begin(total) if task is None else task
        progress.update(task, completed=done, total=total)
        if unit == "items" and done == total:
            progress.stop()

    try:
        task = begin() if unit == "items" else None
        yield advance
    finally:
        progress.stop()


def _line_at_end(title: str, unit: Unit) -> Iterator[Advance]:
    """Yield a function that records progress; write one line with the last item, or at the end of the block."""
    started = time.monotonic()
    last: tuple[int, int] | None = None
    written = False

    def advance(done: int, total: int) -> None:
        nonlocal last, started, written
        if last is None and unit == "bytes":
            started = time.monotonic()
        last = (done, total)
        if unit == "items" and done == total and not written:  # bytes may start again from 0
            written = True
            note(f"{title}: {done} of {total} in {time.monotonic() - started:.1f} s")

    yield advance
    seconds = time.monotonic() - started
    if unit == "items" and not written:
        done, total = last or (0, 0)
        note(f"{title}: {done} of {total} in {seconds:.1f} s")
    elif unit == "bytes" and last is not None:
        note(f"{title}: {filesize.decimal(last[0])} in {seconds:.1f} s ({_speed(last[0], seconds)})")


class TrainingDisplay(Callback):
    """Display of a run: one line per stage and epoch and, on a terminal, one bar for the whole run."""

    def __init__(self) -> None:
        self._console = progress_console()
        self._pace = _Pace()
        self._iou: float | None = None
        self._task: TaskID | None = None
        self._bar: Progress | None = None
        if draws_bars(self._console):
            self._bar = made_bar(
                self._console,
                TextColumn("{task.description}"),
                bar_column(),
                TaskProgressColumn(),
                TextColumn("{task.fields[scores]}"),
                TextColumn("{task.fields[speed]}"),
                TimeLeftColumn(self._seconds_left),
            )

    def __enter__(self) -> "TrainingDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_stage(self, text: str) -> None:
        self._line(text)

    def on_warning(self, text: str) -> None:
        self._line(f"Warning: {text}")

    def progress(self, title: str, unit: Unit = "items") -> AbstractContextManager[Advance]:
        return show_progress(title, unit, self._console)

    def on_steps_end(
        self, epoch: int, epochs: int, done: int, total: int, loss: float, images_per_second: float
    ) -> None:
        taken = (epoch - 1) * total + done
        self._pace.record(taken, epochs * total, epochs)
        if self._bar is None:
            return
        shown: dict[str, Any] = {
            "description": f"epoch {epoch}/{epochs}",
            "completed": taken,
            "total": epochs * total,
            "scores": self._scores(loss),
            "speed": f"{images_per_second:.0f} images/s",
        }
        if self._task is None:
            self._task = self._bar.add_task(**shown)
        else:
            self._bar.update(self._task, **shown)

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        self._iou = metrics.get("val_iou", self._iou)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, scores=self._scores(metrics["loss"]))
        of = f"/{self._pace.epochs}" if self._pace.epochs else ""
        parts = [f"epoch {metrics['epoch']:.0f}{of}: {epoch_scores(metrics)}"]
        if self._bar is None or self._console.width >= _WIDE:
            parts.append(f"{metrics['images_per_second']:.1f} images/s")
        left = self._pace.seconds_left()
        if self._bar is None and left is not None:
            parts.append(f"{clock(left)} left")
        self._line(", ".join(parts))

    def _scores(self, loss: float) -> str:
        """Return the scores beside the bar: the loss, and the IoU of the last validation."""
        return f"loss {loss:.4f}" + ("" if self._iou is None else f" IoU {self._iou:.4f}")

    def _seconds_left(self, _: Task) -> float | None:
        return self._pace.seconds_left()

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            note(text)


class _Pace:
    """Estimate of the remaining time of a run from the steps after the first one, including validation.

    The first step, in which TensorFlow compiles, is excluded. A run that resumes gets a new estimate.
    """

    def __init__(self) -> None:
        self.epochs = 0
        self._first: tuple[float, int] | None = None
        self._done = self._total = 0

    def record(self, done: int, total: int, epochs: int) -> None:
        """Record that `done` of the run's `total` steps, in `epochs` epochs, are done now."""
        if self._first is None or done <= self._done:
            self._first = (time.monotonic(), done)
        self.epochs, self._done, self._total = epochs, done, total

    def seconds_left(self) -> float | None:
        """Return the seconds to the end of the last epoch; None while they are unknown."""
        if self._first is None or self._done <= self._first[1]:
            return None
        moment, done = self._first
        return (time.monotonic() - moment) / (self._done - done) * (self._total - self._done)
