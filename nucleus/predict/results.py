"""The results of one image: its nuclei in the formats that were asked for, and a picture of their outlines."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.names import DEFAULT_FORMATS, FormatName
from nucleus.data.images import RgbImage, encode_png
from nucleus.errors import OutputError
from nucleus.pictures import draw_overlay
from nucleus.predict.blocks import AssembledLabels, LabelledBlock, assembled_labels
from nucleus.predict.cells import Expansion, expanded_parts
from nucleus.predict.formats import (
    ALL_ENDINGS,
    CELL_ENDINGS,
    ENDINGS,
    LABEL_FORMATS,
    OUTLINE_FORMATS,
    Save,
    open_outlines,
    output_endings,
    result_path,
    write_labels,
)
from nucleus.predict.measurement import Frame, MeasuredPart, NucleiSummary, frame_of, image_row, measure_blocks
from nucleus.predict.model import Model
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.zarr_results import ImageLabels
from nucleus.storage.files import write_atomic

__all__ = ["RowWriter", "overlay_of", "remove_results", "replaced_results", "write_results"]

_LARGEST_SIDE = 4096


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


def write_results(
    model: Model,
    image: ScaledImage,
    blocks: Iterable[LabelledBlock],
    stem: Path,
    table: RowWriter,
    formats: Sequence[FormatName] = DEFAULT_FORMATS,
    expansion: Expansion | None = None,
    own_store: ImageLabels | None = None,
    save: Save | None = None,
) -> dict[str, Any]:
    """Write the results of an image in some formats, its nuclei block by block; return the row of the image.

    Args:
        model: The model, which judges the result.
        image: The image.
        blocks: Nuclei of the image, from `Model.segment_blocks`.
        stem: Path without endings, of `output_endings(formats)`, in a folder that exists.
        table: Table to which the nuclei are added.
        formats: Formats of the files, by `check_formats`; those of tables have no effect here.
        expansion: How far cells reach beyond their nuclei; None for nuclei alone. Labels of the cells lie beside those
            of the nuclei, GeoJSON has both; other outlines are of the nuclei.
        own_store: The OME-Zarr of the image, if its labels are written into that too.
        save: Writes files whose content is known as a whole: small labels, and overlays. None replaces them atomically.

    Raises:
        ImageError: A part of the image is damaged, or the image is too large for a format, or lacks the pixel size that
            an expansion needs.
        OutputError: The files cannot be written.
    """
    save = save or write_atomic
    frame, summary = frame_of(image.source), NucleiSummary()
    distance = None if expansion is None else expansion.pixels(frame)
    with ExitStack() as stack:
        labels, *cells = (
            stack.enter_context(assembled_labels(frame.shape, stem.parent)) for _ in range(1 if distance is None else 2)
        )
        parts = _parts(frame, blocks, labels, cells, distance, stem.parent)
        _write_parts(parts, stem, frame, repr(model), table, summary, formats)
        for endings, each in zip((ENDINGS, CELL_ENDINGS), (labels, *cells), strict=False):
            for name in LABEL_FORMATS & set(formats):
                write_labels(result_path(stem, endings[name]), each, frame, save)
            if own_store is not None:
                own_store.write(each, frame, cells=each is not labels)
        if "overlay" in formats:
            overlay = overlay_of(image, labels.labels, summary.median_diameter)
            save(result_path(stem, ENDINGS["overlay"]), encode_png(overlay))
        return image_row(frame, summary, labels.pixels, image, model.doubt(summary, labels.left_out))


def _parts(
    frame: Frame,
    blocks: Iterable[LabelledBlock],
    labels: AssembledLabels,
    cells: Sequence[AssembledLabels],
    distance: float | None,
    folder: Path,
) -> Iterator[MeasuredPart]:
    """Yield the measured nuclei of an image by blocks, with their cells if it has some."""
    if distance is None:
        return measure_blocks(frame, blocks, labels)
    return expanded_parts(frame, blocks, labels, cells[0], distance, folder)


def _write_parts(
    parts: Iterable[MeasuredPart],
    stem: Path,
    frame: Frame,
    source: str,
    table: RowWriter,
    summary: NucleiSummary,
    formats: Sequence[FormatName],
) -> None:
    """Write outlines and rows of the nuclei part by part."""
    with ExitStack() as files:
        chosen = [name for name in formats if name in OUTLINE_FORMATS]
        outlines = [files.enter_context(open_outlines(name, stem, frame, source)) for name in chosen]
        for part in parts:
            table.writerows(part.rows)
            summary.add(part.rows)
            for add in outlines:
                add(part)


@contextmanager
def replaced_results(stem: Path, formats: Sequence[FormatName], *, cells: bool) -> Iterator[None]:
    """Have the place of an image's results; afterwards, earlier ones in other formats are removed: of other nuclei.

    Args:
        stem: Path of the results without endings; its folder is made.
        formats: Formats of the new results.
        cells: Whether nuclei have cells.

    Raises:
        OutputError: A folder is called as a result, and would be replaced or removed, but is none.
    """
    for ending in ALL_ENDINGS:
        path = result_path(stem, ending)
        if path.is_dir() and not (path / "zarr.json").is_file():
            raise OutputError(
                f"Expected OME-Zarr labels of an earlier prediction in {path}; found another folder. Move it away, or "
                "choose another --out."
            )
    stem.parent.mkdir(parents=True, exist_ok=True)
    yield
    remove_results(stem, output_endings(formats, cells=cells))


def remove_results(stem: Path, kept: Sequence[str] = ()) -> None:
    """Remove the results of an image, which are those of an earlier prediction.

    Args:
        stem: Path of the results without endings.
        kept: Endings of results that stay.
    """
    for ending in set(ALL_ENDINGS).difference(kept):
        path = result_path(stem, ending)
        if (path / "zarr.json").is_file():
            shutil.rmtree(path)
        elif not path.is_dir():  # also a link to nowhere
            path.unlink(missing_ok=True)
