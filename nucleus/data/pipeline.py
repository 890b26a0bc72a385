"""From cached shards to batches for one worker: tf.data, every random choice a function of seed, epoch and sample."""

import tensorflow as tf

from nucleus.config.recipe import AugmentOptions
from nucleus.data.sampling import EpochPlan
from nucleus.data.shards import ShardReader

__all__ = ["training_batches"]

_RECORD = {name: tf.io.FixedLenFeature([], tf.string) for name in ("image", "labels")}
_FULL_RANGE = 255.0


def training_batches(
    reader: ShardReader,
    plan: EpochPlan,
    *,
    crop: int,
    batch: int,
    augment: AugmentOptions,
    seed: int,
    epoch: int,
) -> tf.data.Dataset:
    """Batches of one worker in one epoch: read, decode, crop at native resolution, augment, batch, prefetch.

    Yields:
        Images, batch x crop x crop x 3, uint8, and labels, batch x crop x crop, int32.
    """

    def load(position: tf.Tensor, shard: tf.Tensor, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        data = tf.numpy_function(reader.read, (shard, record), tf.string, stateful=False)
        example = tf.io.parse_single_example(tf.ensure_shape(data, []), _RECORD)
        image = tf.io.decode_png(example["image"], channels=3)
        labels = tf.cast(tf.io.decode_png(example["labels"], channels=1, dtype=tf.uint16), tf.int32)
        numbers = tf.random.stateless_uniform((len(_CHOICES),), seed=(seed ^ (epoch << 8), position))
        choices = dict(zip(_CHOICES, tf.unstack(numbers), strict=True))
        return _augmented(image, labels, choices, crop, augment)

    order = tf.data.Dataset.from_tensor_slices((plan.positions, plan.shards, plan.records))
    batches = order.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(
        batch, drop_remainder=True
    )
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)


_CHOICES = ("scale", "top", "left", "turn", "flip", "invert", "grey", "contrast", "brightness")


def _augmented(
    image: tf.Tensor, labels: tf.Tensor, choices: dict[str, tf.Tensor], crop: int, options: AugmentOptions
) -> tuple[tf.Tensor, tf.Tensor]:
    image, labels = _crop(image, labels, choices, crop, options.scale)
    if options.flips:
        image, labels = _turn(image, choices), _turn(labels, choices)
    return _change_colours(image, choices, options), labels[..., 0]


def _crop(
    image: tf.Tensor, labels: tf.Tensor, choices: dict[str, tf.Tensor], crop: int, scale: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Cut a window of crop / 2^u pixels, mirrored where the image is smaller, and resize it to crop x crop."""
    window = tf.cast(tf.round(crop / tf.pow(2.0, scale * (2.0 * choices["scale"] - 1.0))), tf.int32)
    rows = _window_indices(tf.shape(image)[0], window, choices["top"])
    columns = _window_indices(tf.shape(image)[1], window, choices["left"])

    def cut(pixels: tf.Tensor) -> tf.Tensor:
        return tf.gather(tf.gather(pixels, rows, axis=0), columns, axis=1)

    image = tf.image.resize(cut(image), (crop, crop), method="bilinear")
    return image, tf.image.resize(cut(labels), (crop, crop), method="nearest")


def _window_indices(length: tf.Tensor, window: tf.Tensor, choice: tf.Tensor) -> tf.Tensor:
    """Indices of a window along an axis: at a random place, mirrored beyond the end."""
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


def _change_colours(image: tf.Tensor, choices: dict[str, tf.Tensor], options: AugmentOptions) -> tf.Tensor:
    grey = tf.reduce_mean(image, axis=-1, keepdims=True) + tf.zeros_like(image)
    image = tf.where(choices["grey"] < options.grey, grey, image)
    image = tf.where(choices["invert"] < options.invert, _FULL_RANGE - image, image)
    mean = tf.reduce_mean(image)
    contrast = 1.0 + options.contrast * (2.0 * choices["contrast"] - 1.0)
    brightness = _FULL_RANGE * options.brightness * (2.0 * choices["brightness"] - 1.0)
    changed = (image - mean) * contrast + mean + brightness
    return tf.cast(tf.clip_by_value(tf.round(changed), 0.0, _FULL_RANGE), tf.uint8)

