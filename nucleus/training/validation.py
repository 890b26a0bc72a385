"""Metrics of a network on a split, exact over any number of workers: each takes its images, the sums are added."""

from collections.abc import Iterable, Iterator
from itertools import tee

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from nucleus.config.recipe import Heads, LossOptions
from nucleus.data.cache import ShardCache
from nucleus.data.datasets import Dataset
from nucleus.data.images import LabelImage
from nucleus.data.manifest import DatasetManifest
from nucleus.data.reading import SplitReader, cached_split
from nucleus.data.sampling import epoch_plan
from nucleus.data.shards import decode_record
from nucleus.metrics.scores import ImageScores, ScoreSums, score_labels
from nucleus.model.architecture import ModelConfig
from nucleus.model.heads import logits_of, maps_of
from nucleus.model.instances import label_nuclei
from nucleus.model.losses import image_losses
from nucleus.model.tiling import TiledNetwork
from nucleus.training.distributed import Workers
from nucleus.training.predictions import LabelledImage, PredictedImage

__all__ = [
    "images_of_split",
    "images_of_worker",
    "predict_images",
    "score_image",
    "score_images",
    "split_reader",
]


def images_of_worker(manifest: DatasetManifest, split: str, reader: SplitReader) -> Iterator[LabelledImage]:
    """The images of a split that are one worker's, in stored order; over all workers each image once."""
    kinds = {sample.name: sample.kind for sample in manifest.split_samples(split)}
    for record in reader.records():
        name, image, labels = decode_record(record)
        yield LabelledImage(name, kinds[name], image, labels)


def images_of_split(dataset: Dataset, split: str, cache: ShardCache) -> Iterator[LabelledImage]:
    """All images of a split, in stored order, from shards that are fetched into the cache."""
    return images_of_worker(dataset.manifest, split, split_reader(dataset, split, cache))


def split_reader(dataset: Dataset, split: str, cache: ShardCache, rank: int = 0, world: int = 1) -> SplitReader:
    """Reads a worker's images of a split in stored order."""
    counts = [shard.records for shard in dataset.manifest.split_shards(split)]
    return cached_split(
        dataset,
        split,
        cache,
        lambda _: epoch_plan(counts, seed=0, epoch=0, rank=rank, world=world, global_batch=0, shuffle=False),
    )


def predict_images(
    network: TiledNetwork, images: Iterable[LabelledImage], config: ModelConfig, loss: LossOptions
) -> Iterator[PredictedImage]:
    """Predict labelled images, and compare with the truth; one at a time, in their order."""
    samples, again = tee(images)
    for sample, values in zip(samples, network.images(sample.image for sample in again), strict=True):
        labels = label_nuclei(maps_of(values, config.heads), config.instances)
        yield PredictedImage(sample, labels, score_image(values, labels, sample.labels, config, loss))


def score_images(predicted: Iterable[PredictedImage], workers: Workers) -> ScoreSums:
    """Add up the scores of this worker's images and those of all others, in float64; each gets the same."""
    sums = ScoreSums()
    for image in predicted:
        sums.add(image.sample.kind, image.scores)
    return ScoreSums(workers.sum(sums.array))


def score_image(
    values: NDArray[np.float32],
    predicted: NDArray[np.int32],
    truth: LabelImage,
    config: ModelConfig,
    loss: LossOptions,
) -> ImageScores:
    """Compare a prediction with the truth.

    Args:
        values: H x W x channels, from the network.
        predicted: H x W, made from them.
        truth: H x W.
        config: The network.
        loss: The training loss, taken over the whole image.
    """
    return score_labels(truth, predicted, _image_loss(values, truth, config.heads, loss))


def _image_loss(values: NDArray[np.float32], labels: LabelImage, heads: Heads, options: LossOptions) -> float:
    truth = tf.constant(labels[np.newaxis].astype(np.int32))
    return float(image_losses(logits_of(values[np.newaxis], heads), truth, heads, options)[0])
