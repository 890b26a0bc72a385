"""A training run in W&B: metrics and predictions of each epoch are logged once, even if the run is interrupted.

Every row has a fixed step: `4 * (epoch - 1)` for the metrics of an epoch, and the next three for its pictures. A row
that is logged again therefore has the same step. In online mode, W&B reports the next step. In offline mode, each
attempt writes a folder `wandb/offline-run-<time>-<run>/`, which `wandb sync` uploads later; its file is read to find
the rows that it holds. The folder also holds our ledger.
"""

from __future__ import annotations

import shlex
import sys
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
from nucleus.data.normalization import normalize
from nucleus.lazy import wandb
from nucleus.pictures import resize_to_side
from nucleus.predict.evaluation import PredictedImage
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import write_atomic
from nucleus.tracking.failover import forget_unusable_address
from nucleus.tracking.offline_log import logged_steps

__all__ = [
    "CLASSES",
    "LARGEST_SIDE",
    "WandbRun",
    "WorstImage",
    "class_mask",
    "is_noted",
    "keep_files",
    "kept_files",
    "offline_files",
    "overlay_image",
    "shown_image",
    "sync_command",
]


LARGEST_SIDE = 512
"""Longest side of a picture, px; larger pictures are reduced."""
CLASSES = {0: "background", 1: "nucleus", 2: "contact"}
"""Values of a mask's pixels. `contact` is a pixel of a nucleus with another nucleus among its eight neighbours: W&B
colours a mask by its classes, so touching nuclei would look like one without this line."""

_LEDGER = "nucleus.json"
"""Name of the ledger in the folder of an offline run."""
_ROWS = 4
"""Steps per epoch: metrics, pictures from before training, pictures after the epoch, pictures by the best weights."""
_START_SECONDS, _UPLOAD_SECONDS = 30.0, 60.0
"""Longest waits for W&B's server: to accept a run, and to take what is left at its end."""
_ATTEMPTS = ("offline-run-", "run-")
"""Prefixes of the folders of attempts. One that was online is kept if the server may lack something of it."""
_FATAL = b"fatal error"
"""In W&B's log of an attempt: it has given up sending."""


class _Ledger(BaseModel):
    """What an attempt's own file does not say.

    Attributes:
        closed: Whether the attempt was closed; of an online one, whether W&B's server has all of it.
        version: Number of the model version that was logged; None if none was.
        aliases: Aliases of the logged version.
    """

    closed: bool = False
    version: int | None = None
    aliases: list[str] = []


def _read_ledger(folder: Path) -> _Ledger:
    """Return the ledger of an attempt; an empty one if the attempt was killed before its first row."""
    path = folder / _LEDGER
    return _Ledger.model_validate_json(path.read_bytes()) if path.exists() else _Ledger()


def offline_files(folder: Path, run: str) -> list[Path]:
    """Return the main files of a run that were not sent, one per attempt, oldest first.

    These are the attempts that were offline, and those that were online and broke off, or could not send everything.

    Args:
        folder: Argument `dir` of `wandb.init`.
        run: Id of the run.
    """
    found = {path for prefix in _ATTEMPTS for path in folder.glob(f"wandb/{prefix}*/run-{run}.wandb")}
    unsent = (
        path for path in found if path.parent.name.startswith(_ATTEMPTS[0]) or not _read_ledger(path.parent).closed
    )
    return sorted(unsent, key=lambda path: path.parent.name.removeprefix("offline-"))


def kept_files(folder: Path, run: str) -> dict[str, Path]:
    """Return all files of `offline_files` and beside them that `wandb sync` needs, by name (`offline-run-.../...`)."""
    return {
        f"{main.parent.name}/{path.relative_to(main.parent).as_posix()}": path
        for main in offline_files(folder, run)
        for path in sorted(main.parent.rglob("*"))
        if path.is_file() and path.relative_to(main.parent).parts[0] not in {"logs", _LEDGER}
    }


def sync_command(attempts: Sequence[Path]) -> str:
    """Return the command that sends attempts of a run to W&B's server.

    Args:
        attempts: Folders of attempts.
    """
    online = any(not path.name.startswith(_ATTEMPTS[0]) for path in attempts)  # W&B skips them unless told
    return shlex.join(["wandb", "sync", *(["--include-online"] if online else []), *map(str, attempts)])


def keep_files(folder: Bucket, files: Mapping[str, Path]) -> None:
    """Upload the files from `kept_files` to a folder of the run in the project's bucket."""
    for name, path in files.items():
        folder.put(name, path)


def is_noted(folder: Path, run: str, version: int, aliases: Sequence[str]) -> bool:
    """Return whether an offline run has logged a model version with all these aliases."""
    ledgers = (_read_ledger(path.parent) for path in offline_files(folder, run))
    return any(ledger.version == version and {*aliases} <= {*ledger.aliases} for ledger in ledgers)


