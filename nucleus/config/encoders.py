"""The names of the encoders, and what is known of weights for them; `nucleus.model.encoders` says what they are."""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = [
    "ENCODER_FACTS",
    "ENCODER_NAMES",
    "IMAGENET_TERMS",
    "KNOWN_WEIGHTS",
    "WITHOUT_IMAGENET",
    "EncoderFacts",
    "EncoderName",
]

EncoderName = Literal["mobilenet_v2", "efficientnet_v2_b0", "plain"]

ENCODER_NAMES: tuple[EncoderName, ...] = get_args(EncoderName)


@dataclass(frozen=True)
class EncoderFacts:
    """What a model card says of an encoder.

    Attributes:
        title: Its name in the literature.
        paper: Where it is described.
        weights_license: Licence of its ImageNet weights as Keras Applications ships them; None if there are none.
        stated_by: Whence that is known.
    """

    title: str
    paper: str
    weights_license: str | None = None
    stated_by: str = ""


ENCODER_FACTS: dict[EncoderName, EncoderFacts] = {
    "mobilenet_v2": EncoderFacts(
        "MobileNetV2",
        "Sandler et al. 2018, https://arxiv.org/abs/1801.04381",
        "Apache-2.0",
        "the documentation of Keras Applications says so of them, which are Google's (https://github.com/tensorflow/models)",
    ),
    "efficientnet_v2_b0": EncoderFacts(
        "EfficientNetV2-B0",
        "Tan & Le 2021, https://arxiv.org/abs/2104.00298",
        "Apache-2.0",
        "the licence of the repository that published them (https://github.com/google/automl); the documentation of "
        "Keras Applications states none",
    ),
    "plain": EncoderFacts(
        "two plain convolutions a level", "Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597"
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
"""SHA-256 of files that are known to hold the ImageNet weights of an encoder."""

WITHOUT_IMAGENET: frozenset[EncoderName] = frozenset(
    name for name, facts in ENCODER_FACTS.items() if facts.weights_license is None
)
"""Encoders for which nobody publishes weights."""
