"""The size of an image's nuclei, estimated by the network itself, and the scale at which it finds them best.

The network looks at the image as it is and at a quarter of its scale. The view in which it is more certain tells the
diameter: nuclei far larger or smaller than those of training give blurred maps. If the diameter is outside the range
of training, the image is rescaled to the middle of that range, and a look at this scale checks the choice.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.errors import ImageError
from nucleus.model.architecture import InstanceSettings, Maps, ModelConfig
from nucleus.model.tiling import Region
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.source import ImageSource

__all__ = ["View", "Viewer", "densest_square", "fitting_scale", "known_scale", "view_of"]

_REDUCED = 1 / 4
"""Ratio of the scales of two views."""
_LARGEST_ESTIMATED, _LARGEST_SCALE = 4.0, 16.0
"""Largest scales, network pixels per image pixel: of an estimated size, and of one that is known."""
_CERTAIN = 0.85
"""Certainty of a reduced view of nuclei without which an image in which nothing is found at its own scale stays so."""
_LEAST_SEEN, _MOST_COVERED = 0.25, 0.4
"""A reduced view that covers more than the second part of the image with nuclei counts only if at least the first part
of this area is seen at the image's own scale too."""
_TIE = 0.005
"""Differences of certainty below this do not count."""
_WHOLE_PIXELS = 1 << 24
"""Images of up to this many pixels are viewed whole at the reduced scale."""
_PART_SIDE = 2048
_KEPT_PIXELS = 1 << 20
_SHARE = 0.08
_DENSEST_SIDE = 512


@dataclass(frozen=True)
class View:
    """What the network sees in an image, or in a part of it, at one scale.

    Attributes:
        scale: Network pixels per image pixel.
        nuclei: Number of seeds.
        area: Number of network pixels in nuclei.
        shared: Sum of the mask map over these pixels.
        total: Sum of the mask map over all pixels.
        pixels: Number of network pixels.
    """

    scale: float
    nuclei: int = 0
    area: int = 0
    shared: float = 0.0
    total: float = 0.0
    pixels: int = 0

    def __add__(self, other: "View") -> "View":
        return View(
            self.scale,
            self.nuclei + other.nuclei,
            self.area + other.area,
            self.shared + other.shared,
            self.total + other.total,
            self.pixels + other.pixels,
        )

    @property
    def diameter(self) -> float | None:
        """Diameter of a circle of the mean area of a nucleus, in pixels of the image; None without nuclei."""
        return float(np.sqrt(4 * self.area / (np.pi * self.nuclei))) / self.scale if self.nuclei else None

    @property
    def coverage(self) -> float:
        """Part of the pixels in nuclei, 0 to 1."""
        return self.area / self.pixels if self.pixels else 0.0

    @property
    def certainty(self) -> float:
        """IoU of the mask map with the mask itself, 0 to 1: 1 if every pixel is certain; 0 without nuclei."""
        return self.shared / (self.total + self.area - self.shared) if self.nuclei else 0.0


def view_of(maps: Maps, settings: InstanceSettings, scale: float) -> View:
    """Return the view of the network's maps at `scale` network pixels per image pixel."""
    mask = maps.mask > settings.mask_threshold
    seeds = (mask & (maps.interior > settings.seed_threshold)).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(seeds, connectivity=4)
    return View(
        scale,
        nuclei=int(np.count_nonzero(stats[1:, cv2.CC_STAT_AREA] >= max(1, settings.min_seed_area))),
        area=int(np.count_nonzero(mask)),
        shared=float(maps.mask.sum(where=mask, dtype=np.float64)),
        total=float(maps.mask.sum(dtype=np.float64)),
        pixels=mask.size,
    )


def fitting_scale(look: Callable[[float], View], diameters: tuple[float, float]) -> View:
    """Return the view at the scale at which the network finds an image's nuclei best.

    Args:
        look: Function that returns the view at a scale.
        diameters: Range of diameters for which the network was trained, px.
    """
    own = look(1.0)
    reduced = _reduced(look, diameters[1])
    best = reduced if _sees_more(reduced, own) else own
    if best.diameter is None or diameters[0] <= best.diameter <= diameters[1]:
        return own
    middle = float(np.sqrt(diameters[0] * diameters[1]))
    fitted = look(min(_LARGEST_ESTIMATED, middle / best.diameter))
    return fitted if fitted.certainty >= own.certainty - _TIE else own


def _sees_more(reduced: View, own: View) -> bool:
    """Return whether a reduced view is of larger nuclei, and not of what surrounds nuclei, such as glands."""
    if not own.nuclei:
        return reduced.certainty >= _CERTAIN
    seen = reduced.coverage <= _MOST_COVERED or own.coverage >= _LEAST_SEEN * reduced.coverage
    return seen and reduced.certainty > own.certainty + _TIE


def _reduced(look: Callable[[float], View], largest: float) -> View:
    """Return the view at a quarter of the scale, or at a quarter of that, and so on, while its nuclei are too large."""
    view = look(_REDUCED)
    while view.diameter is not None and view.diameter * view.scale > largest:
        next_view = look(view.scale * _REDUCED)
        if next_view.certainty <= view.certainty:
            break
        view = next_view
    return view


