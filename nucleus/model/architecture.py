"""Files of a model; its configuration (`model.json`, from which it is rebuilt), and what its output channels mean.

- `border`: softmax over background, body and border (Caicedo et al. 2019, https://doi.org/10.1002/cyto.a.23863).
- `distance`: sigmoid of nucleus, and sigmoid of the distance to the nucleus's edge, relative to its maximum over the
  nucleus (after Schmidt et al. 2018, https://arxiv.org/abs/1806.03535).
- `both`: the three classes and the distance.

All give the same two maps, from which `nucleus.model.instances` makes labels: `mask`, the probability that a pixel is
in a nucleus, and `interior`, high in the middle of nuclei and low between touching ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from nucleus.config.encoders import EncoderName
from nucleus.config.recipe import STRIDE, Decoder, Heads, NormalizationOptions, Recipe
from nucleus.errors import ModelError, RecipeError
from nucleus.lazy import tf
from nucleus.storage.files import read_document

__all__ = [
    "CARD_FILE",
    "CHANNELS",
    "CONFIG_FILE",
    "METRICS_FILE",
    "MODEL_FORMAT",
    "ONNX_FILE",
    "ONNX_OPSET",
    "PREVIEW_FILE",
    "WEIGHTS_FILE",
    "InstanceSettings",
    "Maps",
    "ModelConfig",
    "activations",
    "config_of_recipe",
    "maps_of",
    "mask_of_logits",
    "read_model_config",
    "recipe_as_started",
    "recipe_from_start",
]

CONFIG_FILE = "model.json"
WEIGHTS_FILE = "model.weights.h5"
ONNX_FILE = "model.onnx"
ONNX_OPSET = 18
"""The network with its weights, for ONNX Runtime; versions published before 0.4.0 do not have it."""
METRICS_FILE = "metrics.json"
"""Scores of the best weights and metrics of each epoch."""
CARD_FILE = "card.md"
PREVIEW_FILE = "preview.png"

MODEL_FORMAT = 3
_READABLE_SINCE = "0.3.0"
"""Oldest version of this package that reads `MODEL_FORMAT`."""

_START_OPTIMIZER = {"learning_rate": 1e-3, "final_learning_rate": 1e-5, "ema_momentum": 0.97}
"""Options of the optimizer with `network.start`, unless the recipe sets others (docs/guide.md has what they are worth):
what a few steps at a high rate have changed at random is averaged away."""
_OF_START = {
    "network": ("encoder", "decoder", "decoder_channels", "heads"),
    "input": ("normalization", "pixel_size"),
    "optimizer": tuple(_START_OPTIMIZER),
}

CHANNELS: dict[Heads, tuple[str, ...]] = {
    "border": ("background", "body", "border"),
    "distance": ("nucleus", "distance"),
    "both": ("background", "body", "border", "distance"),
}
"""Names of the output channels, in order; `nucleus.model.architecture` describes them."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InstanceSettings(_Frozen):
    """Thresholds for the labels, tuned at the end of a run; see `nucleus.model.instances`.

    Attributes:
        seed_threshold: Pixels of the interior map above this form the seeds.
        mask_threshold: Pixels of the mask map above this belong to nuclei.
        min_seed_area: Minimum area of a seed, px.
        min_area: Minimum area of a nucleus, px.
        min_score: Minimum mean of the mask map over a nucleus.
    """

    seed_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    mask_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    min_seed_area: Annotated[int, Field(ge=0)] = 4
    min_area: Annotated[int, Field(ge=0)] = 20
    min_score: Annotated[float, Field(ge=0, lt=1)] = 0.8

    def scaled(self, factor: float) -> InstanceSettings:
        """Return the settings for an image whose pixels are `factor` times smaller than the network's."""
        areas = {"min_seed_area": self.min_seed_area, "min_area": self.min_area}
        return self.model_copy(update={name: round(area * factor**2) for name, area in areas.items()})


