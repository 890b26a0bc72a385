"""What a network is, as data: the content of `model.json`, from which the network is rebuilt."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from nucleus.config.encoders import EncoderName
from nucleus.config.recipe import STRIDE, Heads, NormalizationOptions, Recipe
from nucleus.errors import ModelError
from nucleus.storage.files import read_document

__all__ = [
    "CHANNELS",
    "MODEL_FORMAT",
    "InstanceSettings",
    "ModelConfig",
    "config_of_recipe",
    "read_model_config",
]

MODEL_FORMAT = 2
_READABLE_SINCE = "0.2.0"
"""The first version of this package that reads `MODEL_FORMAT`."""

CHANNELS: dict[Heads, tuple[str, ...]] = {
    "border": ("background", "body", "border"),
    "distance": ("nucleus", "distance"),
    "both": ("background", "body", "border", "distance"),
}
"""Names of the output channels, in order; `nucleus.model.heads` says what they mean."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InstanceSettings(_Frozen):
    """How labels are made from the network's maps; see `nucleus.model.instances`. Tuned at the end of a run.

    Attributes:
        seed_threshold: Pixels of the interior map above this form the seeds.
        mask_threshold: Pixels of the mask above this belong to nuclei.
        min_seed_area: Smaller seeds are dropped, px.
        min_area: Smaller nuclei are dropped, px.
        min_score: Nuclei over which the mask's mean is below this are dropped.
    """

    seed_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    mask_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    min_seed_area: Annotated[int, Field(ge=0)] = 4
    min_area: Annotated[int, Field(ge=0)] = 20
    min_score: Annotated[float, Field(ge=0, lt=1)] = 0.8

    def scaled(self, factor: float) -> "InstanceSettings":
        """The settings for pixels of which `factor` make one of the network's in length."""
        areas = {"min_seed_area": self.min_seed_area, "min_area": self.min_area}
        return self.model_copy(update={name: round(area * factor**2) for name, area in areas.items()})


class ModelConfig(_Frozen):
    """A U-Net and how it is used.

    Attributes:
        format: Of this file.
        needs: The oldest version of this package that reads it.
        architecture: The only one there is.
        encoder: Name of the encoder.
        decoder_channels: Channels of the decoder's five levels.
        heads: What the output channels are.
        normalization: How images are stretched before the network sees them.
        tile: Side of the largest tile in prediction, px.
        overlap: Pixels that neighbouring tiles share at least.
        instances: How labels are made.
        nucleus_diameter: Median diameter of the nuclei that the network was validated on, px; None if not known.
        pixel_size: Side of a pixel of the training images, micrometres; None if not known.
    """

    format: int = MODEL_FORMAT
    needs: str = _READABLE_SINCE
    architecture: Literal["unet"] = "unet"
    encoder: EncoderName
    decoder_channels: Annotated[list[Annotated[int, Field(ge=8, le=4096)]], Field(min_length=5, max_length=5)]
    heads: Heads
    normalization: NormalizationOptions
    tile: Annotated[int, Field(ge=2 * STRIDE, le=4096, multiple_of=STRIDE)]
    overlap: Annotated[int, Field(ge=0)]
    instances: InstanceSettings = InstanceSettings()
    nucleus_diameter: Annotated[float, Field(gt=0)] | None = None
    pixel_size: Annotated[float, Field(gt=0)] | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the output channels, in order."""
        return CHANNELS[self.heads]


def config_of_recipe(recipe: Recipe) -> ModelConfig:
    """The network that a recipe asks for."""
    return ModelConfig(
        encoder=recipe.network.encoder,
        decoder_channels=recipe.network.decoder_channels,
        heads=recipe.network.heads,
        normalization=recipe.input.normalization,
        tile=recipe.input.tile,
        overlap=recipe.input.overlap,
        pixel_size=recipe.input.pixel_size,
    )


def read_model_config(data: bytes, where: str) -> ModelConfig:
    """Parse `model.json`. Raises `ModelError` if it is damaged or of another format than this package's."""
    return read_document(
        ModelConfig,
        data,
        what="a network's configuration",
        where=where,
        newest=MODEL_FORMAT,
        error=ModelError,
        oldest=2,
    )
