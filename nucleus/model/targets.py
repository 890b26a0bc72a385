"""What the network learns: a class for each pixel, from integer labels, in TensorFlow operations."""

from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

__all__ = ["nucleus_mask", "pixel_classes"]


def pixel_classes(labels: tf.Tensor) -> tf.Tensor:
    """Classes of `nucleus.model.architecture.CLASSES` for each pixel.

    A pixel of a nucleus is border if any of its eight neighbours has another label (another nucleus or background),
    else body (the inner boundary of Caicedo et al. 2019, https://doi.org/10.1002/cyto.a.23863). So body and border
    together are exactly the nuclei, and touching nuclei are two pixels of border apart.

    Args:
        labels: N x H x W, integers, 0 background.

    Returns:
        N x H x W, int32: 0 background, 1 body, 2 border.
    """
    values = tf.cast(labels, tf.float32)[..., tf.newaxis]  # exact for integers below 2^24
    highest = tf.nn.max_pool2d(values, 3, 1, "SAME")  # padding never wins: it is minus infinity
    lowest = -tf.nn.max_pool2d(-values, 3, 1, "SAME")
    nucleus = values > 0
    border = nucleus & (highest != lowest)
    classes = tf.cast(nucleus, tf.int32) + tf.cast(border, tf.int32)
    return tf.squeeze(classes, -1)


def nucleus_mask(probabilities: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
    """Pixels (H x W) whose probability of body or border (H x W x 3 with background first) is above `threshold`."""
    return np.asarray(1.0 - probabilities[..., 0] > threshold)
