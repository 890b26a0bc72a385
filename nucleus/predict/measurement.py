"""Measurements of nuclei and images: one row per nucleus, one row per image; and the types of their columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.data.zarr_plates import plate_field
from nucleus.lazy import pa
from nucleus.model.architecture import ModelConfig
from nucleus.predict.blocks import AssembledLabels, LabelledBlock
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.source import ImageSource

__all__ = [
    "IMAGE_COLUMNS",
    "CellPart",
    "Frame",
    "MeasuredPart",
    "NucleiSummary",
    "doubt_of",
    "frame_of",
    "image_columns",
    "image_row",
    "measure_blocks",
    "measure_nuclei",
    "nucleus_columns",
    "table_schema",
]

_KEYS = ("image", "z", "t")
_PLATE = ("plate", "row", "column", "field")
_SHAPE = ("label", "centroid_x", "centroid_y", "area", "diameter", "eccentricity", "solidity")
_PHYSICAL = ("area_um2", "diameter_um")
_CELL = ("cell_area", "cell_area_um2")
IMAGE_COLUMNS = (
    *(*_KEYS, "width", "height", "nuclei", "nuclei_per_megapixel", "coverage"),
    *("mean_area", "median_diameter", "pixel_size_um", "nuclei_per_mm2", "channels"),
    *("scale", "light", "smoothing", "score", "warning"),
)
_INTEGERS = {"z", "t", "label", "area", "cell_area", "width", "height", "nuclei"}
_TEXTS = {"image", "light", "warning", "channels", *_PLATE}
_DIAMETER_BINS = 1 << 14
"""Bins of a quarter of a pixel; larger diameters count in the last."""
_BINS_PER_PIXEL = 4
_FAR_LARGER = 5
"""A median diameter above this many times the largest of training may be that of what holds many nuclei."""
_MUCH_LEFT_OUT = 0.1
"""Of 512 images of DSB2018, 8 have a larger part left out: AP.5 .53 in the mean, of the others .83 (docs/models.md)."""


@dataclass(frozen=True)
class Frame:
    """The position of a part in its image.

    Attributes:
        image: Name of the image.
        shape: Height and width of the image, px.
        top: First row of the part.
        left: First column of the part.
        pixel_size: Side of a pixel, micrometres; None if unknown.
        z: Depth of the plane in its stack, from 0; None for a projection, and where there is one depth.
        t: Time of the plane, from 0; None where there is one time.
        channels: Names of the channels, in order; empty if the image does not name them.
    """

    image: str
    shape: tuple[int, int]
    top: int = 0
    left: int = 0
    pixel_size: float | None = None
    z: int | None = None
    t: int | None = None
    channels: tuple[str, ...] = ()

    @property
    def keys(self) -> dict[str, Any]:
        """The columns that tell an image from the others: name, place in a plate, depth and time."""
        field = plate_field(self.image)
        return {"image": self.image, **(vars(field) if field else {}), "z": self.z, "t": self.t}


@dataclass(frozen=True)
class CellPart:
    """The cells around the nuclei of a part of an image.

    Attributes:
        frame: Position of their labels, which reach further than those of the nuclei.
        labels: Labels, h x w, 0 background, 1..k as those of the nuclei.
    """

    frame: Frame
    labels: NDArray[np.int32]


@dataclass(frozen=True)
class MeasuredPart:
    """The nuclei of a part of an image.

    Attributes:
        frame: Position of the part.
        labels: Labels of the part, h x w, 0 background, 1..k nuclei.
        rows: Row of each nucleus, in the order of the labels, with its label in the image.
        cells: The cells around the nuclei; None if there are none.
    """

    frame: Frame
    labels: NDArray[np.int32]
    rows: list[dict[str, Any]]
    cells: CellPart | None = None


def nucleus_columns(channels: int, *, plate: bool = False, cells: bool = False) -> tuple[str, ...]:
    """Return the column names of a table of nuclei, for images of up to `channels` channels.

    Args:
        channels: Number of channels.
        plate: Whether some images are of plates.
        cells: Whether nuclei have cells around them.
    """
    intensities = (f"{what}_{channel}" for channel in range(channels) for what in ("mean", "integrated"))
    return (*_keys(plate=plate), *_SHAPE, "touches_edge", "score", *_PHYSICAL, *(_CELL if cells else ()), *intensities)


def image_columns(*, plate: bool = False) -> tuple[str, ...]:
    """Return the column names of a table of images; `plate` says whether some are of plates."""
    return (*_keys(plate=plate), *IMAGE_COLUMNS[len(_KEYS) :])


def _keys(*, plate: bool) -> tuple[str, ...]:
    return (_KEYS[0], *(_PLATE if plate else ()), *_KEYS[1:])


def frame_of(source: ImageSource) -> Frame:
    """Return the frame of a whole image."""
    return Frame(
        source.name,
        (source.height, source.width),
        pixel_size=source.pixel_size,
        z=source.z,
        t=source.t,
        channels=source.channels,
    )


def measure_blocks(image: Frame, blocks: Iterable[LabelledBlock], labels: AssembledLabels) -> Iterator[MeasuredPart]:
    """Add the blocks of an image to its labels; yield the nuclei of each block, measured by `measure_nuclei`."""
    for block in blocks:
        added, before = labels.add(block.labels, block.region)
        labels.likely += block.likely
        frame = replace(image, top=block.region.rows.start, left=block.region.columns.start)
        yield MeasuredPart(frame, added, measure_nuclei(frame, block.channels, added, block.mask, before))


def measure_nuclei(
    frame: Frame, pixels: NDArray[Any], labels: NDArray[np.int32], mask: NDArray[np.float32], first: int = 0
) -> list[dict[str, Any]]:
    """Measure each nucleus of a part of an image.

    Args:
        frame: Position of the part.
        pixels: Grey values in the depth of the file, h x w x C.
        labels: Labels of the part, h x w, 0 background.
        mask: Probability that a pixel is in a nucleus, h x w, 0 to 1.
        first: Number that is added to the labels in the table.

    Returns:
        One dictionary per nucleus, with the keys `nucleus_columns(C)`. Lengths are in px, centroids in px of the whole
        image (the centre of the first pixel is 0, 0). `diameter` is that of the circle of the same area, `eccentricity`
        that of the ellipse with the same second moments; `solidity` is the area divided by that of the convex hull.
        `mean_0` and `integrated_0` are the mean and the sum of the grey values in channel 0 (red in an RGB image), and
        so on. `touches_edge` is true if the nucleus has a pixel at the edge of the image. `score` is the mean of `mask`
        over the nucleus. Columns in micrometres are None if the pixel size is unknown.
    """
    table = _shapes(labels)
    numbers = table["label"].astype(np.int64)
    if not len(numbers):
        return []
    keys = frame.keys
    sums = _integrated(pixels, labels)[numbers]
    certain = _integrated(mask[..., np.newaxis], labels)[numbers, 0]
    edge = _labels_at_edge(frame, labels)
    scale = frame.pixel_size
    rows = []
    for i, number in enumerate(numbers):
        area = int(table["area"][i])
        row = keys | {column: round(float(table[column][i]), 3) for column in _SHAPE}
        row |= {"label": int(number) + first, "area": area}
        row["centroid_x"] = round(float(table["centroid_x"][i]) + frame.left, 3)
        row["centroid_y"] = round(float(table["centroid_y"][i]) + frame.top, 3)
        row["touches_edge"] = int(number) in edge
        row["score"] = round(float(certain[i]) / area, 4)
        row["area_um2"] = None if scale is None else round(area * scale**2, 4)
        row["diameter_um"] = None if scale is None else round(row["diameter"] * scale, 4)
        for channel, value in enumerate(sums[i]):
            row[f"mean_{channel}"] = float(f"{value / area:.7g}")
            row[f"integrated_{channel}"] = float(f"{value:.10g}")
        rows.append(row)
    return rows


def _shapes(labels: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """Return the columns `_SHAPE` of the labels; all at once, as scikit-image takes a millisecond for a nucleus."""
    y, x = np.nonzero(labels)
    of = labels[y, x]
    areas = np.bincount(of)
    numbers = np.flatnonzero(areas)
    areas = np.maximum(areas, 1)
    middle = [np.bincount(of, at) / areas for at in (y, x)]
    down, across = y - middle[0][of], x - middle[1][of]
    yy, xx, yx = (np.bincount(of, product) / areas for product in (down * down, across * across, down * across))
    mean, half = (yy + xx) / 2, np.hypot((yy - xx) / 2, yx)  # of the two squared axes, up to a factor
    ratio = np.clip(mean - half, 0, None) / np.where(mean + half > 0, mean + half, 1)
    columns = {
        "centroid_x": middle[1],
        "centroid_y": middle[0],
        "area": areas,
        "diameter": np.sqrt(4 * areas / np.pi),
        "eccentricity": np.where(mean + half > 0, np.sqrt(1 - ratio), 0.0),
    }
    columns["solidity"] = areas / np.maximum(_hull_areas(labels, len(areas)), 1)
    return {"label": numbers, **{name: values[numbers] for name, values in columns.items()}}


def _hull_areas(labels: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Return for each label from 0 the number of pixels whose centre is in the convex hull of its pixels.

    The hull is that of the middles of the pixels' sides, and the numbers are those of scikit-image's
    `convex_hull_image`, which takes a millisecond for a nucleus. All is computed in whole numbers, of half a pixel.

    Args:
        labels: h x w, 0 background.
        count: Number of labels, with that of the background.
    """
    padded = np.zeros((labels.shape[0], labels.shape[1] + 2), labels.dtype)
    padded[:, 1:-1] = labels
    y, x = np.nonzero(padded[:, 1:] != padded[:, :-1])
    ends, starts = padded[y, x], padded[y, x + 1]  # of the pixels before and after a place where the label changes
    of = np.concatenate([ends, starts])
    down, across = 2 * np.concatenate([y, y]), 2 * np.concatenate([x - 1, x])
    outer = across + np.repeat([1, -1], len(y))
    order = np.argsort(of, kind="stable")
    order = order[np.searchsorted(of[order], 1) :]
    if not len(order):
        return np.zeros(count, np.int64)
    sides = np.array([[outer, across, across], [down, down - 1, down + 1]], np.int32).T[order]  # n x 3 x (x, y)
    of = of[order]
    firsts = np.flatnonzero(np.r_[True, np.diff(of) > 0])
    hulls = [cv2.convexHull(points.reshape(-1, 1, 2))[:, 0] for points in np.split(sides, firsts[1:])]
    return _pixels_inside(hulls, of[firsts], count)


