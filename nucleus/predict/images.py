"""Predict image files: labels, overlay and table on disk."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from nucleus.data.images import RgbImage, decode_image, encode_png
from nucleus.errors import ImageError
from nucleus.predict.inputs import LABELS_ENDING, OVERLAY_ENDING
from nucleus.predict.measurement import COLUMNS, measure_nuclei
from nucleus.predict.overlay import draw_outlines
from nucleus.predict.predictor import Predictor
from nucleus.progress import Advance, no_progress
from nucleus.storage.files import atomic_path, write_atomic

__all__ = ["PredictedFiles", "predict_files"]


@dataclass(frozen=True)
class PredictedFiles:
    """What a prediction left.

    Attributes:
        counts: Nuclei in each image, by file name.
        failures: Message for each image that could not be read, by file name.
        table: The CSV file.
    """

    counts: dict[str, int]
    failures: dict[str, str]
    table: Path


def predict_files(
    predictor: Predictor,
    files: Sequence[Path],
    out: Path,
    advance: Advance = no_progress,
) -> PredictedFiles:
    """Segment each file; write `<stem>.labels.tif`, `<stem>.overlay.png` and, at the end, one `nuclei.csv`.

    An image that cannot be read is reported and the others go on.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    failures: dict[str, str] = {}
    for done, file in enumerate(files, 1):
        try:
            image = _read(file)
        except ImageError as error:
            failures[file.name] = str(error)
        else:
            found = _predict_file(predictor, file, image, out)
            counts[file.name] = len(found)
            rows += found
        advance(done, len(files))
    table = out / "nuclei.csv"
    write_atomic(table, _csv(rows))
    return PredictedFiles(counts, failures, table)


def _read(file: Path) -> RgbImage:
    try:
        return decode_image(file.read_bytes(), str(file))
    except OSError as error:
        raise ImageError(f"Cannot read {file}: {error.strerror}.") from error


def _predict_file(predictor: Predictor, file: Path, image: RgbImage, out: Path) -> list[dict[str, Any]]:
    labels = predictor(image).labels
    stored = labels.astype(np.uint16) if labels.max() <= np.iinfo(np.uint16).max else labels.astype(np.uint32)
    with atomic_path(out / f"{file.stem}{LABELS_ENDING}") as beside:
        tifffile.imwrite(beside, stored, compression="zlib")
    write_atomic(out / f"{file.stem}{OVERLAY_ENDING}", encode_png(draw_outlines(image, labels)))
    return measure_nuclei(file.name, image, labels)


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
