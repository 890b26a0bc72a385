"""Files of a network: `model.json` (configuration) and `model.weights.h5`, neither of which can contain code."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nucleus.errors import IntegrityError, ModelError, WeightsError
from nucleus.lazy import keras
from nucleus.model.architecture import ModelConfig, read_model_config
from nucleus.model.unet import build_unet

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "METRICS_FILE",
    "PREVIEW_FILE",
    "WEIGHTS_FILE",
    "load_arrays",
    "load_encoder_weights",
    "load_model",
    "load_weights",
    "save_arrays",
]


CONFIG_FILE = "model.json"
WEIGHTS_FILE = "model.weights.h5"
METRICS_FILE = "metrics.json"
"""Scores of the best weights and metrics of each epoch."""
CARD_FILE = "card.md"
PREVIEW_FILE = "preview.png"


def load_model(folder: Path) -> tuple[keras.Model, ModelConfig]:
    """Rebuild a network from its folder, with this package's own code.

    Raises:
        ModelError: This version cannot read the configuration, or the weights do not fit it.
    """
    path = folder / CONFIG_FILE
    config = read_model_config(path.read_bytes(), str(path))
    model = build_unet(config)
    load_weights(model, folder / WEIGHTS_FILE)
    return model, config


def load_weights(model: keras.Model, path: Path) -> None:
    """Load a `.weights.h5` file into a network. Raises `ModelError` if it does not fit."""
    try:
        _load(model, path)
    except Exception as error:  # Keras and HDF5 raise many kinds of errors for damaged files
        raise ModelError(f"Expected weights of this network in {path}; they do not fit: {error}") from error


def load_encoder_weights(encoder: keras.Model, path: Path) -> None:
    """Load encoder weights from a file `.weights.h5` or, in Keras's older format, `.h5`.

    Raises:
        WeightsError: The file is damaged or belongs to another network.
    """
    try:
        _load(encoder, path)
    except Exception as error:
        raise WeightsError(
            f"Expected weights of the encoder in {path}; they do not fit: {error}. "
            "Use the file without the top (include_top=False) of the same network."
        ) from error


def _load(model: keras.Model, path: Path) -> None:
    """Load all weights of a file; weights that Keras would skip with a warning are an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.load_weights(path)


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
