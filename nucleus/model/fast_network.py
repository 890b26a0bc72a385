"""The network as training computes it: the same function of the same variables as `build_unet`, by cheaper operations.

- Concatenations are not made. A separable convolution treats each channel alone and then adds up, so that of two joined
  inputs is the sum of two. Neither copies nor, for features of a frozen encoder, gradients of the inputs are computed.
- The BatchNorm layers of the encoder have fixed statistics, so they are folded into the kernel and the bias of the
  convolution before them (Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3.2), in each step anew: weights
  that are saved, averaged or published keep their form.

Both change only the order of sums. Prediction and export use the network itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from nucleus.lazy import keras, tf
from nucleus.model.unet import encoder_of

__all__ = ["fast_network"]


def fast_network(model: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return the function of a network of `build_unet`, for the graph of a training step.

    The function maps images, N x H x W x 3, float32, 0 to 255, to logits, N x H x W x channels, float32, and uses the
    current weights. In float32 both agree up to rounding. Gradients with respect to all trainable variables are those
    of the network.
    """
    layers = {layer.name: layer for layer in model.layers}
    encoder = _folded(encoder_of(model))

    def network(images: tf.Tensor) -> tf.Tensor:
        scaled = layers["preprocess"](images)
        *skips, x = encoder(scaled)
        for level, skip in enumerate([*reversed(skips), layers["stem"](scaled)], start=1):
            up = layers[f"up_{level}"]
            if f"below_{level}" in layers:
                parts = [layers[f"join_{level}"]([up(layers[f"below_{level}"](x)), layers[f"beside_{level}"](skip)])]
            else:
                parts = [up(x), skip]
            for part in ("a", "b"):
                conv = layers[f"conv_{level}{part}"]
                with tf.name_scope(conv.name):  # as Keras does; profiles show it
                    x = _separable(conv, parts)
                parts = [x]
        return layers["logits"](x)

    return network


def _separable(layer: keras.layers.SeparableConv2D, parts: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return a separable convolution of several inputs as if they were joined along their channels."""
    channels = [part.shape[-1] for part in parts]
    depthwise = tf.split(_as(parts[0], layer.depthwise_kernel), channels, axis=2)
    pointwise = tf.split(_as(parts[0], layer.pointwise_kernel), channels, axis=2)
    found = [
        tf.nn.conv2d(tf.nn.depthwise_conv2d(part, deep, (1, 1, 1, 1), "SAME"), wide, 1, "SAME")
        for part, deep, wide in zip(parts, depthwise, pointwise, strict=True)
    ]
    return layer.activation(tf.nn.bias_add(tf.add_n(found), _as(parts[0], layer.bias)))


def _as(like: tf.Tensor, variable: keras.Variable) -> tf.Tensor:
    """Return the value of a variable in the precision of the computation."""
    return tf.cast(variable.value, like.dtype)


def _folded(encoder: keras.Model) -> Callable[[tf.Tensor], list[tf.Tensor]]:
    """Return the function of an encoder, from preprocessed images to its features, with BatchNorm folded."""
    norms = _foldable(encoder)
    folded = {id(norm) for norm in norms.values()}

    def features(scaled: tf.Tensor) -> list[tf.Tensor]:
        values = {id(encoder.inputs[0]): scaled}
        for layer in encoder.layers:
            if isinstance(layer, keras.layers.InputLayer) or id(layer) in folded:
                continue
            given = keras.tree.map_structure(lambda tensor: values[id(tensor)], layer.input)
            norm = norms.get(id(layer))
            if norm is None:
                values[id(layer.output)] = layer(given)
            else:
                with tf.name_scope(layer.name):
                    values[id(norm.output)] = _convolution(layer, norm, given)
        return [values[id(output)] for output in encoder.outputs]

    return features


def _foldable(encoder: keras.Model) -> dict[int, keras.layers.BatchNormalization]:
    """Return the BatchNorm layer of each convolution that is read by nothing else, by the convolution's `id`."""
    readers = Counter(id(output) for output in encoder.outputs)
    readers.update(id(tensor) for layer in encoder.layers for tensor in keras.tree.flatten(layer.input))
    norms = {
        id(layer.input): layer
        for layer in encoder.layers
        if isinstance(layer, keras.layers.BatchNormalization) and layer.scale and layer.center
    }
    return {
        id(layer): norms[id(layer.output)]
        for layer in encoder.layers
        if _is_plain(layer) and readers[id(layer.output)] == 1 and id(layer.output) in norms
    }


def _is_plain(layer: Any) -> bool:
    """Return whether a layer is a convolution that `_convolution` computes; others are left as they are."""
    if type(layer) not in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D):
        return False
    once = getattr(layer, "depth_multiplier", 1) == 1
    return once and layer.activation is keras.activations.linear and layer.dilation_rate == (1, 1)


def _convolution(layer: Any, norm: keras.layers.BatchNormalization, x: tf.Tensor) -> tf.Tensor:
    """Return the output of a BatchNorm layer with fixed statistics from the input of the convolution before it."""
    scale = norm.gamma.value * tf.math.rsqrt(norm.moving_variance.value + norm.epsilon)
    bias = norm.beta.value - norm.moving_mean.value * scale
    if layer.use_bias:
        bias += layer.bias.value * scale
    strides, padding = (1, *layer.strides, 1), layer.padding.upper()
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        kernel = tf.cast(layer.kernel.value * scale[:, tf.newaxis], x.dtype)
        found = tf.nn.depthwise_conv2d(x, kernel, strides, padding)
    else:
        found = tf.nn.conv2d(x, tf.cast(layer.kernel.value * scale, x.dtype), strides, padding)
    return tf.nn.bias_add(found, tf.cast(bias, x.dtype))
