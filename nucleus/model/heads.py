"""Output channels of the network, by the heads that a recipe chooses, and the two maps from which labels are made.

- `border`: softmax over background, body and border (Caicedo et al. 2019, https://doi.org/10.1002/cyto.a.23863).
- `distance`: sigmoid of nucleus, and sigmoid of the distance to the nucleus's edge, relative to its maximum over the
  nucleus (after Schmidt et al. 2018, https://arxiv.org/abs/1806.03535).
- `both`: the three classes and the distance.

All give the same two maps, from which `nucleus.model.instances` makes labels: `mask`, the probability that a pixel is
in a nucleus, and `interior`, high in the middle of nuclei and low between touching ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import Heads
from nucleus.lazy import tf

__all__ = ["Maps", "activations", "logits_of", "maps_of", "mask_of_logits"]

_SMALLEST = 1e-7


@dataclass(frozen=True)
class Maps:
    """The two maps from which labels are made.

    Attributes:
        mask: H x W, float32, 0 to 1: probability that a pixel is in a nucleus.
        interior: H x W, float32, 0 to 1: high in the middle of a nucleus.
    """

    mask: NDArray[np.float32]
    interior: NDArray[np.float32]


def activations(logits: tf.Tensor, heads: Heads) -> tf.Tensor:
    """Return the values of each channel, 0 to 1 (N x H x W x C), from the network's logits."""
    if heads == "distance":
        return tf.sigmoid(logits)
    classes = tf.nn.softmax(logits[..., :3])
    return classes if heads == "border" else tf.concat([classes, tf.sigmoid(logits[..., 3:])], axis=-1)


def mask_of_logits(logits: tf.Tensor, heads: Heads) -> tf.Tensor:
    """Return where a nucleus is more probable than the background: N x H x W, bool, from logits (N x H x W x C)."""
    if heads == "distance":
        return logits[..., 0] > 0
    return tf.reduce_logsumexp(logits[..., 1:3], axis=-1) > logits[..., 0]


def logits_of(values: NDArray[np.float32], heads: Heads) -> tf.Tensor:
    """Return logits (N x H x W x C) whose activations are `values`, clipped away from 0 and 1."""
    clipped = tf.clip_by_value(tf.constant(values), _SMALLEST, 1 - _SMALLEST)
    sigmoids = tf.math.log(clipped) - tf.math.log1p(-clipped)
    if heads == "distance":
        return sigmoids
    classes = tf.math.log(clipped[..., :3])
    return tf.concat([classes, sigmoids[..., 3:]], axis=-1)


def maps_of(values: NDArray[Any], heads: Heads) -> Maps:
    """Return the two maps from activations (H x W x C)."""
    if heads == "distance":
        return Maps(values[..., 0], values[..., 1])
    mask = 1 - values[..., 0]
    return Maps(mask, values[..., 1] if heads == "border" else (values[..., 1] + values[..., 3]) / 2)
