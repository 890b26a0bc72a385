"""`Model`: a network with its settings, which segments images; `Segmentation`: the nuclei of one image."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nucleus.config.recipe import LossOptions
from nucleus.data.images import RgbImage
from nucleus.errors import ImageError, ModelError
from nucleus.lazy import pandas
from nucleus.model.architecture import InstanceSettings, ModelConfig
from nucleus.model.heads import maps_of
from nucleus.model.instances import label_nuclei
from nucleus.model.tiling import Region, TiledNetwork
from nucleus.model.weight_files import load_model
from nucleus.pictures import draw_outlines
from nucleus.predict.blocks import (
    AssembledLabels,
    Block,
    LabelledBlock,
    cuts_nuclei,
    nuclei_of_block,
    plan_blocks,
)
from nucleus.predict.measurement import frame_of, measure_blocks, nucleus_columns
from nucleus.predict.source import ImageSource, ScaledImage, image_source
from nucleus.registry.manifest import ModelManifest
from nucleus.registry.versions import PulledModel, read_pulled

__all__ = [
    "IMAGES_AT_ONCE",
    "ImageValues",
    "Model",
    "PredictionOptions",
    "Segmentation",
    "load_model_folder",
    "load_pulled",
]


IMAGES_AT_ONCE = 8
"""Images that are opened together, so that small ones are computed together."""
_BLOCK_SIDE = 2048


@dataclass(frozen=True)
class PredictionOptions:
    """How images are segmented.

    Attributes:
        diameter: Typical diameter of the nuclei in the images, px; images are rescaled to the diameter that the model
            was trained on.
        pixel_size: Side of the images' pixels, micrometres, instead of what their files say. If the model knows the
            pixel size of its training images and no diameter is given, images are rescaled by it.
        turns: Whether to average over the eight flips and quarter turns; eight times slower.
        block_side: Side of the blocks in which large images are labelled, px.
    """

    diameter: float | None = None
    pixel_size: float | None = None
    turns: bool = False
    block_side: int = _BLOCK_SIDE


_SMALLEST_MARGIN = 128
_DIAMETERS_OF_MARGIN = 4
_LARGEST_MARGIN = 512
"""In network pixels, as the smallest margin."""
_PIXELS_AT_ONCE = 1 << 22
_LARGEST_SCALE = 16.0


@dataclass(frozen=True)
class ImageValues:
    """The network's values at the pixels of a whole image.

    Attributes:
        values: H x W x channels, float32, as `nucleus.model.heads` describes them.
        scale: Network pixels per image pixel.
    """

    values: NDArray[np.float32]
    scale: float


class Segmentation:
    """The nuclei of one image.

    Attributes:
        labels: H x W, int32: 0 background, 1..K nuclei.
        table: pandas DataFrame, a row per nucleus, with the columns of `nuclei.csv`: lengths in px, centroids in px
            from the centre of the first pixel, grey values as they are stored. Columns in micrometres are NaN if the
            pixel size is unknown.

    Examples:
        >>> found = model.segment("image.png")
        >>> found.table["label"].tolist() == list(range(1, found.count + 1))
        True
        >>> found.table.to_csv("nuclei.csv", index=False)
    """

    def __init__(self, image: ScaledImage, labels: NDArray[np.int32], table: pandas.DataFrame) -> None:
        self.labels = labels
        self.table = table
        self._image = image

    @property
    def count(self) -> int:
        """Number of nuclei."""
        return len(self.table)

    def overlay(self) -> RgbImage:
        """Return the image, H x W x 3, uint8, with each nucleus outlined in yellow."""
        whole = self._image.whole
        return draw_outlines(self._image.rgb(whole.rows, whole.columns), self.labels)

    def __repr__(self) -> str:
        height, width = self.labels.shape
        nuclei = "1 nucleus" if self.count == 1 else f"{self.count} nuclei"
        return f"<Segmentation of {self._image.source.name}: {width} x {height} px, {nuclei}>"


class Model:
    """A network with its settings: segments images of any size.

    Files, arrays and images of a dataset are processed alike: opened (`ImageSource`), normalised and rescaled
    (`ScaledImage`), passed through the network tile by tile, and labelled at the image's own pixels. So `options` have
    the same effect everywhere.

    Args:
        network: A network of `build_unet`.
        config: Its configuration.
        options: How images are segmented.
        manifest: The published version that the network is from; None while it is in training.

    Attributes:
        config: The network's configuration.
        options: How images are segmented.
        manifest: The published version, or None.

    Raises:
        ModelError: `options` has a diameter and the model knows none.
    """

    def __init__(
        self,
        network: Any,
        config: ModelConfig,
        options: PredictionOptions | None = None,
        manifest: ModelManifest | None = None,
    ) -> None:
        self.config = config
        self.options = options or PredictionOptions()
        self.manifest = manifest
        self._network = TiledNetwork(network, config, turns=self.options.turns)
        if self.options.diameter is not None and config.nucleus_diameter is None:
            raise ModelError(
                "Expected a model that knows the diameter of its nuclei; this one does not, so --diameter has no "
                "effect. Leave it out."
            )

    def __repr__(self) -> str:
        version = "in training" if self.manifest is None else f"{self.manifest.model}@{self.manifest.version}"
        return f"<Model {version}: {self.config.encoder}, {self.options}>"

    @property
    def loss(self) -> LossOptions:
        """The loss that the model was trained with."""
        return LossOptions.model_validate(self.manifest.origin.recipe.get("loss", {}) if self.manifest else {})

    def with_labelling(self, instances: InstanceSettings, nucleus_diameter: float | None) -> Model:
        """Return the same network with other settings for labels."""
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"instances": instances, "nucleus_diameter": nucleus_diameter})
        return other

    def segment(self, image: str | Path | ArrayLike, *, channel: int | None = None) -> Segmentation:
        """Find the nuclei of an image.

        Args:
            image: A file (PNG, TIFF, OME-TIFF, JPEG, BMP, WebP), or an array H x W (grey) or H x W x C of any depth,
                with C = 1 (grey), 3 (RGB), 4 (RGB and alpha), or several channels of which `channel` names one.
            channel: The channel to segment, from 0. All channels are measured.

        Returns:
            Labels, table and overlay. In the table, the column `image` is the file's name, or "image" for an array.

        Raises:
            ImageError: Not an image, a damaged one, or several channels and no choice among them.

        Examples:
            >>> found = model.segment("image.png")
            >>> found.labels.shape, found.labels.dtype
            ((96, 80), dtype('int32'))
            >>> same = model.segment(skimage.io.imread("image.png"))
            >>> bool((same.labels == found.labels).all())
            True
        """
        scaled = self.scaled_image(image_source(image, channel))
        labels = AssembledLabels(np.zeros(scaled.source_shape, np.int32))
        (blocks,) = self.segment_blocks([scaled])
        rows = [row for part in measure_blocks(frame_of(scaled.source), blocks, labels) for row in part]
        channels = scaled.source.read_channels(slice(0, 1), slice(0, 1)).shape[2]
        return Segmentation(scaled, labels.labels, _table(rows, channels))

    def scaled_image(self, source: ImageSource) -> ScaledImage:
        """Normalise and rescale an image for the network. Raises `ImageError` if it is damaged or out of scale."""
        known = replace(source, pixel_size=self.options.pixel_size or source.pixel_size)
        return ScaledImage(known, self.config.normalization, self._scale(known))

    def segment_blocks(self, images: Sequence[ScaledImage]) -> Iterator[Iterator[LabelledBlock]]:
        """Segment images of any size in blocks; each nucleus is whole in one block.

        Small images of similar size are computed together, so several at once are faster than one after the other.
        The memory needed does not depend on the size of the images.

        Yields:
            The blocks of each image, in order.
        """
        for group in _groups(images):
            plans = [self._plan(image) for image in group]
            small = [number for number, blocks in enumerate(plans) if len(blocks) == 1]
            values = dict(zip(small, self._network.whole_images([group[number] for number in small]), strict=True))
            for number, (image, blocks) in enumerate(zip(group, plans, strict=True)):
                regions = [image.covering(block.seen) for block in blocks]
                whole = number in values
                found = iter([values.pop(number)]) if whole else self._network.regions(image, regions)
                yield self._labelled(image, blocks, regions, found)

    def values(self, sources: Iterable[ImageSource]) -> Iterator[ImageValues]:
        """Yield the network's values of whole images that fit into memory, in order.

        They are computed `IMAGES_AT_ONCE` at a time, so the same sequence, or a part of it that begins at a multiple
        of that number, has the same values to the bit on the same machine.
        """
        remaining = iter(sources)
        while chunk := [self.scaled_image(source) for source in islice(remaining, IMAGES_AT_ONCE)]:
            for image, values in zip(chunk, self._network.whole_images(chunk), strict=True):
                yield ImageValues(image.back(values, image.covering(image.whole), image.whole), image.scale)

    def label(self, found: ImageValues, instances: InstanceSettings | None = None) -> NDArray[np.int32]:
        """Return the labels, H x W, of an image from its values; `instances` replaces the settings of the model."""
        settings = (instances or self.config.instances).scaled(1 / found.scale)
        return label_nuclei(maps_of(found.values, self.config.heads), settings)

    def _plan(self, image: ScaledImage) -> list[Block]:
        """Return blocks that have at most `block_side` px a side in image pixels and in network pixels."""
        margin = max(_SMALLEST_MARGIN, round(_DIAMETERS_OF_MARGIN * (self.config.nucleus_diameter or 0.0)))
        side = max(1, round(self.options.block_side / max(1.0, image.scale)))
        return plan_blocks(image.source_shape, side, max(1, round(margin / image.scale)))

    def _labelled(
        self,
        image: ScaledImage,
        blocks: Sequence[Block],
        regions: Sequence[Region],
        found: Iterator[NDArray[np.float32]],
    ) -> Iterator[LabelledBlock]:
        """Yield labelled blocks from the network's values in their regions."""
        for planned, region, values in zip(blocks, regions, found, strict=True):
            block, labels = planned, self._label_block(image, planned, region, values)
            while cuts_nuclei(labels, block, image.source_shape) and block.margin * image.scale < _LARGEST_MARGIN:
                block = block.widened(image.source_shape)  # for a nucleus larger than the margin
                wider = image.covering(block.seen)
                (more,) = self._network.regions(image, [wider])
                labels = self._label_block(image, block, wider, more)
            yield LabelledBlock(block.seen, labels, image.source.read_channels(block.seen.rows, block.seen.columns))

    def _label_block(
        self, image: ScaledImage, block: Block, region: Region, values: NDArray[np.float32]
    ) -> NDArray[np.int32]:
        found = ImageValues(image.back(values, region, block.seen), image.scale)
        return nuclei_of_block(self.label(found), block)

    def _scale(self, source: ImageSource) -> float:
        """Return the network pixels per image pixel. Raises `ImageError` if the number is absurd."""
        scale = 1.0
        if self.options.diameter is not None and self.config.nucleus_diameter is not None:
            scale = self.config.nucleus_diameter / self.options.diameter
        elif source.pixel_size is not None and self.config.pixel_size is not None:
            scale = source.pixel_size / self.config.pixel_size
        if not 1 / _LARGEST_SCALE <= scale <= _LARGEST_SCALE:
            raise ImageError(
                f"Expected {source.name} to be rescaled by 1/{_LARGEST_SCALE:g} to {_LARGEST_SCALE:g}; its diameter or "
                f"pixel size asks for {scale:.3g}. Correct --diameter or --pixel-size."
            )
        return scale


