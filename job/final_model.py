"""The model of a finished run: its files in the run's last checkpoint, `model.onnx`, and facts for the report.

`write_half` makes the same files in half precision from a published version.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

import nucleus
from nucleus.errors import ModelError
from nucleus.lazy import keras, tf
from nucleus.runs.record import Facts, NetworkFacts
from nucleus.surroundings import installed_versions
from nucleus.text import plural

if TYPE_CHECKING:
    from nucleus.config.recipe import Recipe
    from nucleus.data.cache import ShardCache
    from nucleus.data.dataset import Dataset
    from nucleus.data.reader import LabelledImage
    from nucleus.metrics.scores import Metrics
    from nucleus.model.architecture import InstanceSettings, Maps, ModelConfig
    from nucleus.predict.model import ImageValues, Model
    from nucleus.progress import Advance
    from nucleus.registry.manifest import ModelManifest
    from nucleus.registry.versions import PulledModel
    from nucleus.training.callbacks import TrainingResult

__all__ = ["FINAL_FOLDER", "add_onnx", "check_same_nuclei", "network_facts", "run_facts", "save_model", "write_half"]


FINAL_FOLDER = "model"
"""Folder of the last checkpoint that holds the model's files."""

_PREVIEW_SIDE = 256
"""Side of an image in the preview, px."""
_COMPARED_IMAGES = 16
_MOST_APART = 1e-3
"""Largest difference of a value between two engines; rounding gives 1e-6, and up to 1e-4 in a random network."""
_SAME_NUCLEUS = 0.9
"""Lowest IoU of two labels of the same nucleus."""
_MOST_LOST = 0.002
"""Largest loss of mAP by half precision."""


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
    segmenter = nucleus.predict.Model(nucleus.model.KerasEngine(result.model, result.config.heads), result.config)
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


def add_onnx(folder: Path, dataset: Dataset, cache: ShardCache, *, half: bool = False) -> None:
    """Write `model.onnx` beside a model's weights, and compare it with TensorFlow on images of the dataset.

    The first 16 images of the test split are compared or, if it is empty, of another; see `check_same_nuclei`.

    Args:
        folder: Folder with the configuration and the weights.
        dataset: The dataset of the run.
        cache: Cache of its shards.
        half: Whether the weights are those of `nucleus.model.write_half_weights`.

    Raises:
        ModelError: ONNX Runtime does not find the same nuclei as TensorFlow.
    """
    with suppress(RuntimeError):  # TensorFlow has started before
        tf.config.set_visible_devices([], "GPU")
    with tf.device("CPU"):  # a GPU rounds in another way, and may belong to others
        model, config = nucleus.model.load_model(folder)
        path = folder / nucleus.model.ONNX_FILE
        nucleus.model.write_onnx(model, config.heads, path, half=half)
        expected = nucleus.predict.Model(nucleus.model.KerasEngine(model, config.heads), config)
        found = nucleus.predict.Model(nucleus.model.OnnxEngine(path, config), config)
        check_same_nuclei(expected, found, _images_to_compare(dataset, cache))


def write_half(
    pulled: PulledModel, folder: Path, progress: Callable[[str], AbstractContextManager[Advance]]
) -> ModelManifest:
    """Write a version with its weights in half precision into a folder that is then used as a pulled one.

    Keras and ONNX Runtime compute in float32 with the same rounded weights. They are compared as before a publication,
    and scored again on the dataset that the version was trained on, in ONNX Runtime; the rest of the origin is kept.
    The preview is left out: it is as large as a fifth of the weights.

    Args:
        pulled: The version.
        folder: The folder, which may hold a copy of the model.
        progress: Shows the progress of the scoring; called with a title.

    Returns:
        The manifest of these files.

    Raises:
        DataError: The dataset no longer exists.
        ModelError: mAP falls by more than .002, or ONNX Runtime does not find the same nuclei as TensorFlow.
        UsageError: The folder contains other files.
    """
    dataset = nucleus.data.open_dataset(nucleus.data.locate_dataset(pulled.manifest.origin.dataset))
    return nucleus.registry.fill_folder(folder, pulled.manifest, partial(_make_half, pulled, dataset, progress))


def _make_half(
    pulled: PulledModel,
    dataset: Dataset,
    progress: Callable[[str], AbstractContextManager[Advance]],
    folder: Path,
) -> ModelManifest:
    """Make the files in an empty folder, and return their manifest."""
    cache = nucleus.data.ShardCache()
    shutil.copyfile(pulled.folder / nucleus.model.CONFIG_FILE, folder / nucleus.model.CONFIG_FILE)
    nucleus.model.write_half_weights(pulled.folder / nucleus.model.WEIGHTS_FILE, folder / nucleus.model.WEIGHTS_FILE)
    add_onnx(folder, dataset, cache, half=True)
    before, name = pulled.manifest.origin, pulled.manifest.model
    config = nucleus.model.read_model_config((folder / nucleus.model.CONFIG_FILE).read_bytes(), str(folder))
    engine = nucleus.model.OnnxEngine(folder / nucleus.model.ONNX_FILE, config)
    model = nucleus.predict.Model(engine, config, manifest=pulled.manifest)
    scored = [split for split in before.metrics if dataset.manifest.split_samples(split)]
    metrics = {split: nucleus.predict.evaluate(model, dataset, (split,), cache, progress=progress) for split in scored}
    origin = before.model_copy(update={"metrics": before.metrics | {s: e.overall for s, e in metrics.items()}})
    _check_scores(before.metrics, origin.metrics)
    history = json.loads((pulled.folder / nucleus.model.METRICS_FILE).read_bytes())["history"]
    text = json.dumps({"metrics": origin.metrics, "history": history}, indent=1)
    (folder / nucleus.model.METRICS_FILE).write_text(text)
    card = nucleus.registry.model_card(name, origin, config, dataset.manifest, history, half=True)
    (folder / nucleus.model.CARD_FILE).write_text(card)
    return pulled.manifest.model_copy(update={"files": nucleus.registry.stored_files(folder), "origin": origin})


