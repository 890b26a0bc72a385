"""The model of a finished run: its files in the run's last checkpoint, and facts for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nucleus
from nucleus.lazy import keras, tf
from nucleus.runs.record import Facts, NetworkFacts
from nucleus.surroundings import installed_versions
from nucleus.text import plural

if TYPE_CHECKING:
    from nucleus.config.recipe import Recipe
    from nucleus.model.architecture import ModelConfig
    from nucleus.training.callbacks import TrainingResult

__all__ = ["FINAL_FOLDER", "network_facts", "run_facts", "save_model"]


FINAL_FOLDER = "model"
"""Folder of the last checkpoint that holds the model's files."""

_PREVIEW_SIDE = 256
"""Side of an image in the preview, px."""


def save_model(folder: Path, result: TrainingResult) -> None:
    """Write the model's files into a new folder: weights, configuration, metrics with the history, and a preview."""
    folder.mkdir()
    result.model.save_weights(folder / nucleus.model.WEIGHTS_FILE)
    (folder / nucleus.model.CONFIG_FILE).write_text(result.config.model_dump_json(indent=1))
    (folder / nucleus.model.METRICS_FILE).write_text(
        json.dumps({"metrics": result.metrics, "history": result.progress.history}, indent=1)
    )
    (folder / nucleus.model.PREVIEW_FILE).write_bytes(nucleus.data.encode_png(_preview(result)))


def _preview(result: TrainingResult) -> Any:
    """Draw image, true and predicted outlines side by side for a few images of the test split."""
    segmenter = nucleus.predict.Model(result.model, result.config)
    rows = []
    for example in result.examples:
        labels = segmenter.segment(example.image).labels
        rows.append(
            [
                example.image,
                nucleus.pictures.draw_outlines(example.image, example.labels, nucleus.pictures.CYAN),
                nucleus.pictures.draw_outlines(example.image, labels),
            ]
        )
    return nucleus.pictures.contact_sheet(rows, _PREVIEW_SIDE)


def run_facts(result: TrainingResult, recipe: Recipe) -> Facts:
    """Return the facts about a finished run that only its workers know."""
    unfrozen = recipe.network.encoder_trained_from
    encoder_trained = unfrozen is not None and result.progress.epochs_done > unfrozen
    return Facts(
        best_epoch=result.progress.best_epoch,
        network=network_facts(result.model, result.config, encoder_trained=encoder_trained),
        thresholds=result.config.instances.model_dump(),
        nucleus_diameter=result.config.nucleus_diameter,
        workers=result.workers,
        device=_device(recipe.cpus_per_worker),
        seconds=result.seconds,
        versions=installed_versions(),
    )


def network_facts(model: keras.Model, config: ModelConfig, *, encoder_trained: bool) -> NetworkFacts:
    """Return sizes and channels of a network from `nucleus.model.unet.build_unet`.

    Args:
        model: The network.
        config: Configuration of the network.
        encoder_trained: Whether the encoder was trained too.
    """
    encoder = nucleus.model.encoder_of(model)
    decoder = model.count_params() - encoder.count_params()
    trained = sum(int(variable.shape.num_elements()) for variable in encoder.trainable_variables)
    return NetworkFacts(
        encoder=config.encoder,
        parameters=model.count_params(),
        encoder_parameters=encoder.count_params(),
        trained_parameters=decoder + (trained if encoder_trained else 0),
        skips=[int(output.shape[-1]) for output in encoder.outputs],
        decoder=list(config.decoder_channels),
        outputs=list(config.channels),
    )


def _device(cpus: int) -> str:
    """Return the name of this worker's GPU, or its number of CPU cores, such as `4 CPU cores`."""
    for gpu in tf.config.get_visible_devices("GPU"):
        return str(tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name))
    return plural(cpus, "CPU core")
