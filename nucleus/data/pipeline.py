"""Input pipeline of a worker (tf.data): cached shards to augmented batches, determined by seed, epoch and sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import AugmentOptions, NormalizationOptions
from nucleus.data.normalization import normalize_tensor
from nucleus.data.reader import SplitReader
from nucleus.lazy import tf

__all__ = ["Feed", "training_batches", "training_sample"]

_CHOICES = (
    *("scale", "top", "left", "turn", "flip", "invert", "grey", "contrast", "brightness"),
    *("gamma", "stain_0", "stain_1", "stain_2", "blur", "noise"),
    *("hed_0", "hed_1", "hed_2", "shift_0", "shift_1", "shift_2", "shading", "sigma"),
)
_FULL_RANGE = 255.0
_PREFETCHED_BATCHES = 4
_READ_AT_ONCE = 16
_SHARED_THREADS = 2
"""Threads of TensorFlow's own pool in a worker (`job.worker.limit_devices`); more samples at once need another pool."""
_FIELD_SIDE = 3
"""Smooth fields are interpolated between this many random values per side."""
_HED_TO_RGB = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
"""Optical density of haematoxylin, eosin and diaminobenzidine in red, green and blue (Ruifrok & Johnston 2001)."""
_RGB_TO_HED = np.linalg.inv(_HED_TO_RGB)
_COLOURED = 8.0
"""Crops are coloured if their channels differ by at least this much, on average, in 255."""
_SHIFT_OF_HED = 0.2
_BLUR_RADIUS = 6
_SEEDS_PER_EPOCH = 1 << 31  # seeds are smaller than this, so no two epochs share random numbers


