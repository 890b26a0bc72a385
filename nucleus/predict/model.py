"""How images are segmented, as opposed to with what model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import RgbImage
from nucleus.errors import ImageError, IntegrityError, ModelError
from nucleus.model.architecture import ModelConfig
from nucleus.model.heads import maps_of
from nucleus.model.instances import label_nuclei
from nucleus.model.tiling import Picture, Region, TiledNetwork
from nucleus.model.weight_files import load_model
from nucleus.predict.blocks import Block, cuts_nuclei, nuclei_of_block, plan_blocks
from nucleus.predict.source import ImageSource, NetworkView
from nucleus.registry.manifest import MANIFEST_FILE, ModelManifest, read_model_manifest
from nucleus.registry.versions import is_whole

__all__ = ["LabelledBlock", "Prediction", "PredictionOptions", "Predictor", "load_predictor", "read_pulled"]


_BLOCK_SIDE = 2048


@dataclass(frozen=True)
class PredictionOptions:
    """How images are segmented.

    Attributes:
        diameter: Typical diameter of the nuclei in the images, px; they are rescaled to what the model was trained on.
        pixel_size: Side of the images' pixels, micrometres, instead of what their files say. Where the model knows that
            of its training images and no diameter is given, images are rescaled by it, or by what their file says.
        turns: Whether to average over the eight flips and quarter turns; eight times the work.
        block_side: Side of the blocks in which large images are labelled, px.
    """

    diameter: float | None = None
    pixel_size: float | None = None
    turns: bool = False
    block_side: int = _BLOCK_SIDE


_SMALLEST_MARGIN = 128
_DIAMETERS_OF_MARGIN = 4
_LARGEST_MARGIN = 512
"""Pixels of the network, as the smallest one."""
_PIXELS_AT_ONCE = 1 << 22
_LARGEST_SCALE = 16.0


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
        region: What part of the image `labels` and `channels` show.
        labels: h x w, int32: 0 background and other blocks' nuclei, 1..k.
        channels: h x w x C, all channels as the file has them.
    """

    region: Region
    labels: NDArray[np.int32]
    channels: NDArray[Any]


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
        if self._options.diameter is not None and config.nucleus_diameter is None:
            raise ModelError(
                "Expected a model that knows the diameter of its nuclei; this one does not, so --diameter says "
                "nothing to it. Leave it out."
            )

    def images(self, images: Iterable[RgbImage]) -> Iterator[Prediction]:
        """Segment images in memory, each in one piece, H x W x 3, RGB of 8 bits, at the scale that they have."""
        for values in self._network.images(images):
            yield Prediction(values, label_nuclei(maps_of(values, self.config.heads), self.config.instances))

    def view(self, source: ImageSource) -> NetworkView:
        """An image as the network sees it, read once for it. Raises `ImageError` if it is damaged or out of scale."""
        return NetworkView(source, self.config.normalization, self._scale(source))

    def pixel_size(self, source: ImageSource) -> float | None:
        """Side of an image's pixels in micrometres, as the user or the file says."""
        return self._options.pixel_size or source.pixel_size

    def segment(self, views: Sequence[NetworkView]) -> Iterator[Iterator[LabelledBlock]]:
        """Segment images of any size; each nucleus comes in one block, whole.

        Small images of like size are computed together, so several at once are faster than one after the other.

        Yields:
            For each image, in order, its blocks.
        """
        for group in _groups(views):
            plans = [self._plan(view) for view in group]
            small = [number for number, blocks in enumerate(plans) if len(blocks) == 1]
            pictures = [Picture(view.read, view.shape) for view in group]
            values = dict(zip(small, self._network.pictures([pictures[number] for number in small]), strict=True))
            for number, (view, blocks) in enumerate(zip(group, plans, strict=True)):
                regions = [view.covering(block.seen) for block in blocks]
                at_once = number in values
                found = iter([values.pop(number)]) if at_once else self._network.regions(pictures[number], regions)
                yield self._labelled(view, blocks, regions, found)

    def _plan(self, view: NetworkView) -> list[Block]:
        """Blocks that are no larger in the network's pixels than in the image's."""
        margin = max(_SMALLEST_MARGIN, round(_DIAMETERS_OF_MARGIN * (self.config.nucleus_diameter or 0.0)))
        side = max(1, round(self._options.block_side / max(1.0, view.scale)))
        return plan_blocks((view.source.height, view.source.width), side, max(1, round(margin / view.scale)))

    def _labelled(
        self,
        view: NetworkView,
        blocks: Sequence[Block],
        regions: Sequence[Region],
        found: Iterator[NDArray[np.float32]],
    ) -> Iterator[LabelledBlock]:
        """Blocks from the network's values at their regions."""
        for planned, region, values in zip(blocks, regions, found, strict=True):
            block, labels = planned, self._label(view, planned, region, values)
            while cuts_nuclei(labels, block, view.source_shape) and block.margin * view.scale < _LARGEST_MARGIN:
                block = block.widened(view.source_shape)  # for a nucleus larger than the margin foresees
                wider = view.covering(block.seen)
                (more,) = self._network.regions(Picture(view.read, view.shape), [wider])
                labels = self._label(view, block, wider, more)
            yield LabelledBlock(block.seen, labels, view.source.read_channels(block.seen.rows, block.seen.columns))

    def _label(self, view: NetworkView, block: Block, region: Region, values: NDArray[np.float32]) -> NDArray[np.int32]:
        maps = maps_of(view.back(values, region, block.seen), self.config.heads)
        return nuclei_of_block(label_nuclei(maps, self.config.instances.scaled(1 / view.scale)), block)

    def _scale(self, source: ImageSource) -> float:
        """Pixels of the network a pixel of an image. Raises `ImageError` if it is absurd."""
        scale = 1.0
        pixel_size = self.pixel_size(source)
        if self._options.diameter is not None and self.config.nucleus_diameter is not None:
            scale = self.config.nucleus_diameter / self._options.diameter
        elif pixel_size is not None and self.config.pixel_size is not None:
            scale = pixel_size / self.config.pixel_size
        if not 1 / _LARGEST_SCALE <= scale <= _LARGEST_SCALE:
            raise ImageError(
                f"Expected {source.name} to be rescaled by 1/{_LARGEST_SCALE:g} to {_LARGEST_SCALE:g}; its diameter or "
                f"pixel size asks for {scale:.3g}. Correct --diameter or --pixel-size."
            )
        return scale


def _groups(views: Sequence[NetworkView]) -> Iterator[list[NetworkView]]:
    """Neighbouring images that are together small enough to be computed at once, larger ones alone."""
    group: list[NetworkView] = []
    pixels = 0
    for view in views:
        size = view.shape[0] * view.shape[1]
        if group and pixels + size > _PIXELS_AT_ONCE:
            yield group
            group, pixels = [], 0
        group.append(view)
        pixels += size
    if group:
        yield group


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
