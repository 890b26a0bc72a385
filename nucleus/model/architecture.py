"""What a network is, as data: the content of `model.json`, from which the network is rebuilt."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from nucleus.config.encoders import EncoderName
from nucleus.config.recipe import STRIDE, Recipe
from nucleus.errors import ModelError
from nucleus.storage.documents import read_document

__all__ = [
    "CLASSES",
    "MODEL_FORMAT",
    "InstanceSettings",
    "ModelConfig",
    "config_of_recipe",
    "read_model_config",
]

MODEL_FORMAT = 1
CLASSES = ("background", "body", "border")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InstanceSettings(_Frozen):
    """How labels are made from probabilities; see `nucleus.predict.instances`.

    Attributes:
        seed_threshold: Pixels whose probability of body is above this form the seeds.
        mask_threshold: Pixels whose probability of body or border is above this belong to nuclei.
        min_seed_area: Smaller seeds are dropped, px.
        min_area: Smaller nuclei are dropped, px.
    """

    seed_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    mask_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    min_seed_area: Annotated[int, Field(ge=0)] = 8
    min_area: Annotated[int, Field(ge=0)] = 20


class ModelConfig(_Frozen):
    """A U-Net and how it is used.

    Attributes:
        format: Of this file.
        architecture: The only one there is.
        encoder: Name of the encoder.
        decoder_channels: Channels of the decoder's five levels.
        classes: What the output channels are, in order.
        tile: Side of a tile in prediction, px.
        overlap: Pixels that neighbouring tiles share.
        instances: How labels are made.
    """

    format: int = MODEL_FORMAT
    architecture: Literal["unet"] = "unet"
    encoder: EncoderName
    decoder_channels: Annotated[list[Annotated[int, Field(ge=8, le=4096)]], Field(min_length=5, max_length=5)]
    classes: list[str] = list(CLASSES)
    tile: Annotated[int, Field(ge=2 * STRIDE, le=4096, multiple_of=STRIDE)]
    overlap: Annotated[int, Field(ge=0)]
    instances: InstanceSettings = InstanceSettings()


def config_of_recipe(recipe: Recipe) -> ModelConfig:
    """The network that a recipe asks for."""
    return ModelConfig(
        encoder=recipe.network.encoder,
        decoder_channels=recipe.network.decoder_channels,
        tile=recipe.input.tile,
        overlap=recipe.input.overlap,
    )


def read_model_config(data: bytes, where: str) -> ModelConfig:
    """Parse `model.json`. Raises `ModelError` if it is damaged or newer than this package."""
    return read_document(
        ModelConfig, data, what="a network's configuration", where=where, newest=MODEL_FORMAT, error=ModelError
    )
