"""Metrics of a network on a split, exact over any number of workers: each takes its images, the sums are added."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from nucleus.config.recipe import LossOptions
from nucleus.data.cache import ShardCache
from nucleus.data.datasets import Dataset
from nucleus.data.images import LabelImage, RgbImage
from nucleus.data.kinds import Kind
from nucleus.data.manifest import DatasetManifest
from nucleus.data.reading import SplitReader, cached_split
from nucleus.data.sampling import epoch_plan
from nucleus.data.shards import decode_record
from nucleus.model.losses import image_losses
from nucleus.model.metrics import PixelCounts, ScoreSums, count_pixels
from nucleus.model.targets import nucleus_mask, pixel_classes
from nucleus.model.tiling import TiledNetwork
from nucleus.training.distributed import Workers

__all__ = [
    "LabelledImage",
    "image_loss",
    "images_of_split",
    "images_of_worker",
    "mask_counts",
    "score_images",
    "split_reader",
]

_SMALLEST_PROBABILITY = 1e-7


@dataclass(frozen=True)
class LabelledImage:
    """One image of a dataset in memory.

    Attributes:
        name: Its name in the dataset.
        kind: Its kind.
        image: H x W x 3, uint8.
        labels: H x W, uint16.
    """

    name: str
    kind: Kind
    image: RgbImage
    labels: LabelImage


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


def score_images(
    network: TiledNetwork,
    images: Iterable[LabelledImage],
    threshold: float,
    loss: LossOptions,
    workers: Workers,
) -> ScoreSums:
    """Score this worker's images and add up the sums of all workers, in float64; each gets the same."""
    sums = ScoreSums()
    for sample in images:
        probabilities = network(sample.image)
        counts = mask_counts(probabilities, sample.labels, threshold)
        sums.add(sample.kind, counts, image_loss(probabilities, sample.labels, loss))
    return ScoreSums(workers.sum(sums.array))


def mask_counts(probabilities: NDArray[np.float32], labels: LabelImage, threshold: float) -> PixelCounts:
    """Compare the predicted mask with the true one."""
    return count_pixels(labels > 0, nucleus_mask(probabilities, threshold))


def image_loss(probabilities: NDArray[np.float32], labels: LabelImage, options: LossOptions) -> float:
    """The training loss of a whole image, from its blended probabilities."""
    classes = pixel_classes(tf.constant(labels[np.newaxis].astype(np.int32)))
    logits = tf.math.log(tf.constant(np.maximum(probabilities, _SMALLEST_PROBABILITY)[np.newaxis]))
    return float(image_losses(logits, classes, options)[0])
