"""Weights & Biases: the configuration, each epoch's metrics and predictions, by the first worker alone.

Each row of a run's history has its own step, which follows from its epoch, so that a row is there once however often
the run is broken off, on whichever machine it goes on, and in whatever order its files are sent:

    step 1            predictions before training, `epoch` -1
    step 2 e + 2      the metrics of epoch e
    step 2 e + 3      predictions after it, also with `epoch` e
    step 2 e + 4      `best/...`, the predictions of the best weights, after the last epoch
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from nucleus.config.recipe import TrackingOptions
from nucleus.errors import UsageError
from nucleus.tracking.offline_runs import kept_files, logged_steps, offline_files, wait_until_written
from nucleus.tracking.wandb_runs import open_run
from nucleus.training.predictions import PredictedImage

__all__ = ["NoTracker", "Tracker", "WandbTracker", "check_tracking", "make_tracker", "tracking_mode"]

_MODES = ("online", "offline", "disabled")
_ROWS = 4
"""Steps in W&B of one epoch: metrics, pictures from before training, pictures after the epoch, of the best weights."""


class Tracker(Protocol):
    """What a worker tells about its run.

    Attributes:
        run_path: The run in W&B.
    """

    run_path: str | None

    @property
    def offline_files(self) -> list[Path]:
        """What `wandb sync` sends later, one file for each time that the run was begun here."""

    @property
    def kept_files(self) -> dict[str, Path]:
        """All that `wandb sync` needs, by the name below `runs/<run>/wandb/` under which the bucket keeps it."""

    def log(self, metrics: dict[str, float]) -> None:
        """Metrics of an epoch; `epoch` is among them."""

    def predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> None:
        """What the network makes of some images after so many epochs; None: with the best weights, at the end."""

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is over."""

    def abort(self) -> None:
        """The run has failed."""


class NoTracker:
    """Tracks nothing."""

    run_path: str | None = None
    offline_files: ClassVar[list[Path]] = []
    kept_files: ClassVar[dict[str, Path]] = {}

    def log(self, metrics: dict[str, float]) -> None:
        """Do nothing."""

    def predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> None:
        """Do nothing."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Do nothing."""

    def abort(self) -> None:
        """Do nothing."""


class WandbTracker:
    """One W&B run, continued under the same id when a run is resumed."""

    def __init__(
        self,
        run: str,
        options: TrackingOptions,
        mode: str,
        folder: Path,
        config: dict[str, Any],
        group: str | None = None,
        commit: str | None = None,
    ) -> None:
        self._logged = logged_steps(folder, run) if mode == "offline" else set()
        self._run = open_run(run, options, mode, folder, config=config, group=group, commit=commit)
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")
        self._next: int = max([self._run.step, *(step + 1 for step in self._logged)])
        self._waiting: dict[int, dict[str, Any]] = {}
        self._epoch = -1
        self._values: dict[str, float] = {}
        entity = f"{self._run.entity}/" if self._run.entity else ""
        self._offline = folder if mode == "offline" else None
        self.run_path: str | None = f"{entity}{self._run.project}/{self._run.id}"

    @property
    def offline_files(self) -> list[Path]:
        """What was not sent, by this process and those before it; nothing online."""
        return offline_files(self._offline, self._run.id) if self._offline else []

    @property
    def kept_files(self) -> dict[str, Path]:
        """What was not sent, with all that goes with it; nothing online."""
        return kept_files(self._offline, self._run.id) if self._offline else {}

    def log(self, metrics: dict[str, float]) -> None:
        """Log one epoch, unless it was logged before the run was broken off after its last checkpoint."""
        self._epoch = int(metrics["epoch"])
        self._values |= metrics
        self._row(_ROWS * self._epoch, dict(metrics))
        self._log_waiting()

    def predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> None:
        """Log pictures `predictions/<name>`, or `best/<name>`; after the metrics of the epoch that is on, and once.

        Those from before training have the epoch -1.
        """
        from nucleus.tracking.overlays import overlay_image  # noqa: PLC0415

        if epochs_done is None:
            step, epoch, title = _ROWS * self._epoch + 3, self._epoch, "best"
        elif epochs_done == 0:  # told with the first validation
            step, epoch, title = _ROWS * (self._epoch + 1) + 1, -1, "predictions"
        else:
            step, epoch, title = _ROWS * (epochs_done - 1) + 2, epochs_done - 1, "predictions"
        if self._free(step):
            row = {f"{title}/{image.sample.name}": overlay_image(image) for image in images}
            self._waiting[step] = {"epoch": epoch, **row}
        self._log_waiting()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary and close the run.

        With the last value of each metric, also of those that an earlier file has: to send a file of an offline run
        replaces the summary that was sent before.
        """
        self._log_waiting()
        self._run.summary.update({**self._values, **summary})
        self._close(0)

    def abort(self) -> None:
        """Close the run as failed."""
        self._close(1)

    def _close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)
        if self._offline:
            wait_until_written(self._offline, self._run.id)

    def _free(self, step: int) -> bool:
        """Whether a row can still be logged: W&B takes them in order only."""
        return step >= self._next

    def _log_waiting(self) -> None:
        """Log the pictures of epochs whose metrics are logged."""
        for step in sorted(step for step in self._waiting if step < _ROWS * (self._epoch + 1)):
            self._row(step, self._waiting.pop(step))

    def _row(self, step: int, row: dict[str, Any]) -> None:
        if self._free(step):
            self._next = step + 1
            self._run.log(row, step=step, commit=True)


def tracking_mode(options: TrackingOptions) -> str:
    """The mode that is in force: WANDB_MODE, else the recipe's. Raises `UsageError` for an unknown one."""
    mode = os.environ.get("WANDB_MODE") or options.wandb
    if mode not in _MODES:
        raise UsageError(
            f"Expected WANDB_MODE to be one of {', '.join(_MODES)}; found {mode!r}. Run: export WANDB_MODE=offline"
        )
    return mode


def check_tracking(mode: str) -> None:
    """Raise `UsageError` if `online` has no key to work with."""
    if mode != "online":
        return
    import wandb  # noqa: PLC0415

    if not wandb.api.api_key:
        raise UsageError(
            "Expected a W&B key for tracking.wandb = 'online'; found none. Run: wandb login, set WANDB_API_KEY, or "
            "choose WANDB_MODE=offline."
        )


def make_tracker(
    run: str,
    options: TrackingOptions,
    mode: str,
    folder: Path,
    config: dict[str, Any],
    group: str | None = None,
    commit: str | None = None,
) -> Tracker:
    """The tracker for a mode; `commit` is that of this package's code."""
    if mode == "disabled":
        return NoTracker()
    return WandbTracker(run, options, mode, folder, config, group, commit)
