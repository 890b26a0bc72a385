"""Augmentation in TensorFlow operations, as one writes it by hand: the reference of `nucleus.data.augmentation`.

It was that of versions before 0.5, which computed it in the input pipeline. Two faults of it are kept: a crop of which
one value is raised to a power while it is below 0 becomes black, and blurred crops are dark at their edges.
"""

import numpy as np
import tensorflow as tf

from nucleus.config.recipe import AugmentOptions, NormalizationOptions
from nucleus.data.normalization import normalize

__all__ = ["changed_by_tensors", "sample_by_tensors"]

_FULL_RANGE = 255.0
_HED_TO_RGB = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
"""Optical density of haematoxylin, eosin and diaminobenzidine in red, green and blue (Ruifrok & Johnston 2001)."""
_RGB_TO_HED = np.linalg.inv(_HED_TO_RGB)
_COLOURED = 8.0
"""Crops are coloured if their channels differ by at least this much, on average, in 255."""
_SHIFT_OF_HED = 0.2
_BLUR_RADIUS = 6


def sample_by_tensors(
    data: tf.Tensor,
    choices: dict[str, tf.Tensor],
    fields: tf.Tensor,
    noise: tf.Tensor,
    crop: int,
    normalization: NormalizationOptions,
    options: AugmentOptions,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Image and labels of a crop of a record. `fields` is 3 x 3 x 2, `noise` crop x crop x 3."""
    features = {name: tf.io.FixedLenFeature([], tf.string) for name in ("image", "labels")}
    example = tf.io.parse_single_example(data, features)
    image = tf.io.decode_png(example["image"], channels=3)
    normal = tf.numpy_function(lambda pixels: normalize(pixels, normalization), [image], tf.uint8)
    image = tf.ensure_shape(normal, image.shape)
    labels = tf.cast(tf.io.decode_png(example["labels"], channels=1, dtype=tf.uint16), tf.int32)
    return changed_by_tensors(image, labels, choices, fields, noise, crop, options)


def changed_by_tensors(
    image: tf.Tensor,
    labels: tf.Tensor,
    choices: dict[str, tf.Tensor],
    fields: tf.Tensor,
    noise: tf.Tensor,
    crop: int,
    options: AugmentOptions,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The same of an image, H x W x 3, and its labels, H x W x 1, in memory."""
    image, labels = _crop(image, labels, choices, crop, options.scale)
    if options.flips:
        image, labels = _turn(image, choices), _turn(labels, choices)
    return _change_colours(image, choices, fields, noise, options), labels[..., 0]


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
    image: tf.Tensor, choices: dict[str, tf.Tensor], fields: tf.Tensor, noise: tf.Tensor, options: AugmentOptions
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
        image = _shaded(image, options.shading * choices["shading"], fields)
    if options.blur:
        sigma = 0.5 + (options.blur_sigma - 0.5) * choices["sigma"]
        image = tf.cond(choices["blur"] < options.blur, lambda: _blurred(image, sigma), lambda: image)
    if options.noise:
        strength = _FULL_RANGE * options.noise * choices["noise"]
        image += strength * noise
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


def _shaded(image: tf.Tensor, strength: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Multiply by one smooth field and add another, as uneven illumination and background do."""
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
