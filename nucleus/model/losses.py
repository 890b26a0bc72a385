"""The loss of one image, so that the loss of a batch is a plain mean over images on any number of workers."""

import tensorflow as tf

from nucleus.config.recipe import Heads, LossOptions
from nucleus.model.targets import distance_targets, pixel_classes

__all__ = ["image_losses"]

_SMOOTH = 1.0


def image_losses(logits: tf.Tensor, labels: tf.Tensor, heads: Heads, options: LossOptions) -> tf.Tensor:
    """The loss of each image: that of the classes plus that of the distance, as far as the heads have them.

    Classes: mean over pixels of w(c) * -log p(c), with w = 1, 1, border_weight for background, body and border (for
    `distance`, two classes of weight 1), plus `dice` times the soft Dice loss (Milletari et al. 2016,
    https://arxiv.org/abs/1606.04797): 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), mean over the classes but
    background. Distance t: `distance` times the mean over pixels of -t log p - (1 - t) log(1 - p), less its smallest
    possible value, which p = t has (so 0 is perfect; the gradient is the same).

    Args:
        logits: N x H x W x C, float32; C as `nucleus.model.heads` says.
        labels: N x H x W, integers, 0 background.
        heads: What the channels are.
        options: Weights of the terms.

    Returns:
        N losses, float32.
    """
    if heads == "distance":
        nucleus = tf.cast(labels > 0, tf.float32)[..., tf.newaxis]
        entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=nucleus, logits=logits[..., :1])
        classes = tf.reduce_mean(entropy, axis=(1, 2, 3)) + options.dice * _dice(tf.sigmoid(logits[..., :1]), nucleus)
    else:
        classes = _class_losses(logits[..., :3], pixel_classes(labels), options)
    if heads == "border":
        return classes
    return classes + options.distance * _distance_losses(logits[..., -1], distance_targets(labels))


def _class_losses(logits: tf.Tensor, classes: tf.Tensor, options: LossOptions) -> tf.Tensor:
    weights = tf.gather(tf.constant([1.0, 1.0, options.border_weight]), classes)
    entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=classes, logits=logits)
    cross_entropy = tf.reduce_mean(weights * entropy, axis=(1, 2))
    truth = tf.one_hot(classes, 3, dtype=tf.float32)[..., 1:]
    return cross_entropy + options.dice * _dice(tf.nn.softmax(logits)[..., 1:], truth)


def _dice(probabilities: tf.Tensor, truth: tf.Tensor) -> tf.Tensor:
    overlap = tf.reduce_sum(probabilities * truth, axis=(1, 2))
    total = tf.reduce_sum(probabilities + truth, axis=(1, 2))
    return tf.reduce_mean(1 - (2 * overlap + _SMOOTH) / (total + _SMOOTH), axis=1)


def _distance_losses(logits: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=target, logits=logits)
    smallest = tf.math.xlogy(target, target) + tf.math.xlogy(1 - target, 1 - target)
    return tf.reduce_mean(entropy + smallest, axis=(1, 2))
