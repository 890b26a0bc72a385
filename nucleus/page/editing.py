"""What the page computes for corrections: a missed nucleus at a click, measurements of drawn ones, and downloads."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nucleus.config.names import FormatName
from nucleus.data.images import encode_png
from nucleus.errors import UsageError
from nucleus.model.instances import label_nuclei
from nucleus.model.tiling import Region
from nucleus.page.layers import (
    Changes,
    NucleusShape,
    changed_labels,
    filled_shape,
    packed_outlines,
    parts_of,
)
from nucleus.predict.blocks import AssembledLabels
from nucleus.predict.formats import ENDINGS, open_outlines, result_path, write_labels
from nucleus.predict.measurement import (
    Frame,
    MeasuredPart,
    NucleiSummary,
    frame_of,
    measure_nuclei,
    nucleus_columns,
)
from nucleus.predict.model import Model
from nucleus.predict.outlines import outlines_of
from nucleus.predict.results import overlay_of
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.table_files import csv_table

__all__ = [
    "DOWNLOADS",
    "Download",
    "EditedImage",
    "edited_nuclei",
    "measure_labels",
    "measure_shape",
    "missed_nucleus",
    "write_download",
]

Download = Literal["labels", "csv", "geojson", "roi", "coco", "picture"]
DOWNLOADS: dict[Download, str] = {
    "labels": ENDINGS["labels"],
    "csv": ".nuclei.csv",
    "geojson": ENDINGS["geojson"],
    "roi": ENDINGS["roi"],
    "coco": ENDINGS["coco"],
    "picture": ".overlay.png",
}
"""What can be downloaded, and the ending of its file."""
_WRITERS: dict[Download, FormatName] = {"geojson": "geojson", "roi": "roi", "coco": "coco"}
_AROUND = 64
"""Pixels around a nucleus that the network sees when it is measured."""
_REACH = 4
"""Half side of the part in which a missed nucleus is looked for, in typical diameters."""
_LEAST_REACH, _LARGEST_REACH = 96, 512
_FALLBACK_DIAMETER = 24.0
_NOTHING = 0.06
"""Values of the maps below this are no sign of a nucleus."""
_LOWER = 0.5
"""Part of the values at the click that the thresholds become."""
_FEWEST_PIXELS = 6


@dataclass(frozen=True)
class EditedImage:
    """An image with what is needed to measure in it.

    Attributes:
        model: The model that found its nuclei.
        scaled: The image as the network sees it.
    """

    model: Model
    scaled: ScaledImage

    @property
    def frame(self) -> Frame:
        """Frame of the whole image."""
        return frame_of(self.scaled.source)

    def part(self, region: Region) -> ScaledImage:
        """Return a part of the image, with the grey values of the whole."""
        return self.scaled.at(self.scaled.scale, region)


def missed_nucleus(
    image: EditedImage, x: float, y: float, taken: Sequence[NucleusShape], diameter: float | None
) -> bytes | None:
    """Return the outline of the nucleus that the network sees at a point, at lower thresholds; None if it sees none.

    The thresholds are half of what the maps have near the point. Pixels of other nuclei are left out.

    Args:
        image: The image.
        x: Column of the point, px.
        y: Row of the point, px.
        taken: Nuclei near the point.
        diameter: Typical diameter of the nuclei, px; None if unknown.

    Returns:
        The outline, from `packed_outlines`, with label 0.

    Raises:
        UsageError: The point is outside the image.
    """
    height, width = image.scaled.source_shape
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(f"Expected a point within {width} x {height} px; found {x:g}, {y:g}.")
    size = diameter or image.model.config.nucleus_diameter or _FALLBACK_DIAMETER
    reach = int(min(_LARGEST_REACH, max(_LEAST_REACH, _REACH * size)))
    region = _square(int(x), int(y), reach, (height, width))
    maps = image.model.maps(image.part(region))
    free = ~_covered(taken, region, (height, width))
    mask, interior = maps.mask * free, maps.interior * free
    row, column = int(y) - region.rows.start, int(x) - region.columns.start
    near = _disc(mask.shape, row, column, max(2.0, size / 4)) & free
    if not near.any() or float(mask[near].max()) < _NOTHING:
        return None
    peak = np.unravel_index(int(np.argmax(np.where(near, interior + mask, -1))), mask.shape)
    settings = image.model.config.instances
    lower = settings.model_copy(
        update={
            "mask_threshold": float(min(settings.mask_threshold, max(_NOTHING, _LOWER * mask[peak]))),
            "seed_threshold": float(min(settings.seed_threshold, max(1e-3, _LOWER * interior[peak]))),
            "min_seed_area": 1,
            "min_area": 1,
            "min_score": 0.0,
        }
    )
    labels = label_nuclei(replace(maps, mask=mask, interior=interior), lower)
    one = np.where(labels == labels[peak], np.int32(1), np.int32(0)) if labels[peak] else np.zeros_like(labels)
    if np.count_nonzero(one) < _FEWEST_PIXELS:
        return None
    (outline,) = outlines_of(one, top=region.rows.start, left=region.columns.start)
    return packed_outlines([replace(outline, label=0)])


def _square(x: int, y: int, reach: int, size: tuple[int, int]) -> Region:
    return Region(slice(max(0, y - reach), min(size[0], y + reach)), slice(max(0, x - reach), min(size[1], x + reach)))


def _disc(shape: tuple[int, ...], row: int, column: int, radius: float) -> NDArray[np.bool_]:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.asarray((rows - row) ** 2 + (columns - column) ** 2 <= radius**2)


def _covered(shapes: Sequence[NucleusShape], region: Region, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels of a region that nuclei cover."""
    whole = np.zeros(region.shape, np.bool_)
    for shape in shapes:
        box, pixels = filled_shape(shape, size)
        top, left = max(box.rows.start, region.rows.start), max(box.columns.start, region.columns.start)
        bottom, right = min(box.rows.stop, region.rows.stop), min(box.columns.stop, region.columns.stop)
        if top < bottom and left < right:
            whole[top - region.rows.start : bottom - region.rows.start,
                  left - region.columns.start : right - region.columns.start] |= pixels[
                top - box.rows.start : bottom - box.rows.start, left - box.columns.start : right - box.columns.start
            ]  # fmt: skip
    return whole