@dataclass(frozen=True)
class WorstImage:
    """One of the worst test images.

    Attributes:
        name: Name in the dataset.
        caption: Text below the picture of the mistakes, such as scores.
        image: File of the image.
        mistakes: File of the same image, in the same size, with the mistakes outlined.
    """

    name: str
    caption: str
    image: Path
    mistakes: Path


class WandbRun:
    """A run in W&B: a new one, or one that continues under the same id.

    W&B receives the names of packages, of the hardware and of this process's program, but never the arguments of the
    process (those of Ray contain a password), the environment, the code, or the current directory's git repository.

    Args:
        run: Name and id of the run.
        options: Project and entity.
        mode: `online` or `offline`.
        folder: Folder in which W&B creates its folder `wandb`.
        config: Configuration of the run; None for no change.
        group: Group of the run, such as a sweep.
        commit: Commit of this package's code.
        first_epoch: Number in W&B of the run's first epoch, which is 1 everywhere else.
        system: Whether W&B records the machine's load.

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
        first_epoch: int = 1,
        system: bool = True,
    ) -> None:
        # What the files hold counts, not what W&B was given: its process keeps rows for up to 15 s, and dies with ours.
        earlier = offline_files(folder, run) if mode == "offline" else []
        logged = {step for path in earlier for step in logged_steps(path)}
        folder.mkdir(parents=True, exist_ok=True)
        if mode == "offline":
            forget_unusable_address()
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
                    disable_git=True,  # the address of a remote may contain a token
                    git_commit=commit,
                    x_disable_stats=not system,
                    init_timeout=_START_SECONDS,
                    finish_timeout=_UPLOAD_SECONDS if mode == "online" else 0.0,
                    finish_timeout_raises=True,
                ),
            )
        self.wandb_run.define_metric("epoch")
        self.wandb_run.define_metric("*", step_metric="epoch")
        self._next: int = max([self.wandb_run.step, *(step + 1 for step in logged)])
        self._waiting: dict[int, dict[str, Any]] = {}
        self._epoch = 0
        self._first_epoch = first_epoch
        self._values: dict[str, float] = {}
        self._folder = folder
        self._offline = mode == "offline"
        self._unsent = False
        self._attempt = Path(self.wandb_run.dir).parent
        self._ledger = _Ledger()
        entity = f"{self.wandb_run.entity}/" if self.wandb_run.entity else ""
        self.run_path = f"{entity}{self.wandb_run.project}/{self.wandb_run.id}"

    @property
    def kept_files(self) -> dict[str, Path]:
        """Files of this and earlier attempts in the folder that `wandb sync` needs; empty if the server has all."""
        return kept_files(self._folder, self.wandb_run.id) if self._offline or self._unsent else {}

    def log(self, metrics: dict[str, float]) -> None:
        """Log the metrics of an epoch, including `epoch`, unless an earlier attempt has logged them."""
        self._epoch = int(metrics["epoch"])
        row = self._counted(metrics)
        self._values |= row
        self._row(_ROWS * (self._epoch - 1), row)
        self._log_waiting()

    def predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> None:
        """Log predictions as `predictions/<name>`, or `best/<name>`, once, after the metrics of the current epoch.

        Args:
            epochs_done: Number of finished epochs; 0 is before training; None is at the end, with the best weights.
            images: Images with true and predicted labels.
        """
        if epochs_done is None:
            step, epoch, title = _ROWS * (self._epoch - 1) + 3, self._epoch, "best"
        elif epochs_done == 0:  # logged with those of the first validation
            step, epoch, title = _ROWS * self._epoch + 1, 0, "predictions"
        else:
            step, epoch, title = _ROWS * (epochs_done - 1) + 2, epochs_done, "predictions"
        if self._is_free(step):
            row = {f"{title}/{image.sample.name}": overlay_image(image) for image in images}
            self._waiting[step] = self._counted({"epoch": epoch, **row})
        self._log_waiting()

    def worst_images(self, epochs: int, images: Sequence[WorstImage]) -> None:
        """Log each of the worst test images with its mistakes as `worst/<name>`, after the run's last epoch.

        Args:
            epochs: Number of epochs of the run.
            images: The images, worst first.
        """
        step = _ROWS * epochs
        if images and self._is_free(step):
            row = {f"worst/{image.name}": _pair(place, image) for place, image in enumerate(images, start=1)}
            self._row(step, self._counted({"epoch": epochs, **row}))

    def note_version(self, version: int, aliases: Sequence[str]) -> None:
        """Record in the ledger of a closed offline run that a model version with these aliases was logged."""
        self._ledger.version, self._ledger.aliases = version, list(aliases)
        if self._offline:
            self._write_ledger()

    def finish(self, summary: Mapping[str, Any]) -> str | None:
        """Write the summary and close the run.

        The summary has the last value of each metric, also from epochs that an earlier attempt logged, because `wandb
        sync` of an attempt replaces the previous summary.

        Returns:
            Why W&B's server lacks a part of an online run; None if it has everything, and for an offline run.
        """
        self._log_waiting()
        self.wandb_run.summary.update({**self._values, **self._counted(summary)})
        return self._close(0)

    def abort(self) -> str | None:
        """Close the run as failed; return the same as `finish`."""
        return self._close(1)

    def _close(self, exit_code: int) -> str | None:
        problem = None
        try:
            self.wandb_run.finish(exit_code=exit_code)
        except TimeoutError:
            problem = f"it did not within {_UPLOAD_SECONDS:.0f} s"
        if self._offline:
            _wait_until_written()
        elif problem is None and _gave_up(self._attempt):
            problem = "it refused something"
        if problem is not None:
            self._unsent = True
            return f"Expected W&B's server to take all of the run {self.wandb_run.id}; {problem}."
        self._ledger.closed = True
        self._write_ledger()
        return None

    def _counted(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row whose `epoch`, if it has one, is counted from `first_epoch` instead of 1."""
        shifted = {"epoch": row["epoch"] - 1 + self._first_epoch} if "epoch" in row else {}
        return {**row, **shifted}

    def _is_free(self, step: int) -> bool:
        """Return whether a row can still be logged: W&B accepts only ascending steps."""
        return step >= self._next

    def _log_waiting(self) -> None:
        """Log the waiting pictures of epochs whose metrics have been logged."""
        for step in sorted(step for step in self._waiting if step < _ROWS * self._epoch):
            self._row(step, self._waiting.pop(step))

    def _row(self, step: int, row: dict[str, Any]) -> None:
        if not self._is_free(step):
            return
        self._next = step + 1
        self.wandb_run.log(row, step=step, commit=True)

    def _write_ledger(self) -> None:
        write_atomic(self._attempt / _LEDGER, self._ledger.model_dump_json())


