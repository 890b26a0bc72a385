"""Predict image files: labels, overlay and tables on disk."""

import csv
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, TextIO

import numpy as np

from nucleus.data.images import encode_png
from nucleus.errors import ImageError
from nucleus.predict.canvas import label_canvas
from nucleus.predict.inputs import FILES_AT_ONCE, IMAGES_TABLE, LABELS_ENDING, NUCLEI_TABLE, OVERLAY_ENDING
from nucleus.predict.measurement import IMAGE_COLUMNS, Frame, image_row, measure_nuclei, nucleus_columns
from nucleus.predict.overlay import draw_overlay
from nucleus.predict.predictor import LabelledBlock, Predictor
from nucleus.predict.sources import channel_count, open_source
from nucleus.predict.view import NetworkView
from nucleus.progress import Advance, no_progress
from nucleus.storage.files import atomic_path, write_atomic

__all__ = ["PredictedFiles", "RowWriter", "predict_files", "write_image"]


class RowWriter(Protocol):
    """Takes rows of a table, as `csv.DictWriter` does."""

    def writerows(self, rowdicts: Iterable[dict[str, Any]], /) -> None:
        """Add rows."""


@dataclass(frozen=True)
class PredictedFiles:
    """What a prediction left.

    Attributes:
        counts: Nuclei in each image, by file name.
        failures: Message for each image that could not be read, by file name.
    """

    counts: dict[str, int]
    failures: dict[str, str]


def predict_files(
    predictor: Predictor,
    files: Sequence[Path],
    out: Path,
    channel: int | None = None,
    advance: Advance = no_progress,
) -> PredictedFiles:
    """Segment each file; write `<stem>.labels.tif` and `<stem>.overlay.png`, and one `nuclei.csv` and `images.csv`.

    An image that cannot be read is reported and the others go on. `nuclei.csv` has columns for as many channels as the
    image with the most of them has; they are empty for images that have fewer.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    failures: dict[str, str] = {}
    with (
        _table(out / NUCLEI_TABLE, nucleus_columns(_most_channels(files))) as nuclei,
        _table(out / IMAGES_TABLE, IMAGE_COLUMNS) as images,
    ):
        remaining = iter(files)
        while chunk := list(islice(remaining, FILES_AT_ONCE)):
            views = _open_all(predictor, chunk, channel, failures)
            for (file, view), blocks in zip(views.items(), predictor.segment(list(views.values())), strict=True):
                try:
                    with nuclei.rows() as rows:
                        row = write_image(predictor, view, blocks, out / file.stem, rows)
                except ImageError as error:  # a channel that is only measured may be damaged
                    failures[file.name] = str(error)
                else:
                    images.add(row)
                    counts[file.name] = row["nuclei"]
                advance(len(counts) + len(failures), len(files))
            advance(len(counts) + len(failures), len(files))
    return PredictedFiles(counts, failures)


def _most_channels(files: Sequence[Path]) -> int:
    """The largest number of channels, at least one; files that cannot be read are reported when their turn comes."""
    found = [1]
    for file in files:
        with suppress(ImageError):
            found.append(channel_count(file))
    return max(found)


def _open_all(
    predictor: Predictor, files: Sequence[Path], channel: int | None, failures: dict[str, str]
) -> dict[Path, NetworkView]:
    """The files that can be read; messages for the others go to `failures`."""
    views = {}
    for file in files:
        try:
            views[file] = predictor.view(open_source(file, channel))
        except ImageError as error:
            failures[file.name] = str(error)
    return views


def write_image(
    predictor: Predictor,
    view: NetworkView,
    blocks: Iterable[LabelledBlock],
    stem: Path,
    table: RowWriter,
) -> dict[str, Any]:
    """Write an image's labels, overlay and nuclei, block by block; return its row.

    Args:
        predictor: Has segmented the image.
        view: The image.
        blocks: Its nuclei.
        stem: The files are `<stem>.labels.tif` and `<stem>.overlay.png`.
        table: Is given the nuclei.

    Raises:
        ImageError: A part of the image is damaged.
    """
    source = view.source
    whole = Frame(source.name, (source.height, source.width), pixel_size=predictor.pixel_size(source))
    pixels = 0
    with label_canvas(whole.shape, stem.parent) as canvas:
        for block in blocks:
            labels, first = canvas.paste(block.labels, block.region)
            pixels += int(np.count_nonzero(labels))
            frame = replace(whole, top=block.region.rows.start, left=block.region.columns.start)
            table.writerows(measure_nuclei(frame, block.channels, labels, first))
        canvas.write(stem.with_name(f"{stem.name}{LABELS_ENDING}"))
        overlay = draw_overlay(view, canvas.labels)
        write_atomic(stem.with_name(f"{stem.name}{OVERLAY_ENDING}"), encode_png(overlay))
        return image_row(whole, canvas.count, pixels)


class _Table:
    """A CSV file with a row of column names."""

    def __init__(self, file: TextIO, columns: Sequence[str]) -> None:
        self._file = file
        self._columns = columns
        self._writer(file).writeheader()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self._writer(self._file).writerow(row)

    @contextmanager
    def rows(self) -> Iterator["csv.DictWriter[str]"]:
        """Takes the rows of an image, which are added when the block ends well; memory does not grow with them."""
        with tempfile.TemporaryFile("w+", newline="", encoding="utf-8") as spooled:
            yield self._writer(spooled)
            spooled.seek(0)
            shutil.copyfileobj(spooled, self._file)

    def _writer(self, file: IO[str]) -> "csv.DictWriter[str]":
        return csv.DictWriter(file, self._columns, restval="", lineterminator="\n")


@contextmanager
def _table(path: Path, columns: Sequence[str]) -> Iterator[_Table]:
    """A CSV file that appears when the block ends well."""
    with atomic_path(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        yield _Table(file, columns)
