"""Prediction of image files: find the images; write the results of each, and the tables of all."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from nucleus.config.names import DEFAULT_FORMATS, FormatName
from nucleus.data.folder_listing import is_hidden, is_image, list_folder
from nucleus.data.images import encode_png
from nucleus.data.slides import SLIDE_SUFFIXES, slides_among
from nucleus.data.stacks import PlaneOptions
from nucleus.data.zarr_plates import image_paths, in_zarr, plate_field, zarr_name
from nucleus.data.zarr_store import ZarrFolder, is_zarr, local_zarr, why_no_zarr
from nucleus.errors import ImageError, OutputError, UsageError
from nucleus.predict.blocks import LabelledBlock
from nucleus.predict.cells import Expansion
from nucleus.predict.formats import ALL_ENDINGS, ENDINGS, LONGEST_ENDING
from nucleus.predict.measurement import frame_of, image_columns, nucleus_columns
from nucleus.predict.model import IMAGES_AT_ONCE, Model
from nucleus.predict.planes import FileImage, ImageOpener, PlannedImages, plan_images
from nucleus.predict.plates import PLATE_ENDING, Wells, draw_plate, plates_of
from nucleus.predict.results import remove_results, replaced_results, write_results
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.table_files import IMAGES_TABLE, NUCLEI_TABLE, TABLE_FILES, CsvTable, csv_table, finish_tables
from nucleus.predict.zarr_results import ImageLabels, IntoImage
from nucleus.progress import Advance, no_progress
from nucleus.storage.files import write_atomic, writing
from nucleus.surroundings import name_on_disk
from nucleus.text import plural

__all__ = [
    "Inputs",
    "PredictedFiles",
    "check_outputs",
    "check_stems",
    "find_inputs",
    "is_input",
    "predict_files",
    "stem_of",
    "why_not_read",
]

_RESULTS = (*ALL_ENDINGS, PLATE_ENDING)
"""Endings of the results of earlier predictions, which are no images to predict."""
_NOT_READ = {
    ".czi": "Zeiss CZI",
    ".zvi": "Zeiss ZVI",
    ".nd2": "Nikon ND2",
    ".lif": "Leica LIF",
    ".oib": "Olympus OIB",
    ".oif": "Olympus OIF",
    ".oir": "Olympus OIR",
    ".vsi": "Olympus VSI",
    ".ims": "Imaris",
    ".dv": "DeltaVision",
    ".stk": "MetaMorph",
    ".gif": "GIF",
    ".heic": "HEIF",
    ".avif": "AVIF",
    ".jp2": "JPEG 2000",
    ".jxl": "JPEG XL",
}
"""Images of formats that are not read, by their suffix: in a folder they are named, because they would be missed."""
_LONGEST_NAME = 255
"""Bytes of a file name on Linux."""


@dataclass(frozen=True)
class Inputs:
    """Images to predict.

    Attributes:
        images: Files of the images by their names, which are relative paths with forward slashes. Results get the same
            paths below the output. Images in OME-Zarr are folders, or groups in a bucket.
        unread: Reason for each path that could not be read.
        notes: What plates list, but do not have: one sentence for each.
    """

    images: dict[str, Path | ZarrFolder]
    unread: dict[str, str]
    notes: list[str] = field(default_factory=list)


def find_inputs(inputs: Sequence[Path | ZarrFolder], series: int | str | None = None) -> Inputs:
    """Find the images of the arguments: files themselves, those in folders at any depth, and those in OME-Zarr.

    Names are relative to the folder; if there are several arguments, they begin with the name of the folder.

    Args:
        inputs: Files, folders and OME-Zarr.
        series: Which images of bioformats2raw to take; see `nucleus.data.PlaneOptions`.

    Raises:
        UsageError: A path does not exist, there are no images, or two images would have the same output.
        DataError: A folder cannot be read.
    """
    found: list[tuple[str, Path | ZarrFolder]] = []
    inside = Inputs({}, {})
    for path in inputs:
        if isinstance(path, ZarrFolder):
            found += _zarr_images(zarr_name(path.name), path, inside, series)
        elif not _is_folder(path):
            found.append((path.name, path))
        elif in_zarr(path.absolute().as_posix()):
            found += _zarr_images(zarr_name(path.absolute().as_posix()), path, inside, series)
        else:
            found += _below(path, path.name or path.resolve().name if len(inputs) > 1 else "", inside, series)
    if not found:
        reasons = "".join(f" {reason}" for reason in list(inside.unread.values())[:3])
        raise UsageError(f"Expected images in {', '.join(map(str, inputs))}; found none.{reasons}")
    check_stems([(stem_of(name), str(path)) for name, path in found], name_on_disk)
    return replace(inside, images=dict(found))


def _below(
    folder: Path, above: str, inside: Inputs, series: int | str | None
) -> Iterator[tuple[str, Path | ZarrFolder]]:
    """Yield the names and places of the images below a folder; add what cannot be read to `inside`."""
    if (nameless := why_no_zarr(folder)) is not None:
        inside.unread[str(PurePosixPath(above))] = nameless
        return
    listing = list_folder(folder, lambda path: is_input(path) or why_not_read(path) is not None, zarr=True)
    for name in slides_among(folder, listing.files):
        path, shown = folder / name, str(PurePosixPath(above) / name)
        reason = why_not_read(name)
        if reason is not None:
            inside.unread[shown] = f"{path}: {reason}"
            continue
        yield from _zarr_images(shown, path, inside, series) if is_zarr(name) and path.is_dir() else [(shown, path)]
    for name, reason in listing.unread.items():
        inside.unread[str(PurePosixPath(above) / name)] = f"{folder / name}: {reason}"


def _zarr_images(
    name: str, place: Path | ZarrFolder, inside: Inputs, series: int | str | None
) -> list[tuple[str, Path | ZarrFolder]]:
    """Return the names and places of the images in OME-Zarr; add what it lacks, or why it is not read, to `inside`."""
    folder = local_zarr(place) if isinstance(place, Path) else place
    try:
        paths = image_paths(folder, inside.notes.append, series)
    except ImageError as error:
        inside.unread[name] = str(error)
        return []
    places = [place / path if isinstance(place, Path) else folder.below(path) if path else folder for path in paths]
    return [(f"{name}/{path}".rstrip("/"), each) for path, each in zip(paths, places, strict=True)]


def _is_folder(path: Path) -> bool:
    """Return whether an argument is a folder. Raises `UsageError` if it is neither that nor a file."""
    try:
        if path.is_dir() or path.is_file():
            return path.is_dir()
        what = "found neither (a device, pipe or socket)" if path.exists() else "nothing is there"
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from error
    raise UsageError(f"Expected an image or a folder at {path}; {what}.")


def is_input(path: str) -> bool:
    """Return whether a path is an image that is not hidden, and not the output of an earlier prediction.

    OME-Zarr and whole slides are images by their names.
    """
    other = is_zarr(path) or PurePosixPath(path).suffix.lower() in SLIDE_SUFFIXES
    return (is_image(path) or (other and not is_hidden(path))) and not path.endswith(_RESULTS)


def why_not_read(path: str) -> str | None:
    """Return why an image that is not hidden is no input, as its suffix shows; None for other files."""
    kind = None if is_hidden(path) else _NOT_READ.get(PurePosixPath(path).suffix.lower())
    return kind and f"Expected PNG, TIFF, JPEG, BMP, WebP or OME-Zarr; found {kind}. Convert it to OME-TIFF."


def stem_of(name: str) -> str:
    """Return the name of an image without its suffix, to which the endings of its outputs are added.

    A folder of Zarr loses its suffix too, because what is below it in the output is no Zarr.

    >>> stem_of("a/b.tif"), stem_of("p.zarr/B/3/0")
    ('a/b', 'p/B/3/0')
    """
    *folders, last = PurePosixPath(name).parts
    above = [PurePosixPath(folder).stem if is_zarr(folder) else folder for folder in folders]
    return str(PurePosixPath(*above, last if above != folders else PurePosixPath(last).stem))


def check_stems(images: Iterable[tuple[str, str]], compared: Callable[[str], str] = str) -> None:
    """Raise `UsageError` if two images, given as (stem, full name), would have the same output.

    `compared` gives the form of a stem by which the place of the outputs tells names apart.
    """
    stems: dict[str, str] = {}
    for number, (stem, name) in enumerate(images):
        other = stems.setdefault(compared(stem), name)
        if len(stems) <= number:
            raise UsageError(
                f"Expected images with different names; found {other} and {name}, which would both write "
                f"{stem}{ENDINGS['labels']}. Rename one, or run them with different --out folders."
            )


def check_outputs(names: Iterable[str], out: Path) -> None:
    """Raise `UsageError` if predicting images of these names would replace files in `out`."""
    outputs = [f"{stem_of(name)}{ending}" for name in names for ending in ALL_ENDINGS]
    there = [name for name in (*TABLE_FILES, *outputs) if (out / name).exists()]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UsageError(
            f"Expected no results in {out} that would be replaced; found {there[0]}{more}. Name another --out, or "
            "add --overwrite."
        )


@dataclass(frozen=True)
class PredictedFiles:
    """The outcome of a prediction.

    Attributes:
        counts: Number of nuclei of each image, by its name; the planes of a stack are `a.tif z=0` and so on.
        failures: Error message for each image or file that could not be read, by its name.
        warnings: Why the result of an image may be wrong, by its name.
        plates: Mean number of nuclei per image of each well, by row and column, of each plate, by its name.
    """

    counts: dict[str, int]
    failures: dict[str, str]
    warnings: dict[str, str]
    plates: dict[str, Wells] = field(default_factory=dict)


def predict_files(
    model: Model,
    files: Sequence[Path] | Mapping[str, Path | ZarrFolder] | PlannedImages,
    out: Path,
    channel: int | str | None = None,
    advance: Advance = no_progress,
    formats: Sequence[FormatName] = DEFAULT_FORMATS,
    expansion: Expansion | None = None,
    into: IntoImage | None = None,
) -> PredictedFiles:
    """Segment image files and write the results to a folder.

    The folder gets for each image its results in each format, such as `<name without suffix>.labels.tif`, and one
    `nuclei.csv` and one `images.csv`, or other tables; for each plate, `<plate>.plate.png`.
    `nuclei.csv` has columns for as many channels as the image with the most channels; they are empty for images with
    fewer channels. An image that cannot be read does not stop the others; without any that can be read nothing is
    written. What is there already is replaced: hold `nucleus.storage.claimed_folder(out)`, so that no other process
    does so.

    Args:
        model: The model.
        files: Image files: by their names, which are relative paths with forward slashes (`Inputs.images`), or as a
            sequence, whose names are those of the files; or the images of files, from `plan_images`, without which
            stacks and time series are refused.
        out: Folder for the results.
        channel: Channel to segment, its number from 0 or its name; None segments grey and RGB images as a whole.
        advance: Called with the number of images done and their total.
        formats: Formats of the results, by `check_formats`.
        expansion: How far cells reach beyond their nuclei; None for nuclei alone.
        into: That labels of the format `zarr` go into the OME-Zarr of their image; None for stores of their own.

    Returns:
        Number of nuclei or error message of each image.

    Raises:
        UsageError: Two images would have the same output.
        OutputError: The folder cannot be written. The labels and overlays written before are whole, and the tables
            have their rows; where there is no room for the tables either, the message says so.
    """
    planned = _planned(files)
    check_stems([(stem_of(image.output), image.title) for image in planned.images], name_on_disk)
    found = PredictedFiles({}, dict(planned.failures), {})
    if not planned.images:
        return found
    stopped: OutputError | None = None
    try:
        with _tables(planned, out, cells=expansion is not None) as (nuclei, images):
            try:
                with writing(out / NUCLEI_TABLE):
                    outputs = _Outputs(out, nuclei, images, formats, expansion, into)
                    _predict_all(model, planned, outputs, channel, found, advance)
            except OutputError as error:  # the tables are kept, as the labels are
                stopped = error
            if stopped is None and not found.counts:
                raise ImageError("Expected images that can be read; found none.")  # so that the tables are not kept
    except ImageError:  # tables without images would only stand in the way of the next prediction
        return found
    except OutputError as error:
        raise _with_note(stopped or error, "are missing: predict the images again, into a folder with room") from error
    if stopped is not None:
        raise _with_note(stopped, f"have the {plural(len(found.counts), 'image')} before") from stopped
    finish_tables(out, formats)
    _remove_earlier(planned, found, out)
    _write_plates(planned, found, out)
    return found


@contextmanager
def _tables(planned: PlannedImages, out: Path, *, cells: bool) -> Iterator[tuple[CsvTable, CsvTable]]:
    """Provide the tables of nuclei and of images."""
    plate = any(plate_field(image.name) for image in planned.images)
    columns = nucleus_columns(planned.channels, plate=plate, cells=cells)
    with (
        csv_table(out / NUCLEI_TABLE, columns) as nuclei,
        csv_table(out / IMAGES_TABLE, image_columns(plate=plate)) as images,
    ):
        yield nuclei, images


def _remove_earlier(planned: PlannedImages, found: PredictedFiles, out: Path) -> None:
    """Remove earlier results of images that cannot be predicted any more: the new tables do not have their nuclei."""
    done = {name_on_disk(stem_of(image.output)) for image in planned.images if image.title in found.counts}
    failed = [image.output for image in planned.images if image.title in found.failures]
    for name in (*planned.failures, *failed):
        if name_on_disk(stem_of(name)) not in done and _has_room(name):
            remove_results(out / stem_of(name))


def _write_plates(planned: PlannedImages, found: PredictedFiles, out: Path) -> None:
    """Write a picture of each plate that was predicted."""
    counts = ((image.name, found.counts[image.title]) for image in planned.images if image.title in found.counts)
    found.plates.update(plates_of(counts))
    for plate, wells in found.plates.items():
        picture = draw_plate(PurePosixPath(plate).name, wells)
        write_atomic(out / f"{plate}{PLATE_ENDING}", encode_png(picture))


def _planned(files: Sequence[Path] | Mapping[str, Path | ZarrFolder] | PlannedImages) -> PlannedImages:
    if isinstance(files, PlannedImages):
        return files
    named = files if isinstance(files, Mapping) else {file.name: file for file in files}
    return plan_images(named, PlaneOptions())


def _with_note(error: OutputError, note: str) -> OutputError:
    """Return an error with a sentence about the tables."""
    return OutputError(" ".join((str(error), f"{NUCLEI_TABLE} and {IMAGES_TABLE} {note}.")))


@dataclass(frozen=True)
class _Outputs:
    """The folder and the tables of a prediction."""

    folder: Path
    nuclei: CsvTable
    images: CsvTable
    formats: Sequence[FormatName]
    expansion: Expansion | None
    into: IntoImage | None

    def check(self, image: FileImage, opened: ScaledImage) -> None:
        """Raise `ImageError` if labels are to go into an image, but cannot."""
        if self.into is not None:
            ImageLabels(image.file, self.into).check(frame_of(opened.source), cells=self.expansion is not None)

    def add(self, model: Model, of: FileImage, image: ScaledImage, blocks: Iterable[LabelledBlock]) -> dict[str, Any]:
        """Write the results of an image, all or none of its rows; return the row of the image."""
        stem = self.folder / stem_of(of.output)
        own = ImageLabels(of.file, self.into) if self.into is not None and "zarr" in self.formats else None
        files = [name for name in self.formats if own is None or name != "zarr"]
        with self.nuclei.rows() as rows, replaced_results(stem, files, cells=self.expansion is not None):
            row = write_results(model, image, blocks, stem, rows, files, self.expansion, own)
        try:
            self.images.add(row)
        except OSError:
            self.nuclei.take_back()
            raise
        return row


def _predict_all(
    model: Model,
    planned: PlannedImages,
    outputs: _Outputs,
    channel: int | str | None,
    found: PredictedFiles,
    advance: Advance,
) -> None:
    """Predict the images; add the number of nuclei or the error message of each to `found`."""
    remaining, opener = iter(planned.images), ImageOpener(channel)
    total = len(planned.images) + len(planned.failures)
    while chunk := list(islice(remaining, IMAGES_AT_ONCE)):
        opened = _open_all(model, chunk, opener, outputs, found.failures)
        segmented = model.segment_blocks([scaled for _, scaled in opened])
        for (image, scaled), blocks in zip(opened, segmented, strict=True):
            try:
                row = outputs.add(model, image, scaled, blocks)
                found.counts[image.title] = row["nuclei"]
                if row["warning"]:
                    found.warnings[image.title] = row["warning"]
            except ImageError as error:  # a channel that is measured but not segmented may be damaged
                found.failures[image.title] = str(error)
            advance(len(found.counts) + len(found.failures), total)
        advance(len(found.counts) + len(found.failures), total)


def _open_all(
    model: Model, images: Iterable[FileImage], opener: ImageOpener, outputs: _Outputs, failures: dict[str, str]
) -> list[tuple[FileImage, ScaledImage]]:
    """Open the readable images; add error messages for the others to `failures`."""
    opened = []
    for image in images:
        try:
            _check_length(image.output)
            scaled = model.scaled_image(opener.open(image))
            outputs.check(image, scaled)
            opened.append((image, scaled))
        except ImageError as error:
            failures[image.title] = str(error)
    return opened


def _check_length(name: str) -> None:
    """Raise `ImageError` if the file system cannot store the outputs of an image under its name."""
    if not _has_room(name):
        raise ImageError(
            f"Expected a file name of at most {_LONGEST_NAME - len(LONGEST_ENDING)} bytes before the suffix; {name} is "
            "longer, and leaves no room for the endings of its outputs. Rename it."
        )


def _has_room(name: str) -> bool:
    """Return whether the name of an image leaves room for the endings of its outputs."""
    return len(os.fsencode(f"{PurePosixPath(stem_of(name)).name}{LONGEST_ENDING}")) <= _LONGEST_NAME