def _gave_up(attempt: Path) -> bool:
    """Return whether W&B has given up sending, by its log: it raises no error then."""
    return any(_FATAL in path.read_bytes() for path in attempt.glob("logs/debug-internal*.log"))


@contextmanager
def _without_arguments() -> Iterator[None]:
    """Hide the arguments of this process: W&B records `sys.argv[1:]` and has no setting to prevent it."""
    before = sys.argv
    sys.argv = before[:1]
    try:
        yield
    finally:
        sys.argv = before


def _wait_until_written() -> None:
    """Wait until the file of a finished offline run is complete.

    `finish` returns slightly earlier, because W&B's process does not answer its last message. So this waits for the end
    of that process, unless the user's program has an open run, which the same process serves.
    """
    if wandb.run is None:
        with suppress(SystemExit):  # W&B exits with the status of its process, which may have been killed
            wandb.teardown()


def overlay_image(predicted: PredictedImage) -> Any:
    """Return a `wandb.Image` with the masks `truth` and `prediction`, with values from `CLASSES`."""
    masks = {"truth": class_mask(predicted.sample.labels), "prediction": class_mask(predicted.labels)}
    return wandb.Image(
        shown_image(predicted.sample.image),
        mode="RGB",
        file_type="png",
        caption=f"{predicted.sample.name} ({predicted.sample.kind})",
        masks={name: {"mask_data": mask, "class_labels": CLASSES} for name, mask in masks.items()},
    )


def _pair(place: int, image: WorstImage) -> list[Any]:
    """Return an image and its mistakes as `wandb.Image`s; W&B shows a list of images of equal size side by side."""
    captions = {image.image: f"{place}. {image.name}", image.mistakes: image.caption}
    return [wandb.Image(str(path), caption=caption) for path, caption in captions.items()]


def shown_image(image: RgbImage) -> RgbImage:
    """Return an image (H x W x 3), reduced to `LARGEST_SIDE` and normalised with the default options, uint8."""
    return resize_to_side(normalize(image, NormalizationOptions()), LARGEST_SIDE)


def class_mask(labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return the class of each pixel, a key of `CLASSES`, from labels (H x W, 0 background), reduced to `LARGEST_SIDE`.

    Labels are reduced (nearest neighbour) before contacts are found, because a line of two pixels could be lost.
    """
    small = resize_to_side(labels.astype(np.int32), LARGEST_SIDE, nearest=True)
    around = np.ones((3, 3), np.uint8)
    nucleus = small > 0
    values = small.astype(np.float64)  # exact, and a type that OpenCV's morphology takes
    highest = cv2.dilate(values, around)
    lowest = cv2.erode(np.where(nucleus, values, np.inf), around)  # of the nuclei alone
    return np.asarray(nucleus + (nucleus & (highest != lowest)).astype(np.uint8), np.uint8)
