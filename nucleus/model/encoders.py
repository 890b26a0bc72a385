"""The encoders by name: which `keras.applications` network, and at which layers its features are taken.

To add an encoder, add its name to `nucleus.config.encoders` and an entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from nucleus.config.encoders import EncoderName

__all__ = ["ENCODERS", "EncoderSpec", "build_encoder"]


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder.

    Attributes:
        build: The function of `keras.applications`.
        features: Layers whose outputs are taken, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution.
        scale: Multiplied with the input of 0 to 255.
        offset: Added after that.
    """

    build: Callable[..., Any]
    features: tuple[str, str, str, str, str]
    scale: float
    offset: float


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
}


def build_encoder(name: EncoderName) -> keras.Model:
    """Build an encoder with random weights: N x H x W x 3, preprocessed, to its last features.

    Its dropout is off: the random numbers would depend on the number of workers.
    """
    encoder = ENCODERS[name].build(input_shape=(None, None, 3), include_top=False, weights=None)
    assert isinstance(encoder, keras.Model)
    for layer in encoder.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return encoder
