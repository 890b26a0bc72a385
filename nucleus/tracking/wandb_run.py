"""A training run in W&B: each epoch's metrics and predictions once, however often the run is interrupted.

Every row has a step of its own, `4 * epoch` for the metrics of an epoch and the next three for its pictures, so a row
that is logged again has the step that it had. Online, W&B answers which step comes next. Offline, each attempt writes a
folder `wandb/offline-run-<time>-<run>/` that `wandb sync` uploads later, and we keep a ledger of our own in it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from nucleus.config.recipe import NormalizationOptions, TrackingOptions
from nucleus.data.images import RgbImage
from nucleus.data.normalization import histogram_of, normalization_table
from nucleus.errors import UsageError
from nucleus.lazy import wandb
from nucleus.pictures import resize_to_side
from nucleus.predict.evaluation import PredictedImage
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import write_atomic

__all__ = [
    "CLASSES",
    "LARGEST_SIDE",
    "WandbRun",
    "WorstImage",
    "check_tracking",
    "class_mask",
    "is_noted",
    "keep_files",
    "kept_files",
    "offline_files",
    "overlay_image",
    "shown_image",
    "tracking_mode",
]

_MODES = ("online", "offline", "disabled")


def tracking_mode(options: TrackingOptions) -> str:
    """Return the mode in force: that of WANDB_MODE, else the recipe's. Raise `UsageError` for an unknown one."""
    mode = os.environ.get("WANDB_MODE") or options.wandb
    if mode not in _MODES:
        raise UsageError(
            f"Expected WANDB_MODE to be one of {', '.join(_MODES)}; found {mode!r}. Run: export WANDB_MODE=offline"
        )
    return mode


def check_tracking(mode: str) -> None:
    """Raise `UsageError` if the mode is `online` and W&B has no API key."""
    if mode != "online":
        return

    if not wandb.api.api_key:
        raise UsageError(
            "Expected a W&B key for tracking.wandb = 'online'; found none. Run: wandb login, set WANDB_API_KEY, or "
            "choose WANDB_MODE=offline."
        )


_LEDGER = "nucleus.json"
"""Name of the ledger in the folder of an offline run."""


class _Ledger(BaseModel):
    """What one attempt of an offline run has logged.

    It is written after W&B was given the row. If the process is killed between the two, the row is logged again by the
    next attempt, at the same step: W&B then has the same numbers twice at one epoch, and nothing is missing.

    W&B's own process buffers rows for up to 15 s, and dies with ours. So the ledger says when a row was given to W&B,
    and unless the attempt was closed, a row counts as logged only if W&B has written its file since then.

    Attributes:
        steps: Step of each row, and when it was given to W&B, in seconds since 1970.
        closed: Whether the attempt was closed, with everything written.
        version: Number of the model version that was noted.
        aliases: Aliases with which it was noted.
    """

    steps: dict[int, float] = {}
    closed: bool = False
    version: int | None = None
    aliases: list[str] = []


def _read_ledger(folder: Path) -> _Ledger:
    """Return the ledger of an attempt; an empty one if it was killed before its first row."""
    path = folder / _LEDGER
    return _Ledger.model_validate_json(path.read_bytes()) if path.exists() else _Ledger()


def offline_files(folder: Path, run: str) -> list[Path]:
    """Return the files that `wandb.init(dir=folder, id=run)` wrote offline, oldest first: one per attempt."""
    return sorted(folder.glob(f"wandb/offline-run-*/run-{run}.wandb"))


def kept_files(folder: Path, run: str) -> dict[str, Path]:
    """Return all files that `wandb sync` needs of an offline run, by name (`offline-run-.../...`)."""
    return {
        f"{main.parent.name}/{path.relative_to(main.parent).as_posix()}": path
        for main in offline_files(folder, run)
        for path in sorted(main.parent.rglob("*"))
        if path.is_file() and path.relative_to(main.parent).parts[0] not in {"logs", _LEDGER}
    }


def keep_files(folder: Bucket, files: Mapping[str, Path]) -> None:
    """Upload what `kept_files` returns into a folder of the run in the project's bucket."""
    for name, path in files.items():
        folder.put(name, path)


def is_noted(folder: Path, run: str, version: int, aliases: Sequence[str]) -> bool:
    """Return whether an offline run has noted a model version with all these aliases."""
    ledgers = (_read_ledger(path.parent) for path in offline_files(folder, run))
    return any(ledger.version == version and {*aliases} <= {*ledger.aliases} for ledger in ledgers)


