"""Predict image files: labels, overlay and tables on disk."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nucleus.data.images import encode_png
from nucleus.errors import ImageError
from nucleus.predict.canvas import label_canvas
from nucleus.predict.inputs import LABELS_ENDING, OVERLAY_ENDING
from nucleus.predict.measurement import IMAGE_COLUMNS, NUCLEUS_COLUMNS, Frame, image_row, measure_nuclei
from nucleus.predict.overlay import draw_overlay
from nucleus.predict.predictor import LabelledBlock, Predictor
from nucleus.predict.sources import open_source
from nucleus.predict.view import NetworkView
from nucleus.progress import Advance, no_progress
from nucleus.storage.files import atomic_path, write_atomic

__all__ = ["IMAGES_TABLE", "NUCLEI_TABLE", "PredictedFiles", "predict_files"]

NUCLEI_TABLE = "nuclei.csv"
IMAGES_TABLE = "images.csv"
_FILES_AT_ONCE = 8


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

    An image that cannot be read is reported and the others go on.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    failures: dict[str, str] = {}
    with (
        _table(out / NUCLEI_TABLE, NUCLEUS_COLUMNS) as nuclei_table,
        _table(out / IMAGES_TABLE, IMAGE_COLUMNS) as images_table,
    ):
        done = 0
        remaining = iter(files)
        while chunk := list(islice(remaining, _FILES_AT_ONCE)):
            views = _open_all(predictor, chunk, channel, failures)
            for (file, view), blocks in zip(views.items(), predictor.segment(list(views.values())), strict=True):
                row = _write_image(predictor, view, blocks, out / file.stem, nuclei_table)
                images_table.writerow(row)
                counts[file.name] = row["nuclei"]
                done += 1
                advance(done + len(failures), len(files))
            advance(done + len(failures), len(files))
    return PredictedFiles(counts, failures)


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


def _write_image(
    predictor: Predictor,
    view: NetworkView,
    blocks: Iterable[LabelledBlock],
    stem: Path,
    table: "csv.DictWriter[str]",
) -> dict[str, Any]:
    """Write an image's labels, overlay and nuclei, block by block; return its row."""
    source = view.source
    whole = Frame(source.name, (source.height, source.width), pixel_size=predictor.pixel_size(source))
    pixels = 0
    with label_canvas(whole.shape, stem.parent) as canvas:
        for block in blocks:
            first = canvas.paste(block.labels, block.region)
            pixels += int(np.count_nonzero(block.labels))
            frame = replace(whole, top=block.region.rows.start, left=block.region.columns.start)
            table.writerows(measure_nuclei(frame, block.pixels, block.labels, first))
        canvas.write(stem.with_name(f"{stem.name}{LABELS_ENDING}"))
        overlay = draw_overlay(view, canvas.labels)
        write_atomic(stem.with_name(f"{stem.name}{OVERLAY_ENDING}"), encode_png(overlay))
        return image_row(whole, canvas.count, pixels)


@contextmanager
def _table(path: Path, columns: Iterable[str]) -> Iterator["csv.DictWriter[str]"]:
    """A CSV file that appears when the block ends well."""
    with atomic_path(path) as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        yield writer