def known_scale(source: ImageSource, diameter: float | None, config: ModelConfig) -> float | None:
    """Return the number of network pixels per image pixel, or None if neither the options nor the image say it.

    Args:
        source: The image.
        diameter: Diameter of its nuclei, px, if it is given.
        config: Configuration of the network, with the sizes it was trained at.

    Raises:
        ImageError: It is below 1/16 or above 16.
    """
    if diameter is not None and config.nucleus_diameter is not None:
        scale = config.nucleus_diameter / diameter
    elif source.pixel_size is not None and config.pixel_size is not None:
        scale = source.pixel_size / config.pixel_size
    else:
        return None
    if not 1 / _LARGEST_SCALE <= scale <= _LARGEST_SCALE:
        raise ImageError(
            f"Expected {source.name} to be rescaled by 1/{_LARGEST_SCALE:g} to {_LARGEST_SCALE:g}; its diameter or "
            f"pixel size gives {scale:.3g}. Correct --diameter or --pixel-size."
        )
    return scale


class Viewer:
    """Views of an image at different scales.

    Images of up to a megapixel are viewed whole, and the network's values are kept, because they are those of the
    prediction if the scale stays. Of larger images, parts are viewed: at reduced scales the whole image or, above 16
    megapixels, the middles of its quarters; at other scales the square with the most nuclei in each of these parts.

    Args:
        image: The image at its own scale.
        maps: Function that returns the network's maps of a whole (part of an) image, and may keep the values in it.
        settings: Thresholds for the labels.
    """

    def __init__(self, image: ScaledImage, maps: Callable[[ScaledImage], Maps], settings: InstanceSettings) -> None:
        self._image = image
        self._maps = maps
        self._settings = settings
        self._small = image.source.height * image.source.width <= _KEPT_PIXELS
        self._kept: dict[float, ScaledImage] = {}

    def look(self, scale: float) -> View:
        """Return the view at a scale, network pixels per image pixel."""
        if self._small:
            self._kept[scale] = self._image.at(scale)
            return view_of(self._maps(self._kept[scale]), self._settings, scale)
        if scale == _REDUCED:
            seen: Iterable[Maps] = self._reduced_maps
        else:
            parts = self._reduced_parts if scale < 1 else self._dense_parts
            seen = (self._maps(self._image.at(scale, part)) for part in parts)
        return sum((view_of(maps, self._settings, scale) for maps in seen), View(scale))

    def image_at(self, scale: float) -> ScaledImage:
        """Return the whole image at a scale; with its values if they were computed and are few."""
        found = self._kept.get(scale) or self._image.at(scale)
        if found.shape[0] * found.shape[1] > 2 * _KEPT_PIXELS:
            found.values = None
        return found

    @cached_property
    def _reduced_parts(self) -> list[Region]:
        height, width = self._image.source_shape
        if height * width <= _WHOLE_PIXELS:
            return [self._image.whole]
        rows, columns = (
            [_around(length * quarter // 4, slice(0, length), _PART_SIDE) for quarter in (1, 3)]
            for length in (height, width)
        )
        return [Region(row, column) for row in rows for column in columns]

    @cached_property
    def _dense_parts(self) -> list[Region]:
        """The square with the most nuclei in each part: 512 px or, below 3.3 megapixels, 8 % of the image."""
        height, width = self._image.source_shape
        side = min(_DENSEST_SIDE, int(np.sqrt(_SHARE * height * width)))
        pairs = zip(self._reduced_parts, self._reduced_maps, strict=True)
        return [densest_square(part, maps.mask, side) for part, maps in pairs]

    @cached_property
    def _reduced_maps(self) -> list[Maps]:
        return [self._maps(self._image.at(_REDUCED, part)) for part in self._reduced_parts]


def densest_square(part: Region, mask: NDArray[np.float32], side: int) -> Region:
    """Return the square of `side` px with the most nuclei in a part of an image.

    Args:
        part: The part, in image pixels.
        mask: Mask map of the part at any scale, h x w.
        side: Side of the square, image px; the square is smaller if the part is.
    """
    down, across = (length / pixels for length, pixels in zip(part.shape, mask.shape, strict=True))
    box = (max(1, round(side / across)), max(1, round(side / down)))
    dense = cv2.boxFilter(mask, -1, box, borderType=cv2.BORDER_CONSTANT)
    y, x = np.unravel_index(int(dense.argmax()), dense.shape)
    rows = _around(part.rows.start + int((y + 0.5) * down), part.rows, side)
    return Region(rows, _around(part.columns.start + int((x + 0.5) * across), part.columns, side))


def _around(middle: int, within: slice, side: int) -> slice:
    """Return `side` px around a place of an axis, moved inwards at the ends of `within`."""
    start = max(within.start, min(middle - side // 2, within.stop - side))
    return slice(start, min(start + side, within.stop))
