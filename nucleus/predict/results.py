"""The results of one image: its nuclei in the formats that were asked for, and a picture of their outlines."""

import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import RgbImage, encode_png
from nucleus.pictures import draw_overlay
from nucleus.predict.blocks import LabelledBlock, assembled_labels
from nucleus.predict.formats import ENDINGS, LABEL_FORMATS, FormatName, open_outlines, result_path, write_labels
from nucleus.predict.measurement import NucleiSummary, frame_of, image_row, measure_blocks
from nucleus.predict.model import Model
from nucleus.predict.scaled_image import ScaledImage
from nucleus.storage.files import write_atomic

__all__ = ["ALL_ENDINGS", "OVERLAY_ENDING", "RowWriter", "output_endings", "overlay_of", "write_image"]

_LARGEST_SIDE = 4096
OVERLAY_ENDING = ".overlay.png"
ALL_ENDINGS = (*ENDINGS.values(), OVERLAY_ENDING)
"""Endings of all results of an image."""


def output_endings(formats: Sequence[FormatName]) -> tuple[str, ...]:
    """Return the endings of the results of an image in some formats."""
    return (*(ENDINGS[name] for name in formats), OVERLAY_ENDING)


def overlay_of(image: ScaledImage, labels: NDArray[np.integer], diameter: float | None = None) -> RgbImage:
    """Return the image with its nuclei outlined, reduced by an integer factor to at most 4,096 px per side.

    See `nucleus.pictures.draw_overlay`.

    The image is read band by band, to limit the memory needed.

    Args:
        image: The image.
        labels: Labels of the nuclei, H x W, 0 background.
        diameter: Median diameter of the nuclei, px; None without nuclei.

    Returns:
        h x w x 3, uint8.
    """
    source = image.source
    every = -(-max(source.height, source.width) // _LARGEST_SIDE)
    bands = []
    for rows in source.bands(every):
        pixels = image.rgb(rows, slice(0, source.width))
        size = (-(-source.width // every), -(-pixels.shape[0] // every))
        bands.append(pixels if every == 1 else cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
    return draw_overlay(np.concatenate(bands), labels[::every, ::every], diameter, every)


class RowWriter(Protocol):
    """A table that accepts rows, such as `csv.DictWriter`."""

    def writerows(self, rowdicts: Iterable[dict[str, Any]], /) -> None:
        """Add rows."""


def write_image(
    model: Model,
    image: ScaledImage,
    blocks: Iterable[LabelledBlock],
    stem: Path,
    table: RowWriter,
    formats: Sequence[FormatName] = ("labels",),
) -> dict[str, Any]:
    """Write the nuclei of an image in some formats, block by block, and its overlay; return the row of the image.

    Args:
        model: The model, which judges the result.
        image: The image.
        blocks: Nuclei of the image, from `Model.segment_blocks`.
        stem: Path without endings, of `output_endings(formats)`.
        table: Table to which the nuclei are added.
        formats: Formats of the nuclei, by `check_formats`.

    Raises:
        ImageError: A part of the image is damaged, or the image is too large for a format.
        OutputError: The files cannot be written.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    frame, summary = frame_of(image.source), NucleiSummary()
    with assembled_labels(frame.shape, stem.parent) as labels, ExitStack() as files:
        outlines = [
            files.enter_context(open_outlines(name, stem, frame, repr(model)))
            for name in formats
            if name not in LABEL_FORMATS
        ]
        for part in measure_blocks(frame, blocks, labels):
            table.writerows(part.rows)
            summary.add(part.rows)
            for add in outlines:
                add(part)
        for name in LABEL_FORMATS & set(formats):
            write_labels(name, stem, labels, frame)
        overlay = overlay_of(image, labels.labels, summary.median_diameter)
        write_atomic(result_path(stem, OVERLAY_ENDING), encode_png(overlay))
        _remove(stem, set(ALL_ENDINGS) - set(output_endings(formats)))
        return image_row(frame, summary, labels.pixels, image, model.doubt(summary))


def _remove(stem: Path, endings: set[str]) -> None:
    """Remove the results that an earlier prediction wrote in other formats, because they are of other nuclei."""
    for ending in endings:
        path = result_path(stem, ending)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
