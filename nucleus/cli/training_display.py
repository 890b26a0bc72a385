"""A run as it is shown while it goes on."""

import time
from contextlib import AbstractContextManager
from typing import Any

from rich.progress import Progress, Task, TaskID, TaskProgressColumn, TextColumn

from nucleus.cli.output import note
from nucleus.cli.progress import (
    TimeLeftColumn,
    Unit,
    bar_column,
    clock,
    draws_bars,
    made_bar,
    progress_console,
    show_progress,
)
from nucleus.progress import Advance

__all__ = ["TrainingDisplay"]

_WIDE = 100
"""Columns of a terminal on which the line of an epoch has room for what the bar tells too."""
_SCORES = {"val_loss": "val loss", "val_map": "mAP", "val_iou": "IoU", "val_dice": "Dice"}


class TrainingDisplay:
    """A `job.events.Listener` that shows a run: one bar for the whole of it on a terminal, and one line an epoch."""

    def __init__(self) -> None:
        self._console = progress_console()
        self._pace = _Pace()
        self._iou: float | None = None
        self._task: TaskID | None = None
        self._progress: Progress | None = None
        if draws_bars(self._console):
            self._progress = made_bar(
                self._console,
                TextColumn("{task.description}"),
                bar_column(),
                TaskProgressColumn(),
                TextColumn("{task.fields[scores]}"),
                TextColumn("{task.fields[speed]}"),
                TimeLeftColumn(self._seconds_left),
            )

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

    def watch(self, title: str, unit: Unit = "items") -> AbstractContextManager[Advance]:
        """Show the progress of something besides training."""
        return show_progress(title, unit, self._console)

    def steps(self, epoch: int, epochs: int, done: int, total: int, loss: float, images_per_second: float) -> None:
        """Move the bar."""
        self._pace.note(epoch * total + done, epochs * total, epochs)
        if self._progress is None:
            return
        told: dict[str, Any] = {
            "description": f"epoch {epoch + 1}/{epochs}",
            "completed": epoch * total + done,
            "total": epochs * total,
            "scores": self._scores(loss),
            "speed": f"{images_per_second:.0f} images/s",
        }
        if self._task is None:
            self._task = self._progress.add_task(**told)
        else:
            self._progress.update(self._task, **told)

    def epoch(self, metrics: dict[str, float]) -> None:
        """A line for an epoch."""
        self._iou = metrics.get("val_iou", self._iou)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, scores=self._scores(metrics["loss"]))
        of = f"/{self._pace.epochs}" if self._pace.epochs else ""
        parts = [f"epoch {metrics['epoch'] + 1:.0f}{of}: loss {metrics['loss']:.4f}"]
        parts += [f"{title} {metrics[name]:.4f}" for name, title in _SCORES.items() if name in metrics]
        if self._progress is None or self._console.width >= _WIDE:
            parts.append(f"{metrics['images_per_second']:.1f} images/s")
        left = self._pace.seconds_left()
        if self._progress is None and left is not None:
            parts.append(f"{clock(left)} left")
        self._line(", ".join(parts))

    def _scores(self, loss: float) -> str:
        """What the bar says of the run: the loss, and the IoU of the last validation."""
        return f"loss {loss:.4f}" + ("" if self._iou is None else f" IoU {self._iou:.4f}")

    def _seconds_left(self, _: Task) -> float | None:
        return self._pace.seconds_left()

    def _line(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False)
        else:
            note(text)


class _Pace:
    """How long a run will still take, by the time that its steps have taken since the first, validation included.

    The first step, in which TensorFlow compiles, does not count. A run that goes on from a checkpoint begins anew.
    """

    def __init__(self) -> None:
        self.epochs = 0
        self._first: tuple[float, int] | None = None
        self._done = self._total = 0

    def note(self, done: int, total: int, epochs: int) -> None:
        """So many of the run's steps are done now."""
        if self._first is None or done <= self._done:
            self._first = (time.monotonic(), done)
        self.epochs, self._done, self._total = epochs, done, total

    def seconds_left(self) -> float | None:
        """Seconds to the end of the last epoch; None where nothing is known yet."""
        if self._first is None or self._done <= self._first[1]:
            return None
        moment, done = self._first
        return (time.monotonic() - moment) / (self._done - done) * (self._total - self._done)