def _check_scores(before: Metrics, after: Metrics) -> None:
    """Raise `ModelError` if half precision costs more than rounding may."""
    for split in before:
        one, other = before[split]["all"]["map"], after[split]["all"]["map"]
        if one is not None and (other is None or one - other > _MOST_LOST):
            raise ModelError(
                f"Expected the mAP of {split} in half precision to be that in single precision, {one:.4f}, less "
                f"{_MOST_LOST} at most; found {other}. Leave --half out."
            )


def _images_to_compare(dataset: Dataset, cache: ShardCache) -> Iterable[LabelledImage]:
    splits = ((split, len(dataset.manifest.split_samples(split))) for split in ("test", "val", "train"))
    split, count = next((split, count) for split, count in splits if count)
    return nucleus.data.images_of_range(dataset, split, cache, range(min(count, _COMPARED_IMAGES)))


def check_same_nuclei(expected: Model, found: Model, images: Iterable[LabelledImage]) -> None:
    """Check that two engines find the same nuclei.

    No value may differ by more than 1e-3. Each nucleus of one engine must be one of the other's (IoU of at least 0.9),
    except where a decision lies on the edge: a pixel's value is as close to a threshold as the image's values differ,
    or the mean over a nucleus is to `min_score`. Rounding may change such a pixel, and with it the nuclei around it.

    Args:
        expected: Model on TensorFlow.
        found: The same on ONNX Runtime.
        images: Images to compare.

    Raises:
        ModelError: The engines do not find the same; it names the image and the difference.
    """
    named, *sources = tee(images, 3)
    pairs = zip(
        *(model.values(_sources(each)) for model, each in zip((expected, found), sources, strict=True)), strict=True
    )
    for image, (one, other) in zip(named, pairs, strict=True):
        apart = float(np.abs(one.values - other.values).max())
        if not apart <= _MOST_APART:  # also NaN
            raise ModelError(
                f"Expected values of {nucleus.model.ONNX_FILE} within {_MOST_APART:g} of TensorFlow's for the image "
                f"{image.name}; found a difference of {apart:.3g}."
            )
        changed = _changed_nuclei(expected, one, expected.label(one), expected.label(other), apart)
        if changed:
            raise ModelError(
                f"Expected the same nuclei from {nucleus.model.ONNX_FILE} and TensorFlow in the image {image.name}; "
                f"{changed} differ, though no value differs by more than {apart:.1g}."
            )


def _sources(images: Iterable[LabelledImage]) -> Iterable[Any]:
    return (nucleus.predict.array_source(image.image, image.name) for image in images)


def _changed_nuclei(
    model: Model, values: ImageValues, one: NDArray[np.int32], other: NDArray[np.int32], apart: float
) -> int:
    """Return the number of nuclei of two label images that have no counterpart, apart from those on an edge."""
    if np.array_equal(one, other):
        return 0
    maps = nucleus.model.maps_of(values.values, model.config.heads)
    pairs = nucleus.metrics.pair_labels(one, other)
    same = pairs.iou >= _SAME_NUCLEUS
    alone = [
        np.where(np.isin(labels, of[same]), 0, labels) for labels, of in ((one, pairs.true), (other, pairs.predicted))
    ]
    region = _on_edge(maps, model.config.instances, apart)
    for labels in alone:
        region |= np.isin(labels, _uncertain(labels, maps, model.config.instances, apart))
    for labels in (*alone, *alone):  # what lies over an excused nucleus is excused, in both directions
        region |= np.isin(labels, np.setdiff1d(labels[region], 0))
    return sum(len(np.setdiff1d(labels[~region], 0)) for labels in alone)


def _on_edge(maps: Maps, settings: InstanceSettings, apart: float) -> NDArray[np.bool_]:
    """Return the pixels that may change sides at a threshold, and their neighbours."""
    close = np.abs(maps.mask - settings.mask_threshold) <= apart
    close |= np.abs(maps.interior - settings.seed_threshold) <= apart
    return np.asarray(cv2.dilate(close.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)


def _uncertain(labels: NDArray[np.int32], maps: Maps, settings: InstanceSettings, apart: float) -> NDArray[np.int64]:
    """Return the labels whose mean over the mask is as close to the lowest score."""
    areas = np.maximum(np.bincount(labels.ravel()), 1)
    means = np.bincount(labels.ravel(), maps.mask.ravel()) / areas
    return np.setdiff1d(np.flatnonzero(np.abs(means - settings.min_score) <= apart), 0)


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