def _logged_steps(folder: Path, run: str) -> set[int]:
    """Return the steps of the rows that the files of an offline run hold."""
    logged: set[int] = set()
    for path in offline_files(folder, run):
        ledger, written = _read_ledger(path.parent), path.stat().st_mtime
        logged |= {step for step, given in ledger.steps.items() if ledger.closed or given <= written}
    return logged


@dataclass(frozen=True)
class WorstImage:
    """One of the worst test images.

    Attributes:
        name: Name in the dataset.
        caption: What is shown below the mistakes, such as its scores.
        image: File of the image.
        mistakes: File of the same image with the mistakes outlined on it, of the same size.
    """

    name: str
    caption: str
    image: Path
    mistakes: Path


_ROWS = 4
"""Steps per epoch: metrics, pictures from before training, pictures after the epoch, pictures by the best weights."""


class WandbRun:
    """A run in W&B, begun now or continued under the same id.

    W&B gets the names of packages and hardware, and of this process the program; never its arguments (Ray's hold a
    password), the environment, the code, or the git repository that happens to be the current directory.

    Args:
        run: Name and id of the run.
        options: Project and entity.
        mode: `online` or `offline`.
        folder: Folder in which W&B makes its folder `wandb`.
        config: Configuration of the run; None leaves it as it is.
        group: Group of the run, such as a sweep.
        commit: Commit of this package's code.
        system: Whether W&B records the load of the machine.

    Attributes:
        wandb_run: The `wandb.Run`.
        run_path: Path of the run in W&B, `[entity/]project/id`.
    """

    def __init__(
        self,
        run: str,
        options: TrackingOptions,
        mode: str,
        folder: Path,
        config: dict[str, Any] | None = None,
        group: str | None = None,
        commit: str | None = None,
        *,
        system: bool = True,
    ) -> None:
        logged = _logged_steps(folder, run) if mode == "offline" else set()
        folder.mkdir(parents=True, exist_ok=True)
        with _without_arguments():
            self.wandb_run: Any = wandb.init(
                project=options.project,
                entity=options.entity,
                id=run,
                name=run,
                group=group,
                resume="allow",
                reinit="create_new",  # beside a run that the user's own program has open
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
        self.wandb_run.define_metric("epoch")
        self.wandb_run.define_metric("*", step_metric="epoch")
        self._next: int = max([self.wandb_run.step, *(step + 1 for step in logged)])
        self._waiting: dict[int, dict[str, Any]] = {}
        self._epoch = -1
        self._values: dict[str, float] = {}
        self._offline = folder if mode == "offline" else None
        self._attempt = Path(self.wandb_run.dir).parent
        self._ledger = _Ledger()
        entity = f"{self.wandb_run.entity}/" if self.wandb_run.entity else ""
        self.run_path = f"{entity}{self.wandb_run.project}/{self.wandb_run.id}"

    @property
    def kept_files(self) -> dict[str, Path]:
        """All files that `wandb sync` needs of this attempt and those before it in the folder; none when online."""
        return kept_files(self._offline, self.wandb_run.id) if self._offline else {}

    def log(self, metrics: dict[str, float]) -> None:
        """Log the metrics of an epoch, `epoch` among them, unless an earlier attempt has logged them."""
        self._epoch = int(metrics["epoch"])
        self._values |= metrics
        self._row(_ROWS * self._epoch, dict(metrics))
        self._log_waiting()

    def predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> None:
        """Log predictions as `predictions/<name>`, or `best/<name>`, once, after the metrics of the current epoch.

        Args:
            epochs_done: Epochs after which they were made; 0 is before training, shown at the epoch -1, and None is
                with the best weights, at the end.
            images: Images with their true and predicted labels.
        """
        if epochs_done is None:
            step, epoch, title = _ROWS * self._epoch + 3, self._epoch, "best"
        elif epochs_done == 0:  # logged with those of the first validation
            step, epoch, title = _ROWS * (self._epoch + 1) + 1, -1, "predictions"
        else:
            step, epoch, title = _ROWS * (epochs_done - 1) + 2, epochs_done - 1, "predictions"
        if self._is_free(step):
            row = {f"{title}/{image.sample.name}": overlay_image(image) for image in images}
            self._waiting[step] = {"epoch": epoch, **row}
        self._log_waiting()

    def worst_images(self, epochs: int, images: Sequence[WorstImage]) -> None:
        """Log each of the worst test images with its mistakes as `worst/<name>`, after a run of so many epochs."""
        step = _ROWS * epochs
        if images and self._is_free(step):
            row = {f"worst/{image.name}": _pair(place, image) for place, image in enumerate(images, start=1)}
            self._row(step, {"epoch": epochs - 1, **row})

    def note_version(self, version: int, aliases: Sequence[str]) -> None:
        """Keep in the ledger of a closed offline run that it has a model version with these aliases."""
        self._ledger.version, self._ledger.aliases = version, list(aliases)
        self._write_ledger()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and close the run.

        The summary has the last value of each metric, also of epochs that an earlier attempt logged: `wandb sync` of an
        attempt replaces the summary of the one before.
        """
        self._log_waiting()
        self.wandb_run.summary.update({**self._values, **summary})
        self._close(0)

    def abort(self) -> None:
        """Close the run as failed."""
        self._close(1)

    def _close(self, exit_code: int) -> None:
        self.wandb_run.finish(exit_code=exit_code)
        if self._offline:
            _wait_until_written()
            self._ledger.closed = True
            self._write_ledger()

    def _is_free(self, step: int) -> bool:
        """Return whether a row can still be logged: W&B takes rows in ascending order only."""
        return step >= self._next

    def _log_waiting(self) -> None:
        """Log the pictures of epochs whose metrics are logged."""
        for step in sorted(step for step in self._waiting if step < _ROWS * (self._epoch + 1)):
            self._row(step, self._waiting.pop(step))

    def _row(self, step: int, row: dict[str, Any]) -> None:
        if not self._is_free(step):
            return
        self._next = step + 1
        self.wandb_run.log(row, step=step, commit=True)
        self._ledger.steps[step] = time.time()
        self._write_ledger()

    def _write_ledger(self) -> None:
        if self._offline:
            write_atomic(self._attempt / _LEDGER, self._ledger.model_dump_json())


@contextmanager
def _without_arguments() -> Iterator[None]:
    """Hide the arguments of this process: W&B records `sys.argv[1:]` and has no setting against it."""
    before = sys.argv
    sys.argv = before[:1]
    try:
        yield
    finally:
        sys.argv = before


def _wait_until_written() -> None:
    """Wait until the file of a finished offline run is complete.

    `finish` returns a moment before: its last message to W&B's own process is not answered. The end of that process is
    what can be waited for. It serves all runs of this process, so it is left alone while the user's program has one.
    """
    if wandb.run is None:
        with suppress(SystemExit):  # W&B exits with its process's status, as when that was killed
            wandb.teardown()


LARGEST_SIDE = 512
"""Larger pictures are reduced to it, px."""
CLASSES = {0: "background", 1: "nucleus", 2: "contact"}
"""Values of a mask's pixels. `contact` are those of a nucleus with a pixel of another one among their eight neighbours:
W&B colours a mask by its classes, and without that line touching nuclei would look like one."""


def overlay_image(predicted: PredictedImage) -> Any:
    """Return a `wandb.Image` with the masks `truth` and `prediction`, whose pixels are `CLASSES`."""
    masks = {"truth": class_mask(predicted.sample.labels), "prediction": class_mask(predicted.labels)}
    return wandb.Image(
        shown_image(predicted.sample.image),
        mode="RGB",
        file_type="png",
        caption=f"{predicted.sample.name} ({predicted.sample.kind})",
        masks={name: {"mask_data": mask, "class_labels": CLASSES} for name, mask in masks.items()},
    )


def _pair(place: int, image: WorstImage) -> list[Any]:
    """Return the `wandb.Image`s of an image and its mistakes; W&B shows a list of pictures of one size side by side."""
    captions = {image.image: f"{place}. {image.name}", image.mistakes: image.caption}
    return [wandb.Image(str(path), caption=caption) for path, caption in captions.items()]


def shown_image(image: RgbImage) -> RgbImage:
    """Return the image (H x W x 3), at most `LARGEST_SIDE` a side, grey values stretched by the default options."""
    table = normalization_table(histogram_of(image), NormalizationOptions())
    return np.asarray(table[resize_to_side(image, LARGEST_SIDE)], np.uint8)


def class_mask(labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return the `CLASSES` of labels (H x W, 0 background), at most `LARGEST_SIDE` a side.

    Labels are reduced (to the nearest) before contacts are looked for: a line of two pixels would be lost.
    """
    small = resize_to_side(labels.astype(np.int32), LARGEST_SIDE, nearest=True)
    around = np.ones((3, 3), np.uint8)
    nucleus = small > 0
    values = small.astype(np.float64)  # exact, and a type that OpenCV's morphology takes
    highest = cv2.dilate(values, around)
    lowest = cv2.erode(np.where(nucleus, values, np.inf), around)  # among nuclei alone
    return np.asarray(nucleus + (nucleus & (highest != lowest)).astype(np.uint8), np.uint8)
