"""Intensity normalization by percentiles, identical in training and prediction.

Fluorescence images often use a tenth of their intensity range. The values between the `low`-th and the `high`-th
percentile of all channels together are stretched linearly to 0..255, so that colours keep their proportions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.data.images import RgbImage
from nucleus.lazy import tf

__all__ = ["histogram_of", "normalization_table", "normalize", "normalize_tensor"]

_LEVELS = 256


def histogram_of(image: RgbImage) -> NDArray[np.int64]:
    """Return the counts of the values 0 to 255 over all channels; histograms of parts of an image can be added."""
    return np.bincount(image.ravel(), minlength=_LEVELS)


def normalization_table(histogram: NDArray[np.int64], options: NormalizationOptions) -> NDArray[np.uint8]:
    """Return the lookup table from old to new values (256, uint8), from the histogram of the whole image."""
    return np.asarray(_table(tf.constant(histogram, tf.int64), options))


def normalize(image: RgbImage, options: NormalizationOptions) -> RgbImage:
    """Normalize an image (H x W x 3, uint8)."""
    return np.asarray(normalization_table(histogram_of(image), options)[image])


def normalize_tensor(image: tf.Tensor, options: NormalizationOptions) -> tf.Tensor:
    """Normalize an image (H x W x 3, uint8) with TensorFlow operations."""
    if options.method == "none":
        return image
    levels = tf.cast(image, tf.int32)
    histogram = tf.math.bincount(tf.reshape(levels, [-1]), minlength=_LEVELS, maxlength=_LEVELS, dtype=tf.int64)
    return tf.gather(_table(histogram, options), levels)


def _table(histogram: tf.Tensor, options: NormalizationOptions) -> Any:
    """Return the linear table from the low to the high percentile (nearest rank, in integers), clipped and rounded.

    The range is at least `smallest_range`, so that the noise of an empty image is not amplified.
    """
    values = tf.range(_LEVELS, dtype=tf.float32)
    if options.method == "none":
        return tf.cast(values, tf.uint8)
    below = tf.cumsum(histogram)

    def percentile(percent: float) -> tf.Tensor:
        rank = tf.maximum(below[-1] * round(percent * 1000) // 100_000, 1)
        return tf.cast(tf.searchsorted(below, rank[tf.newaxis])[0], tf.float32)

    low, high = percentile(options.low), percentile(options.high)
    scale = 255.0 / tf.maximum(high - low, float(options.smallest_range))
    return tf.cast(tf.round(tf.clip_by_value((values - low) * scale, 0.0, 255.0)), tf.uint8)