def _pixels_inside(hulls: Sequence[NDArray[np.int32]], numbers: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Return for each label from 0 the number of pixel centres in its hull: n x 2, (x, y) in half pixels."""
    begins = np.concatenate(hulls).astype(np.int64)
    finishes = np.concatenate([np.roll(hull, -1, axis=0) for hull in hulls]).astype(np.int64)
    of = np.repeat(numbers, [len(hull) for hull in hulls])
    upward = (begins[:, 1] > finishes[:, 1])[:, np.newaxis]
    (x0, y0), (x1, y1) = np.where(upward, finishes, begins).T, np.where(upward, begins, finishes).T
    first, last = -(-y0 // 2), y1 // 2  # rows that the side crosses
    rows = np.maximum(last - first + 1, 0)
    side = np.repeat(np.arange(len(rows)), rows)
    row = np.arange(len(side)) - (np.cumsum(rows) - rows)[side] + first[side]
    height = (y1 - y0)[side]
    along = x0[side] * height + (x1 - x0)[side] * (2 * row - y0[side])
    place = of[side] * (int(row.max()) + 1) + row  # no hull reaches above the first row, and each row is crossed
    order = np.argsort(place, kind="stable")
    new = np.flatnonzero(np.r_[True, np.diff(place[order]) > 0])
    leftmost = np.minimum.reduceat((-(-along // (2 * height)))[order], new)
    rightmost = np.maximum.reduceat((along // (2 * height))[order], new)
    found = np.bincount(of[side][order][new], rightmost - leftmost + 1, minlength=count)
    return found.astype(np.int64)


class NucleiSummary:
    """Number, mean score and median diameter of an image's nuclei, from their rows; in memory of a fixed size."""

    def __init__(self) -> None:
        self.nuclei = 0
        self._scores = 0.0
        self._diameters = Counter[int]()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows from `measure_nuclei`."""
        for row in rows:
            self.nuclei += 1
            self._scores += row["score"]
            self._diameters[min(int(row["diameter"] * _BINS_PER_PIXEL), _DIAMETER_BINS - 1)] += 1

    @property
    def score(self) -> float | None:
        """Mean score of the nuclei; None without nuclei."""
        return self._scores / self.nuclei if self.nuclei else None

    @property
    def median_diameter(self) -> float | None:
        """Median diameter, px, to a quarter of a pixel; None without nuclei."""
        if not self.nuclei:
            return None
        bins = sorted(self._diameters)
        below = accumulate(self._diameters[each] for each in bins)
        middle = next(each for each, count in zip(bins, below, strict=True) if 2 * count >= self.nuclei)
        return (middle + 0.5) / _BINS_PER_PIXEL


def doubt_of(summary: NucleiSummary, left_out: float, config: ModelConfig, *, estimated: bool) -> str | None:
    """Return why the result for an image may be wrong, or None.

    Args:
        summary: Summary of its nuclei.
        left_out: Part of what the network takes for nuclei that is in none of them, 0 to 1.
        config: Configuration of the model.
        estimated: Whether the size of the nuclei was estimated.
    """
    lowest, diameters, diameter = config.lowest_score, config.diameters, summary.median_diameter
    if summary.score is None or diameter is None:
        return "no nuclei found"
    if lowest is not None and summary.score < lowest:
        return (
            f"unsure: mean score {summary.score:.2f}, below {lowest:.2f}, the lowest in validation; "
            "the image is unlike those of training"
        )
    if lowest is not None and left_out > _MUCH_LEFT_OUT:  # thresholds that nobody tuned leave out much
        return (
            f"unsure: {left_out:.0%} of what may be nuclei is left out as too uncertain or too small, where "
            f"{_MUCH_LEFT_OUT:.0%} are usual at most; look at the overlay"
        )
    if estimated and diameters is not None and diameter > _FAR_LARGER * diameters[1]:
        return (
            f"large: median diameter {diameter:.0f} px, in training at most {diameters[1]:.0f}; if these are not "
            "nuclei but tissues or embryos of many, give the diameter of a nucleus (--diameter)"
        )
    return None


def image_row(
    frame: Frame,
    summary: NucleiSummary,
    nucleus_pixels: int,
    seen: ScaledImage,
    warning: str | None,
) -> dict[str, Any]:
    """Return the measurements of a whole image, a dictionary with the keys `IMAGE_COLUMNS`.

    Args:
        frame: Frame of the whole image.
        summary: Summary of its nuclei.
        nucleus_pixels: Number of pixels in nuclei.
        seen: The image as the network saw it.
        warning: Why the result may be wrong, or None.
    """
    height, width = frame.shape
    pixels, nuclei, size = height * width, summary.nuclei, frame.pixel_size
    score, diameter = summary.score, summary.median_diameter
    return {
        **frame.keys,
        "width": width,
        "height": height,
        "nuclei": nuclei,
        "nuclei_per_megapixel": round(nuclei / pixels * 1e6, 3),
        "coverage": round(nucleus_pixels / pixels, 5),
        "mean_area": round(nucleus_pixels / nuclei, 3) if nuclei else None,
        "median_diameter": None if diameter is None else round(diameter, 2),
        "pixel_size_um": size,
        "nuclei_per_mm2": None if size is None else round(nuclei / (pixels * size**2) * 1e6, 3),
        "channels": "; ".join(name.replace(";", ",") for name in frame.channels) or None,
        "scale": round(seen.scale, 4),
        "light": None if seen.light is None else seen.light.kind,
        "smoothing": round(seen.smoothing, 2) or None,
        "score": None if score is None else round(score, 4),
        "warning": warning,
    }


def _integrated(pixels: NDArray[Any], labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return the sum of the grey values of each label (from 0) in each channel."""
    flat = labels.ravel()
    return np.stack([np.bincount(flat, pixels[..., c].ravel()) for c in range(pixels.shape[2])], axis=1)


def _labels_at_edge(frame: Frame, labels: NDArray[np.int32]) -> set[int]:
    """Return the labels that touch the edge of the whole image."""
    height, width = labels.shape
    lines = (
        (frame.top == 0, labels[0]),
        (frame.top + height == frame.shape[0], labels[-1]),
        (frame.left == 0, labels[:, 0]),
        (frame.left + width == frame.shape[1], labels[:, -1]),
    )
    return {value for at_edge, line in lines if at_edge for value in line.tolist()} - {0}


def table_schema(columns: Sequence[str]) -> pa.Schema:
    """Return the types of the columns of a table of nuclei or images."""
    return pa.schema([(column, _type(column)) for column in columns])


def _type(column: str) -> pa.DataType:
    if column in _TEXTS:
        return pa.string()
    if column == "touches_edge":
        return pa.bool_()
    return pa.int64() if column in _INTEGERS else pa.float64()
