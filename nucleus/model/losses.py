"""Targets, made from integer labels, and losses: with TensorFlow in training, with NumPy in evaluation.

`image_losses` is what training minimizes; `loss_of_values` is the same for one image whose activations are known, so
that a model can be evaluated without TensorFlow.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import Heads, LossOptions
from nucleus.lazy import tf

__all__ = ["image_losses", "loss_of_values", "pixel_targets"]


_DISTANCE_STEPS = 24
_SMOOTH = 1.0
_CHANNELS: dict[Heads, list[int]] = {"border": [3], "distance": [1, 1], "both": [3, 1]}
"""Channels of the classes, and of the distance."""
_SMALLEST = 1e-7
"""Activations are clipped to this distance from 0 and 1, so that their logarithms are finite."""
_SQUARE = cv2.getStructuringElement(cv2.MORPH_RECT, (3, 3))
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def pixel_targets(labels: NDArray[np.integer], heads: Heads) -> NDArray[np.float32]:
    """Return what the network should say at each pixel of an image: its class and, with a distance head, its distance.

    Class 0 is background, 1 body, 2 border. A pixel of a nucleus is border if any of its eight neighbours has another
    label (another nucleus or background), else body (the inner boundary of Caicedo et al. 2019,
    https://doi.org/10.1002/cyto.a.23863). Hence body and border together are exactly the nuclei, and touching nuclei
    are separated by two pixels of border.

    The distance is the octagonal distance to the nearest pixel of another label (Rosenfeld & Pfaltz 1968,
    https://doi.org/10.1016/0031-3203(68)90013-7: erosions by a cross and a square in turn), at most 24 px, divided by
    its maximum over the nucleus, so that it is 1 in the middle of every nucleus. The edge of the image does not count
    as the edge of a nucleus.

    Made on the CPU by OpenCV: max-pooling in the training step took a third of it.

    Args:
        labels: H x W, integers from 0 (background) to 65,535.
        heads: Outputs of the network.

    Returns:
        H x W x 1 for `border`, else H x W x 2: the class (0, 1, 2) and the distance, 0 in the background, else above 0
        up to 1.
    """
    nucleus, border = _nucleus_and_border(labels)
    classes = (nucleus.view(np.uint8) + border).astype(np.float32)
    if heads == "border":
        return classes[..., np.newaxis]
    return np.asarray(cv2.merge([classes, _distances(labels, nucleus, border)]), np.float32)


def _nucleus_and_border(labels: NDArray[np.integer]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the masks of the nuclei and of their pixels next to another label, H x W."""
    values = labels if labels.dtype == np.uint16 else labels.astype(np.float32)  # exact for integers below 2^24
    nucleus = values > 0
    return nucleus, nucleus & (cv2.dilate(values, _SQUARE) != cv2.erode(values, _SQUARE))


def _distances(
    labels: NDArray[np.integer], nucleus: NDArray[np.bool_], border: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Return the relative distances of `pixel_targets`, H x W."""
    inside = (nucleus & ~border).view(np.uint8)
    distance = nucleus.view(np.uint8) + inside
    for step in range(_DISTANCE_STEPS - 2):
        inside = np.asarray(cv2.erode(inside, _SQUARE if step % 2 else _CROSS), np.uint8)
        if not cv2.countNonZero(inside):
            break
        cv2.add(distance, inside, distance)
    places = np.flatnonzero(nucleus)  # a seventh of the pixels of DSB2018
    label = labels.ravel()[places].astype(np.intp)
    found = distance.ravel()[places].astype(np.float32)
    largest = np.zeros(int(label.max(initial=0)) + 1, np.float32)
    np.maximum.at(largest, label, found)
    relative = np.zeros(labels.shape, np.float32)
    relative.ravel()[places] = found / largest[label]
    return relative


def image_losses(logits: tf.Tensor, targets: tf.Tensor, heads: Heads, options: LossOptions) -> tf.Tensor:
    """Return the loss of each image: the class loss plus the distance loss, depending on the heads.

    Class loss: the mean over pixels of w(c) * -log p(c), with w = 1, 1, border_weight for background, body and border
    (for `distance`, two classes of weight 1), plus `dice` times the soft Dice loss (Milletari et al. 2016,
    https://arxiv.org/abs/1606.04797): 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), averaged over the classes except
    background. Distance loss: `distance` times the mean over pixels of -t log p - (1 - t) log(1 - p) for the target t,
    minus its minimum, which is reached at p = t (so that 0 is perfect; the gradient is the same).

    Args:
        logits: N x H x W x C, float32; the C channels are described in `nucleus.model.architecture`.
        targets: N x H x W x T, float32, by `pixel_targets`.
        heads: Outputs of the network.
        options: Weights of the terms.

    Returns:
        N losses, float32.
    """
    # Channels are cut once, and the background is left out of sums rather than of pixels: each cut at full resolution,
    # and its gradient, costs as much as a convolution of few channels.
    first, *last = tf.split(logits, _CHANNELS[heads], axis=-1)
    if heads == "distance":
        nucleus = tf.cast(targets[..., :1] > 0, tf.float32)
        entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=nucleus, logits=first)
        dice = tf.reduce_mean(_dice(tf.sigmoid(first), nucleus), axis=1)
        classes = tf.reduce_mean(entropy, axis=(1, 2, 3)) + options.dice * dice
    else:
        classes = _class_losses(first, tf.cast(targets[..., 0], tf.int32), options)
    if heads == "border":
        return classes
    return classes + options.distance * _distance_losses(last[0][..., 0], targets[..., 1])


def _class_losses(logits: tf.Tensor, classes: tf.Tensor, options: LossOptions) -> tf.Tensor:
    weights = tf.gather(tf.constant([1.0, 1.0, options.border_weight]), classes)
    entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=classes, logits=logits)
    cross_entropy = tf.reduce_mean(weights * entropy, axis=(1, 2))
    dice = _dice(tf.nn.softmax(logits), tf.one_hot(classes, 3, dtype=tf.float32))
    return cross_entropy + options.dice * tf.reduce_mean(dice[:, 1:], axis=1)


def _dice(probabilities: tf.Tensor, truth: tf.Tensor) -> tf.Tensor:
    """Return the Dice loss of each class, N x classes."""
    overlap = tf.reduce_sum(probabilities * truth, axis=(1, 2))
    total = tf.reduce_sum(probabilities + truth, axis=(1, 2))
    return 1 - (2 * overlap + _SMOOTH) / (total + _SMOOTH)


def _distance_losses(logits: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=target, logits=logits)
    smallest = tf.math.xlogy(target, target) + tf.math.xlogy(1 - target, 1 - target)
    return tf.reduce_mean(entropy + smallest, axis=(1, 2))


def loss_of_values(
    values: NDArray[np.float32], labels: NDArray[np.integer], heads: Heads, options: LossOptions
) -> float:
    """Return the loss of an image, as `image_losses` computes it, from the network's activations.

    Args:
        values: H x W x C, 0 to 1; the C channels are described in `nucleus.model.architecture`.
        labels: H x W, integers from 0 (background) to 65,535.
        heads: Outputs of the network.
        options: Weights of the terms.
    """
    clipped = np.clip(values, _SMALLEST, 1 - _SMALLEST, dtype=np.float64)
    targets = pixel_targets(labels, heads)
    if heads == "distance":
        truth = targets[..., :1] > 0
        entropy = _entropy(clipped[..., :1], truth).mean()
        classes = entropy + options.dice * _dice_of(values[..., :1], truth)
    else:
        classes = _class_loss(clipped[..., :3], targets[..., 0].astype(np.intp), options)
    if heads == "border":
        return float(classes)
    target = targets[..., 1].astype(np.float64)
    smallest = _entropy(np.clip(target, _SMALLEST, 1 - _SMALLEST), target)
    return float(classes + options.distance * (_entropy(clipped[..., -1], target) - smallest).mean())


def _class_loss(probabilities: NDArray[np.float64], classes: NDArray[np.intp], options: LossOptions) -> float:
    truth = np.eye(3)[classes]
    weights = np.array([1.0, 1.0, options.border_weight])[classes]
    total = probabilities.sum(axis=-1, keepdims=True)  # the clipped ones may not sum to one
    entropy = -(truth * np.log(probabilities / total)).sum(axis=-1)
    return float((weights * entropy).mean()) + options.dice * _dice_of(probabilities[..., 1:] / total, truth[..., 1:])


def _dice_of(probabilities: NDArray[np.floating], truth: NDArray[Any]) -> float:
    overlap = (probabilities * truth).sum(axis=(0, 1), dtype=np.float64)
    total = probabilities.sum(axis=(0, 1), dtype=np.float64) + truth.sum(axis=(0, 1), dtype=np.float64)
    return float((1 - (2 * overlap + _SMOOTH) / (total + _SMOOTH)).mean())


def _entropy(probabilities: NDArray[np.float64], target: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(-(target * np.log(probabilities) + (1.0 - target) * np.log1p(-probabilities)))