@dataclass(frozen=True)
class Feed:
    """Source and options of one worker's batches.

    Attributes:
        reader: Reader of this worker's records, in order.
        targets: Function from the labels of a crop, crop x crop, to the network's targets, crop x crop x T, float32.
        crop: Side of the crops, px.
        normalization: Intensity normalization.
        batch: Crops per step on this worker.
        augment: Augmentation.
        seed: Seed of the run.
        threads: Number of samples that are decoded and augmented in parallel.
    """

    reader: SplitReader
    targets: Callable[[NDArray[np.int32]], NDArray[np.float32]]
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
    depth = feed.targets(np.zeros((1, 1), np.int32)).shape[-1]

    def blocks(epoch: tf.Tensor) -> tf.data.Dataset:
        count = tf.numpy_function(lambda number: np.int64(reader.blocks(int(number))), [epoch], tf.int64)
        return tf.data.Dataset.range(count).map(lambda block: (epoch, block))

    def read_rows(shards: NDArray[np.int64], records: NDArray[np.int64]) -> NDArray[np.object_]:
        pairs = zip(shards.tolist(), records.tolist(), strict=True)
        return np.array([reader.read(*pair) for pair in pairs], np.object_)

    def read(rows: tf.Tensor) -> tf.data.Dataset:
        data = tf.numpy_function(read_rows, (rows[:, 2], rows[:, 3]), tf.string)
        return tf.data.Dataset.from_tensor_slices((rows, tf.ensure_shape(data, [None])))

    def order(epoch: NDArray[np.int64], block: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = reader.enter(int(epoch), int(block))
        return np.insert(rows, 0, epoch, axis=1)

    def samples(epoch: tf.Tensor, block: tf.Tensor) -> tf.data.Dataset:
        rows = tf.ensure_shape(tf.numpy_function(order, [epoch, block], tf.int64), [None, 4])
        # One Python call reads several records; all records of a block are read before the next block starts.
        return tf.data.Dataset.from_tensor_slices(rows).batch(_READ_AT_ONCE).flat_map(read)

    def load(row: tf.Tensor, data: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        epoch, position, _, _ = tf.unstack(row)
        seeds = tf.stack([epoch * _SEEDS_PER_EPOCH + feed.seed, position])
        image, labels = training_sample(data, seeds, feed.crop, feed.normalization, feed.augment)
        targets = tf.numpy_function(feed.targets, [labels], tf.float32)
        return image, tf.ensure_shape(targets, (feed.crop, feed.crop, depth))

    options = tf.data.Options()
    options.autotune.enabled = False
    options.deterministic = True
    if feed.threads > _SHARED_THREADS:
        options.threading.private_threadpool_size = feed.threads
    return (
        tf.data.Dataset.range(epochs.start, epochs.stop)
        .flat_map(blocks)
        .flat_map(samples)
        .map(load, num_parallel_calls=feed.threads)
        .batch(feed.batch, drop_remainder=True)
        .prefetch(_PREFETCHED_BATCHES)
        .with_options(options)
    )


def training_sample(
    data: tf.Tensor, seeds: tf.Tensor, crop: int, normalization: NormalizationOptions, options: AugmentOptions
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decode a record, normalize it, cut a crop and augment it.

    Args:
        data: A record of a shard.
        seeds: Two integers that determine all random choices.
        crop: Side of the crop, px.
        normalization: Intensity normalization of the whole image.
        options: Augmentation.

    Returns:
        Image, crop x crop x 3, uint8, and labels, crop x crop, int32.
    """
    features = {name: tf.io.FixedLenFeature([], tf.string) for name in ("image", "labels")}
    example = tf.io.parse_single_example(data, features)
    image = tf.io.decode_png(example["image"], channels=3)
    image = normalize_tensor(image, normalization)
    labels = tf.cast(tf.io.decode_png(example["labels"], channels=1, dtype=tf.uint16), tf.int32)
    numbers = tf.random.stateless_uniform((len(_CHOICES),), seeds)
    choices = dict(zip(_CHOICES, tf.unstack(numbers), strict=True))
    image, labels = _crop(image, labels, choices, crop, options.scale)
    if options.flips:
        image, labels = _turn(image, choices), _turn(labels, choices)
    return _change_colours(image, choices, seeds, options), labels[..., 0]


def _crop(
    image: tf.Tensor, labels: tf.Tensor, choices: dict[str, tf.Tensor], crop: int, scale: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Cut a window of crop / 2^u pixels, mirrored if the image is smaller, and resize it to crop x crop."""
    window = tf.cast(tf.round(crop / tf.pow(2.0, scale * (2.0 * choices["scale"] - 1.0))), tf.int32)
    rows = _window_indices(tf.shape(image)[0], window, choices["top"])
    columns = _window_indices(tf.shape(image)[1], window, choices["left"])

    def cut(pixels: tf.Tensor) -> tf.Tensor:
        return tf.gather(tf.gather(pixels, rows, axis=0), columns, axis=1)

    image = tf.image.resize(cut(image), (crop, crop), method="bilinear", antialias=True)
    return image, tf.image.resize(cut(labels), (crop, crop), method="nearest")


def _window_indices(length: tf.Tensor, window: tf.Tensor, choice: tf.Tensor) -> tf.Tensor:
    """Return the indices of a window along an axis, at a random position, mirrored beyond the end."""
    free = tf.maximum(length - window + 1, 1)
    start = tf.minimum(tf.cast(choice * tf.cast(free, tf.float32), tf.int32), free - 1)
    period = tf.maximum(2 * (length - 1), 1)
    phase = (start + tf.range(window)) % period
    return tf.minimum(tf.minimum(phase, period - phase), length - 1)


def _turn(pixels: tf.Tensor, choices: dict[str, tf.Tensor]) -> tf.Tensor:
    shape = pixels.shape
    turned = tf.image.rot90(pixels, tf.cast(choices["turn"] * 4.0, tf.int32))
    flipped = tf.cond(choices["flip"] < 0.5, lambda: turned, lambda: tf.reverse(turned, [1]))
    return tf.ensure_shape(flipped, shape)


def _change_colours(
    image: tf.Tensor, choices: dict[str, tf.Tensor], seeds: tf.Tensor, options: AugmentOptions
) -> tf.Tensor:
    grey = tf.reduce_mean(image, axis=-1, keepdims=True) + tf.zeros_like(image)
    image = tf.where(choices["grey"] < options.grey, grey, image)
    image = tf.where(choices["invert"] < options.invert, _FULL_RANGE - image, image)
    if options.hed:
        image = tf.cond(_is_coloured(image), lambda: _restained(image, choices, options.hed), lambda: image)
    if options.gamma or options.stain:
        image = _FULL_RANGE * tf.pow(image / _FULL_RANGE, _powers(choices, options))
    mean = tf.reduce_mean(image)
    contrast = 1.0 + options.contrast * _centred(choices["contrast"])
    brightness = _FULL_RANGE * options.brightness * _centred(choices["brightness"])
    image = (image - mean) * contrast + mean + brightness
    if options.shading:
        image = _shaded(image, options.shading * choices["shading"], seeds)
    if options.blur:
        sigma = 0.5 + (options.blur_sigma - 0.5) * choices["sigma"]
        image = tf.cond(choices["blur"] < options.blur, lambda: _blurred(image, sigma), lambda: image)
    if options.noise:
        strength = _FULL_RANGE * options.noise * choices["noise"]
        image += strength * tf.random.stateless_normal(tf.shape(image), seeds)
    return tf.cast(tf.clip_by_value(tf.round(image), 0.0, _FULL_RANGE), tf.uint8)


def _powers(choices: dict[str, tf.Tensor], options: AugmentOptions) -> tf.Tensor:
    """Return the exponent of each channel."""
    channels = tf.stack([choices[f"stain_{channel}"] for channel in range(3)])
    return tf.pow(2.0, options.gamma * _centred(choices["gamma"]) + options.stain * _centred(channels))


def _centred(choice: tf.Tensor) -> tf.Tensor:
    """Map [0, 1] to [-1, 1]."""
    return 2.0 * choice - 1.0


def _is_coloured(image: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(tf.reduce_max(image, axis=-1) - tf.reduce_min(image, axis=-1)) > _COLOURED


def _restained(image: tf.Tensor, choices: dict[str, tf.Tensor], strength: float) -> tf.Tensor:
    """Change the optical density of each stain."""
    density = -tf.math.log((image + 1.0) / (_FULL_RANGE + 1.0))
    factors, shifts = (
        strength * _centred(tf.stack([choices[f"{name}_{stain}"] for stain in range(3)])) for name in ("hed", "shift")
    )
    stains = tf.linalg.matmul(density, tf.constant(_RGB_TO_HED)) * (1.0 + factors) + _SHIFT_OF_HED * shifts
    density = tf.linalg.matmul(stains, tf.constant(_HED_TO_RGB))
    return (_FULL_RANGE + 1.0) * tf.exp(-density) - 1.0


def _shaded(image: tf.Tensor, strength: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
    """Multiply by one smooth field and add another, as uneven illumination and background do."""
    values = tf.random.stateless_uniform((_FIELD_SIDE, _FIELD_SIDE, 2), seeds + 1, -1.0, 1.0)
    factor, offset = tf.split(tf.image.resize(values, tf.shape(image)[:2], method="bicubic"), 2, axis=-1)
    return image * (1.0 + strength * factor) + _FULL_RANGE * strength / 2.0 * offset


def _blurred(image: tf.Tensor, sigma: tf.Tensor) -> tf.Tensor:
    """Blur with a Gaussian of a standard deviation of up to 3 px."""
    distances = tf.range(-_BLUR_RADIUS, _BLUR_RADIUS + 1, dtype=tf.float32)
    line = tf.exp(-tf.square(distances / sigma) / 2.0)
    line /= tf.reduce_sum(line)
    for shape in ((-1, 1, 1, 1), (1, -1, 1, 1)):
        kernel = tf.tile(tf.reshape(line, shape), (1, 1, 3, 1))
        image = tf.nn.depthwise_conv2d(image[tf.newaxis], kernel, (1, 1, 1, 1), "SAME")[0]
    return image
