"""The names of the encoders; `nucleus.model.encoders` says what they are."""

from typing import Literal, get_args

__all__ = ["ENCODER_NAMES", "EncoderName"]

EncoderName = Literal["mobilenet_v2", "efficientnet_v2_b0"]

ENCODER_NAMES: tuple[EncoderName, ...] = get_args(EncoderName)
