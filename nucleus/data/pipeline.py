"""Input pipeline of a worker (tf.data): cached shards to augmented batches, determined by seed, epoch and sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import AugmentOptions, NormalizationOptions
from nucleus.data.augmentation import augmented, drawn_choices
from nucleus.data.decoded import DecodedSample, decoded_sample, sample_of_record
from nucleus.data.images import LabelImage, RgbImage
from nucleus.data.reader import SplitReader
from nucleus.data.shards import ShardFile
from nucleus.lazy import tf

__all__ = ["Feed", "training_batches", "training_sample"]

_PREFETCHED_BATCHES = 4
_SHARED_THREADS = 2
"""Threads of TensorFlow's own pool in a worker (`job.worker.limit_devices`); more samples at once need another pool."""
_MOST_AT_ONCE = 8


@dataclass(frozen=True)
class Feed:
    """Source and options of one worker's batches.

    Attributes:
        reader: Reader of this worker's records, in order.
        targets: Function from the labels of a crop, crop x crop, uint16, to the targets, crop x crop x T, float32.
        crop: Side of the crops, px.
        normalization: Intensity normalization.
        batch: Crops per step on this worker.
        augment: Augmentation.
        seed: Seed of the run.
        threads: Number of crops that are made in parallel.
    """

    reader: SplitReader
    targets: Callable[[LabelImage], NDArray[np.float32]]
    crop: int
    normalization: NormalizationOptions
    batch: int
    augment: AugmentOptions
    seed: int
    threads: int


def training_batches(feed: Feed, epochs: range) -> tf.data.Dataset:
    """Return the batches of one worker over several epochs: read, decode, crop, augment, batch, prefetch.

    One `tf.data.Dataset` serves all epochs, so the first batches of the next epoch are ready when it starts. Autotuning
    is off: with it, shutting down the pipeline sometimes took up to 40 s (TensorFlow 2.21).

    Returns:
        Pairs of images, batch x crop x crop x 3, uint8, and targets, batch x crop x crop x T, float32.
    """
    reader = feed.reader
    blocks = _Blocks(reader)
    depth = feed.targets(np.zeros((1, 1), np.uint16)).shape[-1]

    def block_numbers(epoch: tf.Tensor) -> tf.data.Dataset:
        count = tf.numpy_function(lambda number: np.int64(reader.blocks(int(number))), [epoch], tf.int64)
        return tf.data.Dataset.range(count).map(lambda block: (epoch, block))

    def samples(epoch: tf.Tensor, block: tf.Tensor) -> tf.data.Dataset:
        rows = tf.numpy_function(blocks.enter, [epoch, block], tf.int64)
        # Several crops are made by one call, into one array, which saves calls and copies; never of two blocks, because
        # the next block may need the space in the cache of this one.
        return tf.data.Dataset.from_tensor_slices(tf.ensure_shape(rows, [None, 5])).batch(
            min(_MOST_AT_ONCE, feed.batch)
        )

    def make(rows: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        images = np.empty((len(rows), feed.crop, feed.crop, 3), np.uint8)
        targets = np.empty((len(rows), feed.crop, feed.crop, depth), np.float32)
        for place, (epoch, block, position, shard, record) in enumerate(rows.tolist()):
            with reader.noted(), blocks.shard(epoch, block, shard) as opened:
                sample = decoded_sample(opened, record, feed.normalization)
                images[place], labels = _crop(sample, (feed.seed, epoch, position), feed.crop, feed.augment)
            targets[place] = feed.targets(labels)
        return images, targets

    def crops(rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        images, targets = tf.numpy_function(make, [rows], (tf.uint8, tf.float32))
        shape = (None, feed.crop, feed.crop)
        return tf.ensure_shape(images, (*shape, 3)), tf.ensure_shape(targets, (*shape, depth))

    options = tf.data.Options()
    options.autotune.enabled = False
    options.deterministic = True
    if feed.threads > _SHARED_THREADS:
        options.threading.private_threadpool_size = feed.threads
    return (
        tf.data.Dataset.range(epochs.start, epochs.stop)
        .flat_map(block_numbers)
        .flat_map(samples)
        .map(crops, num_parallel_calls=feed.threads)
        .rebatch(feed.batch, drop_remainder=True)
        .prefetch(_PREFETCHED_BATCHES)
        .with_options(options)
    )


def training_sample(
    data: bytes, key: tuple[int, ...], crop: int, normalization: NormalizationOptions, options: AugmentOptions
) -> tuple[RgbImage, LabelImage]:
    """Decode a record, normalize it, cut a crop and augment it.

    Args:
        data: A record of a shard.
        key: Integers from 0 that determine all random choices.
        crop: Side of the crop, px.
        normalization: Intensity normalization of the whole image.
        options: Augmentation.

    Returns:
        Image, crop x crop x 3, uint8, and labels, crop x crop, uint16.

    Raises:
        IntegrityError: The record is damaged.
    """
    return _crop(sample_of_record(data, normalization), key, crop, options)


def _crop(
    sample: DecodedSample, key: tuple[int, ...], crop: int, options: AugmentOptions
) -> tuple[RgbImage, LabelImage]:
    return augmented(sample.read, sample.shape, sample.table, drawn_choices(key), crop, options)


class _Blocks:
    """Shards of the blocks whose crops are being made.

    Crops of a block are still made while the next block is entered. A block's shards are let go of with its last crop,
    so that the cache can evict them.
    """

    def __init__(self, reader: SplitReader) -> None:
        self._reader = reader
        self._lock = Lock()
        self._open: dict[tuple[int, int], dict[int, ShardFile]] = {}
        self._left: dict[tuple[int, int], int] = {}

    def enter(self, epoch: NDArray[np.int64], block: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return a row per sample of a block: epoch, block, position in the epoch, shard, record."""
        place = int(epoch), int(block)
        rows = self._reader.enter(*place)
        with self._lock:
            self._open[place], self._left[place] = self._reader.shards, len(rows)
        return np.insert(rows, 0, np.array(place)[:, np.newaxis], axis=1)

    @contextmanager
    def shard(self, epoch: int, block: int, number: int) -> Iterator[ShardFile]:
        """Give an open shard to one of the samples of the block."""
        place = epoch, block
        try:
            yield self._open[place][number]
        finally:
            with self._lock:
                self._left[place] -= 1
                if not self._left[place]:
                    del self._left[place], self._open[place]
