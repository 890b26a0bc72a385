"""Measurements of nuclei and images: one row per nucleus, one row per image."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.lazy import skimage
from nucleus.predict.blocks import AssembledLabels, LabelledBlock
from nucleus.predict.source import ImageSource

__all__ = ["IMAGE_COLUMNS", "Frame", "frame_of", "image_row", "measure_blocks", "measure_nuclei", "nucleus_columns"]

_SHAPE = ("label", "centroid_x", "centroid_y", "area", "diameter", "eccentricity", "solidity")
_PHYSICAL = ("area_um2", "diameter_um")
IMAGE_COLUMNS = (
    *("image", "width", "height", "nuclei", "nuclei_per_megapixel", "coverage"),
    *("mean_area", "pixel_size_um", "nuclei_per_mm2"),
)


@dataclass(frozen=True)
class Frame:
    """The position of a part in its image.

    Attributes:
        image: Name of the image.
        shape: Height and width of the image, px.
        top: First row of the part.
        left: First column of the part.
        pixel_size: Side of a pixel, micrometres; None if unknown.
    """

    image: str
    shape: tuple[int, int]
    top: int = 0
    left: int = 0
    pixel_size: float | None = None


def nucleus_columns(channels: int) -> tuple[str, ...]:
    """Return the column names of a table of nuclei, for images of up to `channels` channels."""
    intensities = (f"{what}_{channel}" for channel in range(channels) for what in ("mean", "integrated"))
    return ("image", *_SHAPE, "touches_edge", *_PHYSICAL, *intensities)


def frame_of(source: ImageSource) -> Frame:
    """Return the frame of a whole image."""
    return Frame(source.name, (source.height, source.width), pixel_size=source.pixel_size)


def measure_blocks(
    image: Frame, blocks: Iterable[LabelledBlock], labels: AssembledLabels
) -> Iterator[list[dict[str, Any]]]:
    """Add the blocks of an image to its labels; yield the rows of each block's nuclei (`measure_nuclei`)."""
    for block in blocks:
        added, before = labels.add(block.labels, block.region)
        frame = replace(image, top=block.region.rows.start, left=block.region.columns.start)
        yield measure_nuclei(frame, block.channels, added, before)


def measure_nuclei(
    frame: Frame, pixels: NDArray[Any], labels: NDArray[np.int32], first: int = 0
) -> list[dict[str, Any]]:
    """Measure each nucleus of a part of an image.

    Args:
        frame: Position of the part.
        pixels: Grey values in the depth of the file, h x w x C.
        labels: Labels of the part, h x w, 0 background.
        first: Number that is added to the labels in the table.

    Returns:
        One dictionary per nucleus, with the keys `nucleus_columns(C)`. Lengths are in px, centroids in px of the whole
        image (the centre of the first pixel is 0, 0). `diameter` is that of the circle of the same area, `eccentricity`
        that of the ellipse with the same second moments; `solidity` is the area divided by that of the convex hull.
        `mean_0` and `integrated_0` are the mean and the sum of the grey values in channel 0 (red in an RGB image), and
        so on. `touches_edge` is true if the nucleus has a pixel at the edge of the image. Columns in micrometres are
        None if the pixel size is unknown.
    """
    table = _shapes(labels)
    numbers = table["label"].astype(np.int64)
    sums = _integrated(pixels, labels)[numbers]
    edge = _labels_at_edge(frame, labels)
    scale = frame.pixel_size
    rows = []
    for i, number in enumerate(numbers):
        area = int(table["area"][i])
        row: dict[str, Any] = {"image": frame.image}
        row |= {column: round(float(table[column][i]), 3) for column in _SHAPE}
        row |= {"label": int(number) + first, "area": area}
        row["centroid_x"] = round(float(table["centroid_x"][i]) + frame.left, 3)
        row["centroid_y"] = round(float(table["centroid_y"][i]) + frame.top, 3)
        row["touches_edge"] = int(number) in edge
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
    solidity = skimage.measure.regionprops_table(labels, properties=("label", "solidity"))["solidity"]
    return {"label": numbers, "solidity": solidity, **{name: values[numbers] for name, values in columns.items()}}


def image_row(frame: Frame, nuclei: int, nucleus_pixels: int) -> dict[str, Any]:
    """Return the measurements of a whole image, a dictionary with the keys `IMAGE_COLUMNS`.

    Args:
        frame: Frame of the whole image.
        nuclei: Number of nuclei.
        nucleus_pixels: Number of pixels in nuclei.
    """
    height, width = frame.shape
    pixels = height * width
    scale = frame.pixel_size
    return {
        "image": frame.image,
        "width": width,
        "height": height,
        "nuclei": nuclei,
        "nuclei_per_megapixel": round(nuclei / pixels * 1e6, 3),
        "coverage": round(nucleus_pixels / pixels, 5),
        "mean_area": round(nucleus_pixels / nuclei, 3) if nuclei else None,
        "pixel_size_um": scale,
        "nuclei_per_mm2": None if scale is None else round(nuclei / (pixels * scale**2) * 1e6, 3),
    }


def _integrated(pixels: NDArray[Any], labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return the sum of the grey values of each label (from 0) in each channel."""
    flat = labels.ravel()
    return np.stack([np.bincount(flat, pixels[..., c].ravel()) for c in range(pixels.shape[2])], axis=1)


def _labels_at_edge(frame: Frame, labels: NDArray[np.int32]) -> set[int]:
    """Return the labels that touch the edge of the whole image."""
    height, width = labels.shape
    lines = {
        0: (frame.top == 0, labels[0]),
        1: (frame.top + height == frame.shape[0], labels[-1]),
        2: (frame.left == 0, labels[:, 0]),
        3: (frame.left + width == frame.shape[1], labels[:, -1]),
    }
    return {int(value) for at_edge, line in lines.values() if at_edge for value in np.unique(line)} - {0}