class ModelConfig(_Frozen):
    """A U-Net and its use in prediction.

    Attributes:
        format: Format of this file.
        needs: Oldest version of this package that reads the file.
        architecture: Always `unet`.
        encoder: Name of the encoder.
        decoder_channels: Channels of the five decoder levels.
        decoder: How a decoder level joins its inputs, as in the recipe.
        heads: Outputs of the network.
        normalization: Intensity normalization.
        tile: Largest side of a tile in prediction, px.
        overlap: Minimum overlap of neighbouring tiles, px.
        instances: Thresholds for the labels.
        nucleus_diameter: Median diameter of the nuclei in validation, px; None if unknown.
        diameters: Range of the median diameters of the training images, px (5th to 95th percentile); images whose
            nuclei are smaller or larger are rescaled in prediction. None turns that off.
        lowest_score: Lowest mean score of an image's nuclei in validation, 0 to 1; images below it are flagged. None if
            unknown.
        pixel_size: Pixel size of the training images, micrometres; None if unknown.
    """

    format: int = MODEL_FORMAT
    needs: str = _READABLE_SINCE
    architecture: Literal["unet"] = "unet"
    encoder: EncoderName
    decoder_channels: Annotated[list[Annotated[int, Field(ge=8, le=4096)]], Field(min_length=5, max_length=5)]
    decoder: Decoder = "concat"
    heads: Heads
    normalization: NormalizationOptions
    tile: Annotated[int, Field(ge=2 * STRIDE, le=4096, multiple_of=STRIDE)]
    overlap: Annotated[int, Field(ge=0)]
    instances: InstanceSettings = InstanceSettings()
    nucleus_diameter: Annotated[float, Field(gt=0)] | None = None
    diameters: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    lowest_score: Annotated[float, Field(ge=0, le=1)] | None = None
    pixel_size: Annotated[float, Field(gt=0)] | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the output channels, in order."""
        return CHANNELS[self.heads]


def config_of_recipe(recipe: Recipe) -> ModelConfig:
    """Return the configuration of a recipe's network."""
    return ModelConfig(
        encoder=recipe.network.encoder,
        decoder_channels=recipe.network.decoder_channels,
        decoder=recipe.network.decoder,
        heads=recipe.network.heads,
        normalization=recipe.input.normalization,
        tile=recipe.input.tile,
        overlap=recipe.input.overlap,
        pixel_size=recipe.input.pixel_size,
    )


def recipe_from_start(recipe: Recipe, config: ModelConfig, name: str) -> Recipe:
    """Return a recipe with the network of the version that training starts with.

    Keys of its architecture that are not set become those of the version, and so do normalization and pixel size; the
    learning rates become lower and the weights are averaged, so that what the version has learned is not undone.

    Args:
        recipe: The recipe.
        config: Configuration of the version's network.
        name: Name of the version in error messages.

    Raises:
        RecipeError: A key that is set contradicts the architecture of the version.
    """
    given = recipe.network
    theirs = {key: getattr(config, key) for key in ("encoder", "decoder", "decoder_channels", "heads")}
    wrong = [
        f"network.{key} = {getattr(given, key)!r}, that of {name} is {value!r}"
        for key, value in theirs.items()
        if key in given.model_fields_set and getattr(given, key) != value
    ]
    if wrong:
        raise RecipeError(
            f"Expected the network of {name}, with which training starts; the recipe has {'; '.join(wrong)}. Leave "
            "these keys out, or train without network.start."
        )
    of_input = {"normalization": config.normalization, "pixel_size": config.pixel_size}
    return _with_unset(recipe, {"network": theirs, "input": of_input, "optimizer": _START_OPTIMIZER})


def recipe_as_started(recipe: Recipe, run: Recipe) -> Recipe:
    """Return a recipe with what `recipe_from_start` has set in the recipe of a run, for keys that are not set."""
    values = {name: {key: getattr(getattr(run, name), key) for key in keys} for name, keys in _OF_START.items()}
    return _with_unset(recipe, values)


def _with_unset(recipe: Recipe, values: dict[str, dict[str, Any]]) -> Recipe:
    """Return a recipe with other values (by table, then key) for keys that are not set."""
    changes = {}
    for name, others in values.items():
        table = getattr(recipe, name)
        unset = {key: value for key, value in others.items() if key not in table.model_fields_set}
        changes[name] = table.model_copy(update=unset)
    return recipe.model_copy(update=changes)


def read_model_config(data: bytes, where: str) -> ModelConfig:
    """Parse `model.json`. Raises `ModelError` if it is damaged or of another format."""
    return read_document(
        ModelConfig,
        data,
        what="a network's configuration",
        where=where,
        newest=MODEL_FORMAT,
        error=ModelError,
        oldest=2,
    )


@dataclass(frozen=True)
class Maps:
    """The two maps from which labels are made.

    Attributes:
        mask: H x W, float32, 0 to 1: probability that a pixel is in a nucleus.
        interior: H x W, float32, 0 to 1: high in the middle of a nucleus.
    """

    mask: NDArray[np.float32]
    interior: NDArray[np.float32]


def activations(logits: tf.Tensor, heads: Heads) -> tf.Tensor:
    """Return the values of each channel, 0 to 1 (N x H x W x C), from the network's logits."""
    if heads == "distance":
        return tf.sigmoid(logits)
    classes = tf.nn.softmax(logits[..., :3])
    return classes if heads == "border" else tf.concat([classes, tf.sigmoid(logits[..., 3:])], axis=-1)


def mask_of_logits(logits: tf.Tensor, heads: Heads) -> tf.Tensor:
    """Return where a nucleus is more probable than the background: N x H x W, bool, from logits (N x H x W x C)."""
    if heads == "distance":
        return logits[..., 0] > 0
    return tf.reduce_logsumexp(logits[..., 1:3], axis=-1) > logits[..., 0]


def maps_of(values: NDArray[Any], heads: Heads) -> Maps:
    """Return the two maps from activations (H x W x C)."""
    if heads == "distance":
        return Maps(values[..., 0], values[..., 1])
    mask = 1 - values[..., 0]
    return Maps(mask, values[..., 1] if heads == "border" else (values[..., 1] + values[..., 3]) / 2)
