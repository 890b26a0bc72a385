"""The loss of one image, so that the loss of a batch is a plain mean over images on any number of workers."""

import tensorflow as tf

from nucleus.config.recipe import LossOptions

__all__ = ["image_losses"]

_SMOOTH = 1.0


def image_losses(logits: tf.Tensor, classes: tf.Tensor, options: LossOptions) -> tf.Tensor:
    """Weighted cross entropy plus soft Dice, for each image.

    Cross entropy: mean over pixels of w(c) * -log p(c), with w = 1, 1, border_weight. Soft Dice (Milletari et al.
    2016, https://arxiv.org/abs/1606.04797): 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), mean over body and border.

    Args:
        logits: N x H x W x 3, float32.
        classes: N x H x W, int32.
        options: Weights of the terms.

    Returns:
        N losses, float32.
    """
    weights = tf.gather(tf.constant([1.0, 1.0, options.border_weight]), classes)
    entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=classes, logits=logits)
    cross_entropy = tf.reduce_mean(weights * entropy, axis=(1, 2))
    probabilities = tf.nn.softmax(logits)[..., 1:]
    truth = tf.one_hot(classes, 3, dtype=tf.float32)[..., 1:]
    overlap = tf.reduce_sum(probabilities * truth, axis=(1, 2))
    total = tf.reduce_sum(probabilities + truth, axis=(1, 2))
    dice = (2 * overlap + _SMOOTH) / (total + _SMOOTH)
    return cross_entropy + options.dice * tf.reduce_mean(1 - dice, axis=1)
