"""Pictures for people: nuclei outlined on their image."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import IMAGE_SUFFIXES, RgbImage, encode_png
from nucleus.errors import ImageError, UsageError
from nucleus.pictures import draw_outlines
from nucleus.predict.blocks import label_canvas
from nucleus.predict.measurement import IMAGE_COLUMNS, Frame, image_row, measure_nuclei, nucleus_columns
from nucleus.predict.model import LabelledBlock, Predictor
from nucleus.predict.nuclei_tables import RowWriter, csv_table
from nucleus.predict.source import NetworkView, channel_count, open_source
from nucleus.progress import Advance, no_progress
from nucleus.storage.files import write_atomic

__all__ = [
    "FILES_AT_ONCE",
    "IMAGES_TABLE",
    "LABELS_ENDING",
    "NUCLEI_TABLE",
    "OUTPUT_ENDINGS",
    "OVERLAY_ENDING",
    "PredictedFiles",
    "check_outputs",
    "check_stems",
    "draw_overlay",
    "find_inputs",
    "predict_files",
    "write_image",
]

_LARGEST_SIDE = 4096


def draw_overlay(view: NetworkView, labels: NDArray[np.integer]) -> RgbImage:
    """The image with its nuclei outlined, reduced by a whole number to at most 4,096 px a side, read band by band."""
    source = view.source
    every = -(-max(source.height, source.width) // _LARGEST_SIDE)
    bands = []
    for rows in source.bands(every):
        pixels = view.rgb(rows, slice(0, source.width))
        size = (-(-source.width // every), -(-pixels.shape[0] // every))
        bands.append(pixels if every == 1 else cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
    return draw_outlines(np.concatenate(bands), labels[::every, ::every])


FILES_AT_ONCE = 8
"""Images that are opened together, so that small ones are computed together."""

LABELS_ENDING = ".labels.tif"
OVERLAY_ENDING = ".overlay.png"
OUTPUT_ENDINGS = (LABELS_ENDING, OVERLAY_ENDING)
NUCLEI_TABLE = "nuclei.csv"
IMAGES_TABLE = "images.csv"


def find_inputs(inputs: Sequence[Path]) -> list[Path]:
    """The image files that arguments name: files as they are, and those directly in folders.

    Raises:
        UsageError: A path does not exist, there are no images, or two would write the same output.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(item for item in path.iterdir() if _is_input(item))
        elif path.exists():
            files.append(path)
        else:
            raise UsageError(f"Expected an image or a folder at {path}; nothing is there.")
    if not files:
        raise UsageError(f"Expected image files in {', '.join(map(str, inputs))}; found none.")
    check_stems([(file.stem, str(file)) for file in files])
    return files


def check_stems(images: Iterable[tuple[str, str]]) -> None:
    """Raise `UsageError` if two images, each a stem and a full name, would write the same output."""
    stems: dict[str, str] = {}
    for number, (stem, name) in enumerate(images):
        other = stems.setdefault(stem, name)
        if len(stems) <= number:
            raise UsageError(
                f"Expected images of different names; {other} and {name} would both write {stem}{LABELS_ENDING}. "
                "Run them with different --out folders."
            )


def check_outputs(files: Sequence[Path], out: Path) -> None:
    """Raise `UsageError` if a prediction of these files into `out` would replace files that are there."""
    names = [f"{file.stem}{ending}" for file in files for ending in OUTPUT_ENDINGS]
    there = [name for name in (NUCLEI_TABLE, IMAGES_TABLE, *names) if (out / name).exists()]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UsageError(
            f"Expected nothing in {out} that would be replaced; found {there[0]}{more}. Name another --out, or add "
            "--overwrite."
        )


def _is_input(path: Path) -> bool:
    """Whether a file of a folder is an image, and none that an earlier prediction wrote there."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.endswith(OUTPUT_ENDINGS)


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
        csv_table(out / NUCLEI_TABLE, nucleus_columns(_most_channels(files))) as nuclei,
        csv_table(out / IMAGES_TABLE, IMAGE_COLUMNS) as images,
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
