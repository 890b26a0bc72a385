"""The formats of results: their names and files, and the writers of outlines and labels of one image.

Outlines are written part by part while an image is segmented, so memory does not grow with the number of nuclei.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeAlias, get_args

import numpy as np
import roifile

from nucleus.config.names import FormatName
from nucleus.errors import ImageError, UsageError
from nucleus.lazy import need
from nucleus.predict.blocks import AssembledLabels
from nucleus.predict.json_outlines import AddPart, coco_annotations, geojson_features, outlined
from nucleus.predict.measurement import Frame, MeasuredPart
from nucleus.predict.zarr_results import write_zarr
from nucleus.storage.files import atomic_path, write_atomic

__all__ = [
    "ALL_ENDINGS",
    "CELL_ENDINGS",
    "ENDINGS",
    "LABEL_FORMATS",
    "LONGEST_ENDING",
    "OUTLINE_FORMATS",
    "TABLE_FORMATS",
    "Save",
    "check_formats",
    "open_outlines",
    "output_endings",
    "result_path",
    "write_labels",
]

ENDINGS: dict[FormatName, str] = {
    "labels": ".labels.tif",
    "zarr": ".labels.zarr",
    "geojson": ".geojson",
    "geojson.gz": ".geojson.gz",
    "roi": ".rois.zip",
    "coco": ".coco.json",
    "overlay": ".overlay.png",
}
"""What follows an image's name without its suffix, for each format of one image."""
CELL_ENDINGS: dict[FormatName, str] = {"labels": ".cells.tif", "zarr": ".cells.zarr"}
"""The same for the cells around the nuclei."""
ALL_ENDINGS = (*ENDINGS.values(), *CELL_ENDINGS.values())
"""Endings of all results of an image."""
LONGEST_ENDING = max(ALL_ENDINGS, key=len)
"""What the longest name of a result ends in."""
LABEL_FORMATS: frozenset[FormatName] = frozenset(CELL_ENDINGS)
"""Formats that hold labels."""
OUTLINE_FORMATS: frozenset[FormatName] = frozenset({"geojson", "geojson.gz", "roi", "coco"})
"""Formats that hold outlines."""
TABLE_FORMATS: frozenset[FormatName] = frozenset({"csv", "parquet", "h5ad"})
"""Formats of the tables, which are of all images."""
_PACKAGES: dict[str, str] = {"zarr": "zarr", "parquet": "pyarrow", "h5ad": "anndata"}
"""Packages that formats need, and that the light install lacks."""
_LARGEST_OF_ROI = 32767
"""ImageJ's regions have coordinates of 16 bits."""
Save: TypeAlias = Callable[[Path, bytes], None]
"""Writes a file whose content is known as a whole."""


def result_path(stem: Path, ending: str) -> Path:
    """Return the path of a result: the ending is added to the stem, which may have dots of its own."""
    return stem.with_name(f"{stem.name}{ending}")


def output_endings(formats: Sequence[FormatName], *, cells: bool = False) -> tuple[str, ...]:
    """Return the endings of the results of an image in some formats; `cells` says whether nuclei have cells."""
    of_cells = [CELL_ENDINGS[name] for name in formats if cells and name in CELL_ENDINGS]
    return (*(ENDINGS[name] for name in formats if name in ENDINGS), *of_cells)


def check_formats(formats: Sequence[str]) -> tuple[FormatName, ...]:
    """Return formats in the order of `FormatName`, each once.

    Raises:
        MissingPackageError: A format needs a package that is not installed.
        UsageError: There is no such format, or none at all.
    """
    names: tuple[FormatName, ...] = get_args(FormatName)
    unknown = sorted(set(formats) - set(names))
    if unknown or not formats:
        raise UsageError(f"Expected formats among {', '.join(names)}; found {', '.join(unknown) or 'none'}.")
    need(*(package for name, package in _PACKAGES.items() if name in formats))
    return tuple(name for name in names if name in formats)


def open_outlines(name: FormatName, stem: Path, image: Frame, source: str) -> AbstractContextManager[AddPart]:
    """Provide a file of outlines, which appears if the block ends without error.

    Args:
        name: Format.
        stem: Path of the file without its ending.
        image: Frame of the whole image.
        source: What found the nuclei; it makes their UUIDs differ from those of another model.

    Raises:
        ImageError: The image is too large for the format.
    """
    path = result_path(stem, ENDINGS[name])
    if name == "roi":
        return _rois(path, image)
    return coco_annotations(path, image) if name == "coco" else geojson_features(path, image, source)


@contextmanager
def _rois(path: Path, image: Frame) -> Iterator[AddPart]:
    """ImageJ's RoiSet.zip: traced regions along the edges of the pixels, which are exact; without holes."""
    if max(image.shape) > _LARGEST_OF_ROI:
        height, width = image.shape
        raise ImageError(
            f"Expected an image of at most {_LARGEST_OF_ROI:,} px per side for --format roi, whose coordinates have 16 "
            f"bits; {image.image} has {width} x {height} px. Use --format geojson."
        )
    with atomic_path(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(part: MeasuredPart) -> None:
            for outline, row in outlined(part, simplified=False):
                for number, (ring, *_) in enumerate(outline.parts):
                    name = f"{row['label']:07d}" + (f"-{number + 1}" if number else "")
                    roi = roifile.ImagejRoi.frompoints(ring.astype(np.int32), name=name)
                    roi.roitype = roifile.ROI_TYPE.TRACED
                    roi.z_position, roi.t_position = (0 if row[axis] is None else row[axis] + 1 for axis in "zt")
                    archive.writestr(f"{name}.roi", roi.tobytes())

        yield add


def write_labels(path: Path, labels: AssembledLabels, image: Frame, save: Save = write_atomic) -> None:
    """Write the labels of an image as TIFF, or as OME-Zarr if the path ends so.

    Args:
        path: Path of the file, or of the folder that ends in `.zarr`.
        labels: The labels.
        image: Frame of the whole image.
        save: Writes a TIFF that is small enough to be in memory as a whole.

    Raises:
        OutputError: It cannot be written.
    """
    if path.suffix == ".zarr":
        write_zarr(path, labels, image)
    elif (whole := labels.encoded()) is not None:
        save(path, whole)
    else:
        labels.write(path)
