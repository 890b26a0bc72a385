"""How a run is opened in W&B, the first time or again: nothing but what is ours to tell is told."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions, TrackingOptions
from nucleus.data.images import RgbImage
from nucleus.data.normalization import histogram_of, normalization_table
from nucleus.errors import UsageError
from nucleus.lazy import wandb
from nucleus.pictures import resize_to_side
from nucleus.tracking.offline_runs import kept_files, logged_steps, offline_files, wait_until_written
from nucleus.training.validation import PredictedImage

__all__ = [
    "CLASSES",
    "LARGEST_SIDE",
    "NoTracker",
    "Tracker",
    "WandbTracker",
    "check_tracking",
    "class_mask",
    "make_tracker",
    "open_run",
    "overlay_image",
    "shown_image",
    "staged_in",
    "tracking_mode",
]


_DATA_DIR = "WANDB_DATA_DIR"


def open_run(
    run: str,
    options: TrackingOptions,
    mode: str,
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    group: str | None = None,
    commit: str | None = None,
    system: bool = True,
) -> Any:
    """Begin a run in W&B, or go on with it under the same id; return the `wandb.Run`.

    W&B learns packages and hardware, and of this process the program; never its arguments (Ray's hold a password), the
    environment, the code, or a clone that happens to be the current directory.

    Args:
        run: Its name and id.
        options: Project and entity.
        mode: `online` or `offline`.
        folder: W&B's files go to its folder `wandb`.
        config: What it is run with; None leaves that as it is.
        group: What it belongs to, such as a sweep.
        commit: Of this package's code.
        system: Whether the machine's load is recorded.
    """

    folder.mkdir(parents=True, exist_ok=True)
    with _without_arguments():
        return wandb.init(
            project=options.project,
            entity=options.entity,
            id=run,
            name=run,
            group=group,
            resume="allow",
            job_type="train",
            mode=cast(Literal["online", "offline"], mode),
            dir=str(folder),
            config=config,
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_code=True,
                disable_git=True,  # of the current directory, whose remote's address may hold a token
                git_commit=commit,
                x_disable_stats=not system,
            ),
        )


@contextmanager
def staged_in(folder: Path) -> Iterator[None]:
    """Let W&B keep copies of what artifacts hold in a folder, where an offline run needs them until it is sent."""
    before = os.environ.get(_DATA_DIR)
    os.environ[_DATA_DIR] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DATA_DIR]
        else:
            os.environ[_DATA_DIR] = before


@contextmanager
def _without_arguments() -> Iterator[None]:
    """W&B records `sys.argv[1:]` and has no setting against it."""
    before = sys.argv
    sys.argv = before[:1]
    try:
        yield
    finally:
        sys.argv = before


LARGEST_SIDE = 512
"""Larger pictures are reduced to it, px."""
CLASSES = {0: "background", 1: "nucleus", 2: "contact"}
"""What a mask's pixels are. `contact` are those of a nucleus with a pixel of another one beside it (of eight): W&B
colours a mask by its classes, and without that line touching nuclei would look like one."""


def overlay_image(predicted: PredictedImage) -> Any:
    """A `wandb.Image` with the masks `truth` and `prediction`, whose pixels are `CLASSES`."""

    masks = {"truth": class_mask(predicted.sample.labels), "prediction": class_mask(predicted.labels)}
    return wandb.Image(
        shown_image(predicted.sample.image),
        mode="RGB",
        file_type="png",
        caption=f"{predicted.sample.name} ({predicted.sample.kind})",
        masks={name: {"mask_data": mask, "class_labels": CLASSES} for name, mask in masks.items()},
    )


def shown_image(image: RgbImage) -> RgbImage:
    """The image (H x W x 3) at most `LARGEST_SIDE` a side, its grey values stretched as a recipe does by default."""
    table = normalization_table(histogram_of(image), NormalizationOptions())
    return np.asarray(table[resize_to_side(image, LARGEST_SIDE)], np.uint8)


def class_mask(labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The `CLASSES` of labels (H x W, 0 background), at most `LARGEST_SIDE` a side.

    The labels are reduced first (to the nearest), then contacts are looked for: a line of two pixels would be lost.
    """
    small = resize_to_side(labels, LARGEST_SIDE, nearest=True)
    around = np.ones((3, 3), np.uint8)
    nucleus = small > 0
    values = small.astype(np.float64)  # exact, and known to OpenCV's morphology
    highest = cv2.dilate(values, around)
    lowest = cv2.erode(np.where(nucleus, values, np.inf), around)  # of the nuclei alone
    return np.asarray(nucleus + (nucleus & (highest != lowest)).astype(np.uint8), np.uint8)


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