def _groups(images: Sequence[ScaledImage]) -> Iterator[list[ScaledImage]]:
    """Yield neighbouring images that are together small enough to be computed at once, larger ones alone."""
    group: list[ScaledImage] = []
    pixels = 0
    for image in images:
        size = image.shape[0] * image.shape[1]
        if group and pixels + size > _PIXELS_AT_ONCE:
            yield group
            group, pixels = [], 0
        group.append(image)
        pixels += size
    if group:
        yield group


def _table(rows: Sequence[dict[str, Any]], channels: int) -> pandas.DataFrame:
    """Return a table of `measure_nuclei`'s rows; the types of its columns do not depend on the rows."""
    columns = nucleus_columns(channels)
    kinds = {"image": "object", "label": "int64", "area": "int64", "touches_edge": "bool"}
    return pandas.DataFrame(rows, columns=columns).astype({name: kinds.get(name, "float64") for name in columns})


def load_model_folder(folder: Path, options: PredictionOptions | None = None) -> Model:
    """Load a model from a folder that `nucleus models pull` made.

    Raises:
        IntegrityError: A file of the folder does not match its SHA-256.
        ModelError: This version cannot rebuild the network, or the options do not fit it.
    """
    return load_pulled(read_pulled(folder), options)


def load_pulled(pulled: PulledModel, options: PredictionOptions | None = None) -> Model:
    """Load a model whose files are verified already. Raises `ModelError`."""
    return Model(*load_model(pulled.folder), options, pulled.manifest)
