"""U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) on the features of an encoder, and its weights.

The files, `model.json` and `model.weights.h5`, cannot contain code.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.config.encoders import ENCODERS, build_encoder
from nucleus.config.recipe import Decoder
from nucleus.errors import ModelError, WeightsError
from nucleus.lazy import keras, tf
from nucleus.model.architecture import CONFIG_FILE, WEIGHTS_FILE, ModelConfig, read_model_config

__all__ = [
    "build_unet",
    "calibrate_encoder",
    "decoder_variables",
    "encoder_of",
    "encoder_variables",
    "load_encoder_weights",
    "load_model",
    "load_weights",
]

_STEM_CHANNELS = 16


@cache
def _traceable_upsampling() -> type[keras.layers.UpSampling2D]:
    """Return a replacement of Keras's layer, which (3.15, bilinear) cannot be traced for unknown heights and widths."""

    class UpSampling2D(keras.layers.UpSampling2D):
        def call(self, inputs: Any) -> Any:
            """Upsample N x H x W x C to N x 2H x 2W x C."""
            shape = tf.shape(inputs)
            return tf.cast(tf.image.resize(inputs, (2 * shape[1], 2 * shape[2])), inputs.dtype)

    return UpSampling2D


def build_unet(config: ModelConfig, upsampling: type[keras.layers.UpSampling2D] | None = None) -> keras.Model:
    """Build the network with random weights.

    The input is N x H x W x 3, RGB from 0 to 255, H and W multiples of 32. The output is N x H x W x channels, float32,
    the logits described in `nucleus.model.architecture`.

    Each decoder level upsamples, joins the encoder's features and applies two separable convolutions. They are joined
    by concatenation, or by a sum (Lin et al. 2017, https://arxiv.org/abs/1612.03144), for which both are mapped to the
    level's channels first, so that the convolutions at high resolution have a fraction of the channels.

    The decoder has no normalization layer, and the encoder's BatchNorm always uses its stored statistics. Hence no
    pixel depends on other images of the batch (any number of workers computes the same), nor on pixels outside its
    receptive field (tiles agree; except with squeeze-and-excitation, as in EfficientNet, which averages over the whole
    tile).

    Args:
        config: Configuration of the network.
        upsampling: `keras.layers.UpSampling2D` for a network that Keras loads without this package; by default, a
            replacement that can be traced for any height and width.
    """
    upsampling = upsampling or _traceable_upsampling()
    spec = ENCODERS[config.encoder]
    base = build_encoder(config.encoder)
    features = [base.get_layer(name).output for name in spec.features]
    encoder = keras.Model(base.inputs[0], features, name="encoder")
    _freeze_batch_norm(encoder)

    image = keras.Input((None, None, 3), name="image")
    scaled = keras.layers.Rescaling(spec.scale, spec.offset, name="preprocess")(image)
    *skips, x = encoder(scaled)
    stem = keras.layers.Conv2D(_STEM_CHANNELS, 3, padding="same", activation="relu", name="stem")(scaled)
    for level, (skip, channels) in enumerate(
        zip([*reversed(skips), stem], config.decoder_channels, strict=True), start=1
    ):
        x = _joined(x, skip, level, channels, config.decoder, upsampling)
        for part in ("a", "b"):
            x = keras.layers.SeparableConv2D(
                channels,
                3,
                padding="same",
                activation="relu",
                depthwise_initializer=keras.initializers.RandomNormal(stddev=1 / 3),  # 9 taps: preserves the variance
                pointwise_initializer="he_normal",
                name=f"conv_{level}{part}",
            )(x)
    # float32 even with mixed precision, because the loss needs the range.
    logits = keras.layers.Conv2D(len(config.channels), 1, dtype="float32", name="logits")(x)
    return keras.Model(image, logits, name="unet")


