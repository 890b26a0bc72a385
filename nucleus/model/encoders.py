"""The encoders by name: how each is built, and at which layers its features are taken.

To add an encoder, add its name to `nucleus.config.encoders` and an entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
from keras import layers

from nucleus.config.encoders import EncoderName

__all__ = ["ENCODERS", "EncoderSpec", "build_encoder"]

_PLAIN_CHANNELS = (16, 32, 64, 128, 128)


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder.

    Attributes:
        build: A function of `keras.applications`, or one that takes the same arguments.
        features: Layers whose outputs are taken, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution.
        scale: Multiplied with the input of 0 to 255.
        offset: Added after that.
    """

    build: Callable[..., Any]
    features: tuple[str, str, str, str, str]
    scale: float
    offset: float


def _plain(*, input_tensor: Any, **_no_choice: Any) -> keras.Model:
    """Two convolutions a level, as in the U-Net paper, the first of stride 2; with BatchNorm, to be calibrated."""
    x = input_tensor
    for level, channels in enumerate(_PLAIN_CHANNELS, start=1):
        for part, stride in (("a", 2), ("b", 1)):
            name = f"level_{level}{part}"
            x = layers.Conv2D(
                channels, 3, stride, "same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv"
            )(x)
            x = layers.BatchNormalization(name=f"{name}_norm")(x)
            x = layers.ReLU(name=name)(x)
    return keras.Model(input_tensor, x)


ENCODERS: dict[EncoderName, EncoderSpec] = {
    # Sandler et al. 2018, https://arxiv.org/abs/1801.04381
    "mobilenet_v2": EncoderSpec(
        keras.applications.MobileNetV2,
        (
            "block_1_expand_relu",
            "block_3_expand_relu",
            "block_6_expand_relu",
            "block_13_expand_relu",
            "out_relu",
        ),
        scale=1 / 127.5,
        offset=-1.0,
    ),
    # Tan & Le 2021, https://arxiv.org/abs/2104.00298; scales its input itself
    "efficientnet_v2_b0": EncoderSpec(
        keras.applications.EfficientNetV2B0,
        (
            "block1a_project_activation",
            "block2b_add",
            "block3b_add",
            "block5e_add",
            "top_activation",
        ),
        scale=1.0,
        offset=0.0,
    ),
    # Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597; small, and quick to build
    "plain": EncoderSpec(
        _plain,
        ("level_1b", "level_2b", "level_3b", "level_4b", "level_5b"),
        scale=1 / 127.5,
        offset=-1.0,
    ),
}


def build_encoder(name: EncoderName) -> keras.Model:
    """Build an encoder with random weights: N x H x W x 3, preprocessed, to its last features.

    Its dropout is off: the random numbers would depend on the number of workers.
    """
    image = keras.Input((None, None, 3), name="preprocessed")  # named, or saved files would differ by a counter
    built = ENCODERS[name].build(input_tensor=image, include_top=False, weights=None)
    encoder = keras.Model(image, built.output)  # the built one wants its input in a list
    for layer in encoder.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return encoder
