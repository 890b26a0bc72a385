"""`Model`, a network with its settings that segments images."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nucleus.config.names import EngineChoice
from nucleus.config.recipe import LossOptions
from nucleus.data.stacks import PlaneOptions
from nucleus.errors import ModelError, UsageError
from nucleus.model.architecture import (
    CONFIG_FILE,
    ONNX_FILE,
    InstanceSettings,
    Maps,
    ModelConfig,
    maps_of,
    read_model_config,
)
from nucleus.model.engines import Engine, load_engine
from nucleus.model.instances import label_nuclei
from nucleus.model.tiling import Region, TiledNetwork
from nucleus.predict.blocks import (
    AssembledLabels,
    Block,
    LabelledBlock,
    cuts_nuclei,
    nuclei_of_block,
    plan_blocks,
)
from nucleus.predict.measurement import NucleiSummary, doubt_of, frame_of, measure_blocks
from nucleus.predict.planes import FileImage, ImageOpener, images_of
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.segmentation import Segmentation
from nucleus.predict.sizing import Viewer, fitting_scale, known_scale
from nucleus.predict.source import ImageSource, image_source, stacks_of
from nucleus.registry.manifest import ModelManifest
from nucleus.registry.versions import PulledModel, read_pulled

__all__ = [
    "IMAGES_AT_ONCE",
    "PIXEL_SIZES",
    "ImageValues",
    "Model",
    "PredictionOptions",
    "load_model_folder",
    "load_pulled",
]

IMAGES_AT_ONCE = 8
"""Number of images that are opened together, so that small ones can be computed together."""
_BLOCK_SIDE = 2048
_SMALLEST_MARGIN = 128
"""In network pixels, as the largest margin."""
_LARGEST_MARGIN = 512
_DIAMETERS_OF_MARGIN = 4
_PIXELS_AT_ONCE = 1 << 22
PIXEL_SIZES = 1e-4, 1000.0
"""Smallest and largest side of a pixel that is taken for one, micrometres: others are of another unit."""


@dataclass(frozen=True)
class PredictionOptions:
    """Options of the segmentation of images.

    Attributes:
        diameter: Typical diameter of the nuclei in the images, px. The images are rescaled to the diameter that the
            model was trained on.
        fit: Whether to estimate the diameter from each image if it is not given and the model knows the range of its
            training nuclei: images with smaller or larger ones are rescaled.
        as_is: Whether the network sees uneven light as it is; by default, light that is clearly uneven is evened
            (`nucleus.data.illumination`).
        denoise: Whether images in which noise is strong are smoothed before the network looks. Not for images that may
            be empty: smoothed noise can look like nuclei.
        pixel_size: Side of a pixel in the images, micrometres; replaces the value in their files. The images are
            rescaled by it if the model knows the pixel size of its training images and `diameter` is not given.
        turns: Whether to average predictions over the eight flips and quarter turns; eight times slower.
        block_side: Side of the blocks in which large images are labelled, px.
        engine: `onnx` or `tensorflow`, which compute the same up to rounding; `auto` is TensorFlow if it sees a GPU or
            the model has no `model.onnx`, else ONNX Runtime.

    Raises:
        UsageError: The diameter or the pixel size is none: NaN, infinity, 0 or less, or a size of another unit.
    """

    diameter: float | None = None
    fit: bool = True
    as_is: bool = False
    denoise: bool = False
    pixel_size: float | None = None
    turns: bool = False
    block_side: int = _BLOCK_SIDE
    engine: EngineChoice = "auto"

    def __post_init__(self) -> None:
        if self.diameter is not None and not 0 < self.diameter < np.inf:
            raise UsageError(f"Expected a diameter above 0 px; found {self.diameter}. Correct it, or leave it out.")
        smallest, largest = PIXEL_SIZES
        if self.pixel_size is not None and not smallest <= self.pixel_size <= largest:
            raise UsageError(
                f"Expected a pixel size of {smallest:g} to {largest:g} micrometres; found {self.pixel_size}. Give it "
                "in micrometres, or leave it out."
            )


@dataclass(frozen=True)
class ImageValues:
    """Network values at the pixels of a whole image.

    Attributes:
        values: H x W x channels, float32, as `nucleus.model.architecture` describes them.
        scale: Network pixels per image pixel.
    """

    values: NDArray[np.float32]
    scale: float


class Model:
    """A network with its settings, which segments images of any size.

    Files, arrays and images of a dataset are processed alike: opened (`ImageSource`), normalised and rescaled
    (`ScaledImage`), passed through the network tile by tile, and labelled at the resolution of the image. So `options`
    have the same effect everywhere.

    Args:
        engine: The network, of `nucleus.model.engines`.
        config: Configuration of the network.
        options: Options of the segmentation.
        manifest: Manifest of the published version; None while the network is in training.
        name: NAME@VERSION, for people; by default, that of the manifest.

    Attributes:
        config: Configuration of the network.
        options: Options of the segmentation.
        manifest: Manifest of the published version, or None.

    Raises:
        ModelError: `options` has a diameter, but the model does not know the diameter of its training nuclei.
    """

    def __init__(
        self,
        engine: Engine,
        config: ModelConfig,
        options: PredictionOptions | None = None,
        manifest: ModelManifest | None = None,
        name: str | None = None,
    ) -> None:
        self.config = config
        self.options = options or PredictionOptions()
        self.manifest = manifest
        self._name = name or ("in training" if manifest is None else str(manifest))
        self._engine = engine
        self._network = TiledNetwork(engine, config, turns=self.options.turns)
        if self.options.diameter is not None and config.nucleus_diameter is None:
            raise ModelError(
                "Expected a model that knows the diameter of its nuclei; this one does not, so --diameter has no "
                "effect. Leave it out."
            )

    def __str__(self) -> str:
        return self._name

    def __repr__(self) -> str:
        return f"<Model {self._name}: {self.config.encoder}, {self.options}>"

    @property
    def loss(self) -> LossOptions:
        """Options of the loss in training."""
        return LossOptions.model_validate(self.manifest.origin.recipe.get("loss", {}) if self.manifest else {})

    def with_config(self, config: ModelConfig) -> Model:
        """Return a model with the same network and another configuration of how it is used."""
        other = copy.copy(self)
        other.config = config
        return other

    def with_options(self, options: PredictionOptions) -> Model:
        """Return a model with the same network and other options; `engine` among them has no effect.

        Raises:
            ModelError: The options do not fit the model.
        """
        return Model(self._engine, self.config, options, self.manifest, self._name)

    def segment(
        self,
        image: str | Path | ArrayLike,
        *,
        channel: int | str | None = None,
        z: int | str | None = None,
        t: int | None = None,
    ) -> Segmentation:
        """Find the nuclei of an image, in two dimensions.

        Args:
            image: A file (PNG, TIFF, OME-TIFF, LSM, JPEG, BMP, WebP, a whole slide), or an array of any depth: H x W
                (grey), or H x W x C with C = 1 (grey), 3 (RGB), 4 (RGB and alpha, which is dropped), or any other C if
                `channel` is given.
            channel: Channel to segment: its number from 0, or its name in the file. All channels are measured.
            z: For a file with several depths: a depth from 0, "max" or "mean" (a projection of all), or "best" (the
                sharpest). See `segment_planes` for all.
            t: For a file with several times: a time from 0.

        Returns:
            Labels, table and overlay. The column `image` of the table is the name of the file, or "image" for an array.

        Raises:
            ImageError: The image is not an image or damaged; or it has several channels, depths or times, or the file
                several images, and there is no choice of one.
            UsageError: `z` or `t` is something else, or is given with an array.

        Examples:
            >>> found = model.segment("image.png")
            >>> found.labels.shape, found.labels.dtype
            ((96, 80), dtype('int32'))
            >>> same = model.segment(skimage.io.imread("image.png"))
            >>> bool((same.labels == found.labels).all())
            True
        """
        return self._segmentation(image_source(image, channel, PlaneOptions(z, t)))

    def segment_planes(
        self,
        image: str | Path,
        *,
        channel: int | str | None = None,
        z: int | str | None = "all",
        t: int | str | None = "all",
    ) -> Iterator[Segmentation]:
        """Find the nuclei of each plane of a file, one after the other: depths, times, and several images in one file.

        Each plane is segmented as an image of its own; nuclei are not followed through depths or times.

        Args:
            image: A file.
            channel: Channel to segment: its number from 0, or its name in the file.
            z: "all", or a choice as in `segment`.
            t: "all", or a time from 0.

        Returns:
            The segmentation of each plane, by image, then time, then depth; its `z` and `t` say which it is. After an
            `ImageError` for a damaged plane, `next` goes on with the plane after it.

        Raises:
            ImageError: The file cannot be read, or has no such plane.
            UsageError: `z` or `t` is something else.
        """
        file, options, opener = Path(image), PlaneOptions(z, t), ImageOpener(channel)
        images = images_of(file, file.name, stacks_of(file), options)

        def segmented(each: FileImage) -> Segmentation:
            return self._segmentation(opener.open(each))

        return map(segmented, images)  # a generator would end at an error

    def _segmentation(self, source: ImageSource) -> Segmentation:
        """Return the nuclei of an image."""
        scaled = self.scaled_image(source)
        labels = AssembledLabels(np.zeros(scaled.source_shape, np.int32))
        (blocks,) = self.segment_blocks([scaled])
        rows = [row for part in measure_blocks(frame_of(scaled.source), blocks, labels) for row in part.rows]
        summary = NucleiSummary()
        summary.add(rows)
        return Segmentation(scaled, labels.labels, rows, summary.median_diameter, self.doubt(summary, labels.left_out))

    def maps(self, image: ScaledImage) -> Maps:
        """Return the network's maps at the pixels of an image that fits in memory, H x W each."""
        (values,) = self._values([image])
        return maps_of(image.back(values, image.covering(image.whole), image.whole), self.config.heads)

    def doubt(self, summary: NucleiSummary, left_out: float) -> str | None:
        """Return why the result for an image may be wrong, or None (`nucleus.predict.measurement.doubt_of`)."""
        estimated = self.options.diameter is None and self.options.fit
        return doubt_of(summary, left_out, self.config, estimated=estimated)

    def scaled_image(self, source: ImageSource) -> ScaledImage:
        """Normalise and rescale an image for the network.

        The scale follows from the options or, without them, from the size of the nuclei, which the network estimates
        (`nucleus.predict.sizing`) if the model knows the range of its training nuclei.

        Raises:
            ImageError: The image is damaged or out of scale.
        """
        known = replace(source, pixel_size=self.options.pixel_size or source.pixel_size)
        scale = known_scale(known, self.options.diameter, self.config)
        if scale is None and self.options.fit and self.config.diameters is not None:
            return self._fitted(self._seen(known), self.config.diameters)
        return self._seen(known, scale or 1.0)

    def _seen(self, source: ImageSource, scale: float = 1.0) -> ScaledImage:
        return ScaledImage(
            source, self.config.normalization, scale, as_is=self.options.as_is, denoise=self.options.denoise
        )

    def _fitted(self, image: ScaledImage, diameters: tuple[float, float]) -> ScaledImage:
        """Return an image at the scale that fits its nuclei; a small one with its network values."""
        viewer = Viewer(image, self._maps, self.config.instances)
        return viewer.image_at(fitting_scale(viewer.look, diameters).scale)

    def _maps(self, image: ScaledImage) -> Maps:
        """Compute the network's values of a whole image, and keep them."""
        (image.values,) = self._network.whole_images([image])
        return maps_of(image.values, self.config.heads)

    def _values(self, images: Sequence[ScaledImage]) -> list[NDArray[np.float32]]:
        """Return the network values of whole images, computed together where they are not known yet."""
        unknown = [image for image in images if image.values is None]
        computed = iter(self._network.whole_images(unknown))
        return [next(computed) if image.values is None else image.values for image in images]

    def segment_blocks(self, images: Sequence[ScaledImage]) -> Iterator[Iterator[LabelledBlock]]:
        """Segment images of any size in blocks; each nucleus is complete in one block.

        Small images are computed together, which is faster than one by one. The memory needed does not depend on the
        size of the images.

        Yields:
            The labelled blocks of each image, in order.
        """
        for group in _groups(images):
            plans = [self._plan(image) for image in group]
            small = [number for number, blocks in enumerate(plans) if len(blocks) == 1]
            values = dict(zip(small, self._values([group[number] for number in small]), strict=True))
            for number, (image, blocks) in enumerate(zip(group, plans, strict=True)):
                regions = [image.covering(block.seen) for block in blocks]
                whole = number in values
                found = iter([values.pop(number)]) if whole else self._network.regions(image, regions)
                yield self._labelled(image, blocks, regions, found)

    def values(self, sources: Iterable[ImageSource]) -> Iterator[ImageValues]:
        """Yield the network values of whole images that fit in memory, in order.

        Images are computed `IMAGES_AT_ONCE` at a time, so the same sequence, or a part of it that starts at a multiple
        of that number, has the same values to the bit on the same machine.
        """
        remaining = iter(sources)
        while chunk := [self.scaled_image(source) for source in islice(remaining, IMAGES_AT_ONCE)]:
            for image, values in zip(chunk, self._values(chunk), strict=True):
                yield ImageValues(image.back(values, image.covering(image.whole), image.whole), image.scale)

    def label(self, found: ImageValues, instances: InstanceSettings | None = None) -> NDArray[np.int32]:
        """Return the labels of an image, H x W, from its network values; `instances` replaces the model's settings."""
        settings = (instances or self.config.instances).scaled(1 / found.scale)
        return label_nuclei(maps_of(found.values, self.config.heads), settings)

    def _plan(self, image: ScaledImage) -> list[Block]:
        """Return blocks with at most `block_side` px per side, both in image pixels and in network pixels."""
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
        """Yield labelled blocks from the network values in their regions."""
        for planned, region, values in zip(blocks, regions, found, strict=True):
            block, (labels, mask) = planned, self._label_block(image, planned, region, values)
            while cuts_nuclei(labels, block, image.source_shape) and block.margin * image.scale < _LARGEST_MARGIN:
                block = block.widened(image.source_shape)  # for a nucleus larger than the margin
                wider = image.covering(block.seen)
                (more,) = self._network.regions(image, [wider])
                labels, mask = self._label_block(image, block, wider, more)
            channels = image.source.read_channels(block.seen.rows, block.seen.columns)
            likely = int(np.count_nonzero(block.of_core(mask) > self.config.instances.mask_threshold))
            yield LabelledBlock(block.seen, labels, channels, mask, likely)

    def _label_block(
        self, image: ScaledImage, block: Block, region: Region, values: NDArray[np.float32]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the labels of a block's nuclei and the mask map, both of `block.seen`."""
        found = ImageValues(image.back(values, region, block.seen), image.scale)
        return nuclei_of_block(self.label(found), block), maps_of(found.values, self.config.heads).mask


def _groups(images: Sequence[ScaledImage]) -> Iterator[list[ScaledImage]]:
    """Yield groups of consecutive images that are small enough to be computed together; larger images alone."""
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


def load_model_folder(folder: Path, options: PredictionOptions | None = None) -> Model:
    """Load a model from a folder that `nucleus models pull` made.

    Raises:
        IntegrityError: A file of the folder does not match its SHA-256.
        ModelError: This version of the package cannot rebuild the network, or the options do not fit the model.
    """
    return load_pulled(read_pulled(folder), options)


def load_pulled(pulled: PulledModel, options: PredictionOptions | None = None) -> Model:
    """Load a model whose files are already verified.

    Raises:
        ModelError: This version of the package cannot rebuild the network, the options do not fit the model, or neither
            ONNX Runtime nor TensorFlow can compute it here.
    """
    path = pulled.folder / CONFIG_FILE
    config = read_model_config(path.read_bytes(), str(path))
    choice = options.engine if options else "auto"
    engine = load_engine(pulled.folder, config, choice, has_onnx=ONNX_FILE in pulled.manifest.files)
    return Model(engine, config, options, pulled.manifest, str(pulled))
