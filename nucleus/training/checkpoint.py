"""Checkpoints of a run: progress, weights and optimizer states, written to and read from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from nucleus.errors import IntegrityError
from nucleus.lazy import keras
from nucleus.metrics.scores import count_from_one
from nucleus.training.optimizer import ParameterGroup

__all__ = [
    "BEST_WEIGHTS",
    "History",
    "Progress",
    "load_arrays",
    "load_checkpoint",
    "save_arrays",
    "save_checkpoint",
]


History = list[dict[str, float]]
"""Metrics of each finished epoch; `epoch` counts from 1."""

BEST_WEIGHTS = "best.weights.h5"
"""File of the best weights so far."""
_CURRENT_WEIGHTS = "current.npz"
_STATE = "state.json"


class Progress(BaseModel):
    """Progress of a run: the part of its state without arrays.

    Attributes:
        epochs_done: Number of finished epochs.
        steps_done: Number of finished steps of the current epoch.
        sums_done: Sums of the loss and of the scores over these steps and all workers; empty before the first step.
        seconds_done: Duration of these steps, seconds.
        best_epoch: Epoch, counted from 1, with the best weights; 0 before the first validation.
        best_score: Value of the monitored metric in that epoch.
        validations_since_best: Number of validations since that epoch.
        history: Metrics of each finished epoch: `epoch` (from 1), `loss`, `learning_rate` and others and, if it was
            validated, `val_` metrics.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")  # best_score starts at -inf

    epochs_done: int = 0
    steps_done: int = 0
    sums_done: list[float] = []
    seconds_done: float = 0.0
    best_epoch: int = 0
    best_score: float = float("-inf")
    validations_since_best: int = 0
    history: History = []

    @model_validator(mode="before")
    @classmethod
    def _count_from_one(cls, stored: Any) -> Any:
        """Accept a checkpoint of a version before 0.3.0, which counted epochs from 0."""
        try:
            history = count_from_one(stored["history"])
            if history == stored["history"] and stored["best_epoch"] != -1:
                return stored
            return {**stored, "history": history, "best_epoch": stored["best_epoch"] + 1}
        except (AttributeError, KeyError, TypeError):  # damaged, or without a field: the check of the fields says so
            return stored

    def note_score(self, epoch: int, score: float) -> bool:
        """Record the score of a validation; return whether it is the best so far."""
        if score > self.best_score:
            self.best_epoch, self.best_score, self.validations_since_best = epoch, score, 0
            return True
        self.validations_since_best += 1
        return False

    def add(self, sums: list[float]) -> None:
        """Add the sums over further steps."""
        self.sums_done = [done + more for done, more in zip(self.sums_done or [0.0] * len(sums), sums, strict=True)]

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """Record the end of an epoch."""
        self.epochs_done += 1
        self.steps_done, self.sums_done, self.seconds_done = 0, [], 0.0
        self.history.append(metrics)


def save_checkpoint(
    folder: Path, progress: Progress, model: keras.Model, groups: Sequence[ParameterGroup], best: Path
) -> None:
    """Write the files of a checkpoint into an empty folder. They are byte-identical on all workers.

    Args:
        folder: The folder.
        progress: Progress of the run.
        model: The network.
        groups: Parameter groups, with their optimizers and averages.
        best: File of the best weights so far; need not exist.
    """
    save_arrays(folder / _CURRENT_WEIGHTS, [variable.numpy() for variable in model.weights])
    for group in groups:
        save_arrays(folder / f"{group.name}.npz", [variable.numpy() for variable in group.state])
    if best.exists():  # it does not before the first validation
        (folder / BEST_WEIGHTS).write_bytes(best.read_bytes())
    (folder / _STATE).write_text(progress.model_dump_json(indent=1), encoding="utf-8")


def load_checkpoint(folder: Path, model: keras.Model, groups: Sequence[ParameterGroup], best: Path) -> Progress:
    """Restore weights, optimizers and averages, copy the best weights to the file `best`, and return the progress.

    Raises:
        IntegrityError: The checkpoint is incomplete, damaged or of another network.
    """
    try:
        progress = Progress.model_validate_json((folder / _STATE).read_bytes())
        best_weights = (folder / BEST_WEIGHTS).read_bytes() if progress.best_epoch > 0 else None
    except (OSError, ValidationError) as error:
        raise IntegrityError(f"Expected a complete checkpoint in {folder}; {error}.") from error
    if best_weights is not None:
        best.write_bytes(best_weights)
    _assign(list(model.weights), load_arrays(folder / _CURRENT_WEIGHTS), folder)
    for group in groups:
        _assign(group.state, load_arrays(folder / f"{group.name}.npz"), folder)
    return progress


def _assign(variables: list[Any], arrays: list[Any], folder: Path) -> None:
    shapes = [tuple(variable.shape) for variable in variables]
    if shapes != [array.shape for array in arrays]:
        raise IntegrityError(f"Expected the state of this network in {folder}; found that of another network.")
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def save_arrays(path: Path, arrays: list[NDArray[np.generic]]) -> None:
    """Write a list of arrays to a file for `load_arrays`."""
    np.savez(path, **{f"{i:05d}": array for i, array in enumerate(arrays)})  # type: ignore[arg-type]


def load_arrays(path: Path) -> list[NDArray[np.generic]]:
    """Read the arrays that `save_arrays` wrote; pickled objects are refused. Raises `IntegrityError`."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return [stored[key] for key in sorted(stored.files)]
    except Exception as error:  # NumPy and zipfile raise many kinds of errors for damaged files
        raise IntegrityError(f"Expected arrays in {path}; it is damaged: {error}.") from error
