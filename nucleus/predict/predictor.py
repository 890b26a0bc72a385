"""A pulled model, ready to segment images."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import RgbImage
from nucleus.errors import IntegrityError, ModelError
from nucleus.model.architecture import ModelConfig
from nucleus.model.files import load_model
from nucleus.model.heads import maps_of
from nucleus.model.instances import label_nuclei
from nucleus.model.tiling import Picture, Region, TiledNetwork
from nucleus.predict.blocks import Block, nuclei_of_block, plan_blocks
from nucleus.predict.sources import ImageSource
from nucleus.predict.view import NetworkView
from nucleus.registry.manifest import MANIFEST_FILE, ModelManifest, read_model_manifest
from nucleus.registry.versions import is_whole

__all__ = ["LabelledBlock", "Prediction", "PredictionOptions", "Predictor", "load_predictor", "read_pulled"]

_BLOCK_SIDE = 2048
_SMALLEST_MARGIN = 128
_DIAMETERS_OF_MARGIN = 4


@dataclass(frozen=True)
class PredictionOptions:
    """How images are segmented.

    Attributes:
        diameter: Typical diameter of the nuclei in the images, px; they are rescaled to what the model was trained on.
        pixel_size: Side of the images' pixels, micrometres, instead of what their files say. Where the model knows that
            of its training images and no diameter is given, they are rescaled by it.
        turns: Whether to average over the eight flips and quarter turns; eight times the work.
        block_side: Side of the blocks in which large images are labelled, px.
    """

    diameter: float | None = None
    pixel_size: float | None = None
    turns: bool = False
    block_side: int = _BLOCK_SIDE


@dataclass(frozen=True)
class Prediction:
    """What a model makes of an image in memory.

    Attributes:
        values: H x W x channels, float32, as `nucleus.model.heads` says.
        labels: H x W, int32: 0 background, 1..K nuclei.
    """

    values: NDArray[np.float32]
    labels: NDArray[np.int32]


@dataclass(frozen=True)
class LabelledBlock:
    """The nuclei of one block of an image.

    Attributes:
        region: What part of the image `labels` and `pixels` show.
        labels: h x w, int32: 0 background and other blocks' nuclei, 1..k.
        pixels: h x w x 1 or 3, as the file has them.
    """

    region: Region
    labels: NDArray[np.int32]
    pixels: NDArray[Any]


class Predictor:
    """A network with its settings.

    Args:
        model: A network of `build_unet`.
        config: What it is.
        options: How images are segmented.

    Raises:
        ModelError: A diameter is given and the model knows none.
    """

    def __init__(self, model: Any, config: ModelConfig, options: PredictionOptions | None = None) -> None:
        self.config = config
        self._options = options or PredictionOptions()
        self._network = TiledNetwork(model, config, turns=self._options.turns)
        self._scale = self._scale_of(self._options)

    def images(self, images: Iterable[RgbImage]) -> Iterator[Prediction]:
        """Segment images in memory, each in one piece, H x W x 3, RGB of 8 bits, at the scale that they have."""
        for values in self._network.images(images):
            yield Prediction(values, label_nuclei(maps_of(values, self.config.heads), self.config.instances))

    def view(self, source: ImageSource) -> NetworkView:
        """An image as the network sees it; reads the image once. Raises `ImageError` if a part of it is damaged."""
        return NetworkView(source, self.config.normalization, self._scale)

    def pixel_size(self, source: ImageSource) -> float | None:
        """Side of an image's pixels in micrometres, as the user or the file says."""
        return self._options.pixel_size or source.pixel_size

    def segment(self, views: Sequence[NetworkView]) -> Iterator[Iterator[LabelledBlock]]:
        """Segment images of any size; each nucleus comes in one block, whole.

        Small images of like size are computed together, so several at once are faster than one after the other.

        Yields:
            For each image, in order, its blocks.
        """
        plans = [self._plan(view) for view in views]
        small = [number for number, blocks in enumerate(plans) if len(blocks) == 1]
        pictures = [Picture(view.read, view.shape) for view in views]
        values = dict(zip(small, self._network.pictures([pictures[number] for number in small]), strict=True))
        for number, (view, blocks) in enumerate(zip(views, plans, strict=True)):
            regions = [view.covering(block.seen) for block in blocks]
            found = iter([values.pop(number)]) if number in values else self._network.regions(pictures[number], regions)
            yield self._labelled(view, blocks, regions, found)

    def _plan(self, view: NetworkView) -> list[Block]:
        diameter = (self.config.nucleus_diameter or 0.0) / self._scale
        margin = max(_SMALLEST_MARGIN, round(_DIAMETERS_OF_MARGIN * diameter))
        return plan_blocks((view.source.height, view.source.width), self._options.block_side, margin)

    def _labelled(
        self,
        view: NetworkView,
        blocks: Sequence[Block],
        regions: Sequence[Region],
        found: Iterator[NDArray[np.float32]],
    ) -> Iterator[LabelledBlock]:
        """Blocks from the network's values at their regions."""
        settings = self.config.instances.scaled(1 / self._scale)
        for block, region, values in zip(blocks, regions, found, strict=True):
            maps = maps_of(view.back(values, region, block.seen), self.config.heads)
            labels = nuclei_of_block(label_nuclei(maps, settings), block)
            pixels = view.source.read(block.seen.rows, block.seen.columns)
            yield LabelledBlock(block.seen, labels, pixels)

    def _scale_of(self, options: PredictionOptions) -> float:
        """Pixels of the network a pixel of the image."""
        if options.diameter is not None:
            if self.config.nucleus_diameter is None:
                raise ModelError(
                    "Expected a model that knows the diameter of its nuclei; this one does not, so --diameter says "
                    "nothing to it. Leave it out."
                )
            return self.config.nucleus_diameter / options.diameter
        if options.pixel_size is not None and self.config.pixel_size is not None:
            return options.pixel_size / self.config.pixel_size
        return 1.0


def load_predictor(folder: Path, options: PredictionOptions | None = None) -> Predictor:
    """A predictor from a folder that `nucleus models pull` made.

    Raises:
        IntegrityError: A file of the folder does not have its sum.
        ModelError: This version cannot rebuild the network, or the options do not fit it.
    """
    read_pulled(folder)
    return Predictor(*load_model(folder), options)


def read_pulled(folder: Path) -> ModelManifest:
    """The manifest of a pulled model whose files all have their sums."""
    try:
        manifest = read_model_manifest((folder / MANIFEST_FILE).read_bytes(), str(folder / MANIFEST_FILE))
    except OSError as error:
        raise IntegrityError(
            f"Expected a pulled model in {folder}; it has no {MANIFEST_FILE}. Run: nucleus models pull NAME {folder}"
        ) from error
    if not is_whole(folder, manifest):
        raise IntegrityError(
            f"Expected the files in {folder} to have the sums of their manifest; some do not. "
            f"Remove the folder and run: nucleus models pull {manifest.model}@{manifest.version} {folder}"
        )
    return manifest
