"""What is told of the crops that are trained on, besides their loss, from the logits that the step has anyway."""

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from nucleus.config.recipe import Heads
from nucleus.model.heads import mask_of_logits

__all__ = ["NOTHING", "Measure", "mask_measure"]


@dataclass(frozen=True)
class Measure:
    """Scores of images.

    Attributes:
        names: Of the scores.
        of: From logits and labels (N x H x W) to N x scores, float64.
    """

    names: tuple[str, ...]
    of: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


NOTHING = Measure((), lambda logits, _: tf.zeros([tf.shape(logits)[0], 0], tf.float64))


def mask_measure(heads: Heads) -> Measure:
    """IoU, Dice and accuracy of the nucleus mask, as `nucleus.metrics.pixels` defines them.

    The mask is where a nucleus is more probable than the ground: thresholds are tuned only after training.
    """

    def of(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        truth, found = labels > 0, mask_of_logits(logits, heads)
        both, either, right = (
            tf.reduce_sum(tf.cast(pixels, tf.float64), axis=(1, 2))
            for pixels in (truth & found, truth | found, tf.equal(truth, found))
        )
        iou = tf.where(either > 0, both / tf.maximum(either, 1.0), 1.0)
        accuracy = right / tf.cast(tf.reduce_prod(tf.shape(labels)[1:]), tf.float64)
        return tf.stack([iou, 2 * iou / (1 + iou), accuracy], axis=1)

    return Measure(("iou", "dice", "accuracy"), of)
