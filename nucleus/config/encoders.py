"""The names of the encoders; `nucleus.model.encoders` says what they are."""

from typing import Literal, get_args

__all__ = ["ENCODER_NAMES", "WITHOUT_IMAGENET", "EncoderName"]

EncoderName = Literal["mobilenet_v2", "efficientnet_v2_b0", "plain"]

ENCODER_NAMES: tuple[EncoderName, ...] = get_args(EncoderName)

WITHOUT_IMAGENET: frozenset[EncoderName] = frozenset({"plain"})
"""Encoders for which nobody publishes weights."""