def _joined(
    x: Any, skip: Any, level: int, channels: int, decoder: Decoder, upsampling: type[keras.layers.UpSampling2D]
) -> Any:
    """Upsample the level below and join it with the encoder's features."""
    up = upsampling(2, interpolation="bilinear", name=f"up_{level}")
    if decoder == "concat":
        return keras.layers.Concatenate(name=f"join_{level}")([up(x), skip])
    # Before upsampling, with a quarter of the pixels: both are linear, so their order does not matter.
    below, beside = (
        keras.layers.Conv2D(
            channels,
            1,
            kernel_initializer=keras.initializers.VarianceScaling(0.5),  # the sum preserves the variance
            name=f"{name}_{level}",
        )
        for name in ("below", "beside")
    )
    return keras.layers.Add(name=f"join_{level}")([up(below(x)), beside(skip)])


def encoder_of(model: keras.Model) -> keras.Model:
    """Return the encoder of a network made by `build_unet`."""
    return model.get_layer("encoder")


def encoder_variables(model: keras.Model) -> list[keras.Variable]:
    """Return the trainable variables of the encoder: all except those of BatchNorm."""
    return list(encoder_of(model).trainable_variables)


def decoder_variables(model: keras.Model) -> list[keras.Variable]:
    """Return the trainable variables outside the encoder."""
    encoder = {variable.path for variable in encoder_variables(model)}
    return [variable for variable in model.trainable_variables if variable.path not in encoder]


def calibrate_encoder(model: keras.Model, images: NDArray[np.uint8]) -> None:
    """Set the BatchNorm statistics of an encoder without pretrained weights from a batch of images.

    With the default statistics (mean 0, variance 1) the activations of a random network vanish from layer to layer. A
    pass that normalizes each layer by the batch gives them unit variance (data-dependent initialization, Mishkin &
    Matas 2016, https://arxiv.org/abs/1511.06422).

    Args:
        model: A network made by `build_unet`.
        images: N x H x W x 3, H and W multiples of 32.
    """
    encoder = encoder_of(model)
    norms = [layer for layer in encoder.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.trainable = True  # a frozen layer ignores training=True
        layer.momentum = 0.0
    encoder(model.get_layer("preprocess")(images.astype(np.float32)), training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    _freeze_batch_norm(encoder)


def _freeze_batch_norm(encoder: keras.Model) -> None:
    """Freeze the BatchNorm layers of an encoder, even if the encoder is trained.

    A BatchNorm layer that is not trainable uses its stored statistics for any value of `training`. Passing
    `training=False` to the encoder would not suffice: Keras 3 replaces it by the `training` of the outer call, and each
    batch would be normalized by its own statistics, which depend on the number of workers.
    """
    for layer in encoder.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False


def load_model(folder: Path) -> tuple[keras.Model, ModelConfig]:
    """Rebuild a network from its folder, with this package's own code.

    Raises:
        ModelError: This version cannot read the configuration, or the weights do not fit it.
    """
    path = folder / CONFIG_FILE
    config = read_model_config(path.read_bytes(), str(path))
    model = build_unet(config)
    load_weights(model, folder / WEIGHTS_FILE)
    return model, config


def load_weights(model: keras.Model, path: Path) -> None:
    """Load a `.weights.h5` file into a network. Raises `ModelError` if it does not fit."""
    try:
        _load(model, path)
    except Exception as error:  # Keras and HDF5 raise many kinds of errors for damaged files
        raise ModelError(f"Expected weights of this network in {path}; they do not fit: {error}") from error


def load_encoder_weights(encoder: keras.Model, path: Path) -> None:
    """Load encoder weights from a file `.weights.h5` or, in Keras's older format, `.h5`.

    Raises:
        WeightsError: The file is damaged or belongs to another network.
    """
    try:
        _load(encoder, path)
    except Exception as error:
        raise WeightsError(
            f"Expected weights of the encoder in {path}; they do not fit: {error}. "
            "Use the file without the top (include_top=False) of the same network."
        ) from error


def _load(model: keras.Model, path: Path) -> None:
    """Load all weights of a file; weights that Keras would skip with a warning are an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.load_weights(path)
