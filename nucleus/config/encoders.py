"""Encoders: how each is built, which layers the U-Net uses, and the licence of its ImageNet weights.

To add an encoder, add its name to `EncoderName` and an entry to `ENCODERS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from nucleus.lazy import keras

__all__ = [
    "ENCODERS",
    "ENCODER_NAMES",
    "IMAGENET_TERMS",
    "KNOWN_WEIGHTS",
    "WITHOUT_IMAGENET",
    "Encoder",
    "EncoderName",
    "build_encoder",
]

EncoderName = Literal["mobilenet_v2", "efficientnet_v2_b0", "plain"]

ENCODER_NAMES: tuple[EncoderName, ...] = get_args(EncoderName)

_PLAIN_CHANNELS = (16, 32, 64, 128, 128)


@dataclass(frozen=True)
class Encoder:
    """An encoder, the pretrained half of the U-Net.

    Attributes:
        title: Name in the literature.
        paper: Authors, year and address of the paper.
        application: Function of `keras.applications` that builds it; None for the plain encoder of this module.
        features: Layers whose outputs the decoder uses, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution.
        scale: Factor for the input, which ranges from 0 to 255.
        offset: Added after the scaling.
        layout: SHA-256 of the names, shapes and types of the arrays in its `.weights.h5` (`nucleus.registry`); without
            it, a file is checked by loading it, which takes TensorFlow.
        weights_license: Licence of the ImageNet weights that Keras Applications provides; None if there are none.
        license_source: Where the licence is stated.
    """

    title: str
    paper: str
    application: str | None
    features: tuple[str, str, str, str, str]
    scale: float
    offset: float
    layout: str | None = None
    weights_license: str | None = None
    license_source: str = ""

    def build(self, **arguments: Any) -> keras.Model:
        """Build the network. Takes the arguments of the functions in `keras.applications`."""
        if self.application is None:
            return _plain(**arguments)
        return getattr(keras.applications, self.application)(**arguments)


ENCODERS: dict[EncoderName, Encoder] = {
    "mobilenet_v2": Encoder(
        title="MobileNetV2",
        paper="Sandler et al. 2018, https://arxiv.org/abs/1801.04381",
        application="MobileNetV2",
        features=(
            "block_1_expand_relu",
            "block_3_expand_relu",
            "block_6_expand_relu",
            "block_13_expand_relu",
            "out_relu",
        ),
        scale=1 / 127.5,
        offset=-1.0,
        layout="da96398372ac2d3cfb8aee4b34c76b9961b89f2b7789b6b1d1b515b9398bde9c",
        weights_license="Apache-2.0",
        license_source="as the documentation of Keras Applications states of these weights, published by Google "
        "(https://github.com/tensorflow/models)",
    ),
    "efficientnet_v2_b0": Encoder(  # its first layer scales the input
        title="EfficientNetV2-B0",
        paper="Tan & Le 2021, https://arxiv.org/abs/2104.00298",
        application="EfficientNetV2B0",
        features=(
            "block1a_project_activation",
            "block2b_add",
            "block3b_add",
            "block5e_add",
            "top_activation",
        ),
        scale=1.0,
        offset=0.0,
        layout="4ad5e0182f16a13b19d5bd30a3f20a36bf726d2747856c1362d09c8316f4c37f",
        weights_license="Apache-2.0",
        license_source="the licence of the repository that published them (https://github.com/google/automl); the "
        "documentation of Keras Applications states none",
    ),
    "plain": Encoder(  # small, and quick to build
        title="two plain convolutions per level",
        paper="Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597",
        application=None,
        features=("level_1b", "level_2b", "level_3b", "level_4b", "level_5b"),
        scale=1 / 127.5,
        offset=-1.0,
        layout="ca5024ff032757998256be583cbdcfbd81660ea40e206a1d01b08d52c465ccd9",
    ),
}

IMAGENET_TERMS = (
    "They were trained on ImageNet, whose terms give access to its images for non-commercial research and education "
    "only (https://www.image-net.org/download.php); whether that extends to weights trained on them is not settled."
)

KNOWN_WEIGHTS: dict[str, EncoderName] = {
    # Google's mobilenet_v2_1.0_224, converted layer by layer, BatchNorm folded into the kernels
    "549d14c8475565819af42bc9a2f26af1cb1f305410d40c9fe3770f0807d389a7": "mobilenet_v2",
}
"""SHA-256 of files that contain the ImageNet weights of an encoder."""

WITHOUT_IMAGENET: frozenset[EncoderName] = frozenset(
    name for name, encoder in ENCODERS.items() if encoder.weights_license is None
)
"""Encoders without published ImageNet weights."""


def build_encoder(name: EncoderName) -> keras.Model:
    """Build an encoder with random weights: preprocessed images, N x H x W x 3, to the last features.

    Dropout is turned off, because its random numbers would depend on the number of workers.
    """
    image = keras.Input((None, None, 3), name="preprocessed")  # without a name, saved files would differ by a counter
    built = ENCODERS[name].build(input_tensor=image, include_top=False, weights=None)
    encoder = keras.Model(image, built.output)  # `built` expects its input in a list
    for layer in encoder.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return encoder


def _plain(*, input_tensor: Any, **_no_choice: Any) -> keras.Model:
    """Two convolutions per level, as in the U-Net paper, the first of stride 2, with BatchNorm for calibration."""
    x = input_tensor
    for level, channels in enumerate(_PLAIN_CHANNELS, start=1):
        for part, stride in (("a", 2), ("b", 1)):
            name = f"level_{level}{part}"
            x = keras.layers.Conv2D(
                channels, 3, stride, "same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv"
            )(x)
            x = keras.layers.BatchNormalization(name=f"{name}_norm")(x)
            x = keras.layers.ReLU(name=name)(x)
    return keras.Model(input_tensor, x)