def measure_shape(image: EditedImage, shape: NucleusShape) -> dict[str, Any]:
    """Return the row of a nucleus that was drawn, as in `nuclei.csv`; the network sees the pixels around it again.

    Raises:
        UsageError: The nucleus has no pixel, or lies outside the image.
    """
    region, pixels = filled_shape(shape, image.scaled.source_shape)
    (part,) = _measured(image, [(region, pixels.astype(np.int32), [shape.label])])
    return part.rows[0]


def measure_labels(image: EditedImage, labels: NDArray[np.int32]) -> Iterator[MeasuredPart]:
    """Yield the nuclei of labels (H x W) that were saved, measured as those of a prediction are."""
    return _measured(image, parts_of(image.frame, labels))


def _measured(
    image: EditedImage, parts: Iterable[tuple[Region, NDArray[np.int32], list[int]]]
) -> Iterator[MeasuredPart]:
    for region, labels, numbers in parts:
        seen = region.widened(_AROUND, image.scaled.source_shape)
        inner = np.s_[
            region.rows.start - seen.rows.start : region.rows.stop - seen.rows.start,
            region.columns.start - seen.columns.start : region.columns.stop - seen.columns.start,
        ]
        mask = image.model.maps(image.part(seen)).mask[inner]
        frame = replace(image.frame, top=region.rows.start, left=region.columns.start)
        pixels = image.scaled.source.read_channels(region.rows, region.columns)
        rows = measure_nuclei(frame, pixels, labels, mask)
        yield MeasuredPart(frame, labels, [row | {"label": numbers[row["label"] - 1]} for row in rows])


def write_download(
    what: Download,
    image: EditedImage,
    labels: AssembledLabels,
    rows: Iterable[dict[str, Any]],
    stem: Path,
) -> Path:
    """Write a file of an image's nuclei, as `nucleus predict` writes it; return its path.

    Args:
        what: Which file.
        image: The image.
        labels: Labels of the nuclei.
        rows: Row of each nucleus.
        stem: Path of the file without its ending.

    Raises:
        ImageError: The image is too large for the format.
        OutputError: The file cannot be written.
    """
    path = result_path(stem, DOWNLOADS[what])
    by_label = {row["label"]: row for row in rows}
    writers: dict[str, Callable[[], None]] = {
        "labels": lambda: write_labels(path, labels, image.frame),
        "csv": lambda: _write_table(path, image, [by_label[label] for label in sorted(by_label)]),
        "picture": lambda: _write_picture(path, image, labels, by_label),
    }
    writers.get(what, lambda: _write_outlines(_WRITERS[what], image, labels, by_label, stem))()
    return path


def _write_table(path: Path, image: EditedImage, rows: Sequence[dict[str, Any]]) -> None:
    channels = image.scaled.source.read_channels(slice(0, 1), slice(0, 1)).shape[2]
    with csv_table(path, nucleus_columns(channels)) as table, table.rows() as writer:
        writer.writerows(rows)


def _write_picture(path: Path, image: EditedImage, labels: AssembledLabels, rows: dict[int, dict[str, Any]]) -> None:
    summary = NucleiSummary()
    summary.add(rows.values())
    overlay = overlay_of(image.scaled, labels.labels, summary.median_diameter)
    path.write_bytes(encode_png(overlay))


def _write_outlines(
    name: FormatName, image: EditedImage, labels: AssembledLabels, rows: dict[int, dict[str, Any]], stem: Path
) -> None:
    with open_outlines(name, stem, image.frame, repr(image.model)) as add:
        for region, numbered, numbers in parts_of(image.frame, labels.labels):
            frame = replace(image.frame, top=region.rows.start, left=region.columns.start)
            add(MeasuredPart(frame, numbered, [rows[number] for number in numbers]))


def edited_nuclei(
    labels: NDArray[np.int32],
    rows: Sequence[dict[str, Any]],
    changes: Changes,
    measured: Callable[[NucleusShape], dict[str, Any]],
    folder: Path,
) -> tuple[AssembledLabels, list[dict[str, Any]]]:
    """Return the labels and rows of a layer with changes.

    Args:
        labels: Labels of the layer.
        rows: Its rows.
        changes: The changes.
        measured: Function that measures a nucleus, such as `measure_shape`, which may remember what it measured.
        folder: Folder for a temporary file, if the image is large.
    """
    changed, shapes = changed_labels(labels, changes, folder)
    touched = set(changes.labels)
    kept = [row for row in rows if row["label"] not in touched]
    return changed, kept + [measured(shape) for shape in shapes]
