"""The files that other programs open: outlines of nuclei for QuPath, ImageJ and annotation tools, labels as OME-Zarr.

Outlines are written part by part while an image is segmented, so memory does not grow with the number of nuclei.
"""

from __future__ import annotations

import gzip
import io
import json
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import roifile
from numpy.typing import NDArray

from nucleus.errors import ImageError, UsageError
from nucleus.lazy import need, zarr
from nucleus.predict.blocks import AssembledLabels
from nucleus.predict.measurement import Frame, MeasuredPart
from nucleus.predict.outlines import Outline, outlines_of
from nucleus.storage.files import atomic_folder, atomic_path

__all__ = ["ENDINGS", "LABEL_FORMATS", "FormatName", "check_formats", "open_outlines", "result_path", "write_labels"]

FormatName = Literal["labels", "zarr", "geojson", "geojson.gz", "roi", "coco"]
"""Formats of the nuclei of an image."""
ENDINGS: dict[FormatName, str] = {
    "labels": ".labels.tif",
    "zarr": ".labels.zarr",
    "geojson": ".geojson",
    "geojson.gz": ".geojson.gz",
    "roi": ".rois.zip",
    "coco": ".coco.json",
}
"""What follows an image's name without its suffix, for each format."""
LABEL_FORMATS: frozenset[FormatName] = frozenset({"labels", "zarr"})
"""Formats that hold labels; the others hold outlines."""
_LARGEST_OF_ROI = 32767
"""ImageJ's regions have coordinates of 16 bits."""
_CHUNK = 512
_SMALLEST_LEVEL = 512
_CLASS = {"name": "Nucleus", "color": [255, 200, 0]}

_encoded = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode

AddPart = Callable[[MeasuredPart], None]
"""Adds the nuclei of a part of an image to a file."""


def result_path(stem: Path, ending: str) -> Path:
    """Return the path of a result: the ending is added to the stem, which may have dots of its own."""
    return stem.with_name(f"{stem.name}{ending}")


def check_formats(formats: tuple[str, ...]) -> tuple[FormatName, ...]:
    """Return formats in the order of `ENDINGS`, each once.

    Raises:
        MissingPackageError: A format needs a package that is not installed.
        UsageError: There is no such format, or none at all.
    """
    unknown = sorted(set(formats) - set(ENDINGS))
    if unknown or not formats:
        raise UsageError(
            f"Expected formats among {', '.join(get_args(FormatName))}; found {', '.join(unknown) or 'none'}."
        )
    if "zarr" in formats:
        need("zarr")
    return tuple(name for name in ENDINGS if name in formats)


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
    return _coco(path, image) if name == "coco" else _geojson(path, image, source)


@contextmanager
def _geojson(path: Path, image: Frame, source: str) -> Iterator[AddPart]:
    """QuPath 0.6: a FeatureCollection of detections, in pixels of the image, with measurements."""
    namespace = uuid.uuid5(uuid.NAMESPACE_OID, f"{source}\n{image.image}\n{path.name}")
    with _json_list(path, '{"type": "FeatureCollection", "features": [', "]}") as write:
        yield lambda part: write([_feature(outline, row, namespace) for outline, row in _outlined(part)])


def _feature(outline: Outline, row: dict[str, Any], namespace: uuid.UUID) -> dict[str, Any]:
    parts = [[_closed(ring) for ring in part] for part in outline.parts]
    shape: dict[str, Any] = {"type": "Polygon", "coordinates": parts[0]}
    if len(parts) > 1:
        shape = {"type": "MultiPolygon", "coordinates": parts}
    if row["z"] is not None or row["t"] is not None:
        shape["plane"] = {"c": -1, "z": row["z"] or 0, "t": row["t"] or 0}  # -1: all channels
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(namespace, str(row["label"]))),
        "geometry": shape,
        "properties": {
            "objectType": "detection",
            "name": str(row["label"]),
            "classification": _CLASS,
            "isLocked": False,
            "measurements": {
                name: value
                for name, value in row.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            },
        },
    }


def _closed(ring: NDArray[np.float64]) -> list[list[float]]:
    points: list[list[float]] = ring.tolist()
    return [*points, points[0]]


@contextmanager
def _coco(path: Path, image: Frame) -> Iterator[AddPart]:
    """COCO instances of one image: polygons without holes, boxes, areas and scores."""
    height, width = image.shape
    head = {
        "info": {"description": f"Nuclei in {image.image}"},
        "licenses": [],
        "images": [{"id": 1, "file_name": image.image, "width": width, "height": height}],
        "categories": [{"id": 1, "name": "nucleus", "supercategory": "cell"}],
    }
    with _json_list(path, f'{json.dumps(head)[:-1]}, "annotations": [', "]}") as write:
        yield lambda part: write([_annotation(outline, row) for outline, row in _outlined(part)])


def _annotation(outline: Outline, row: dict[str, Any]) -> dict[str, Any]:
    outer = [part[0] for part in outline.parts]
    points = np.concatenate(outer)
    low, high = points.min(axis=0), points.max(axis=0)
    return {
        "id": row["label"],
        "image_id": 1,
        "category_id": 1,
        "segmentation": [ring.ravel().tolist() for ring in outer],
        "area": row["area"],
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "iscrowd": 0,
        "score": row["score"],
    }


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
            for outline, row in _outlined(part, simplified=False):
                for number, (ring, *_) in enumerate(outline.parts):
                    name = f"{row['label']:07d}" + (f"-{number + 1}" if number else "")
                    roi = roifile.ImagejRoi.frompoints(ring.astype(np.int32), name=name)
                    roi.roitype = roifile.ROI_TYPE.TRACED
                    roi.z_position, roi.t_position = (0 if row[axis] is None else row[axis] + 1 for axis in "zt")
                    archive.writestr(f"{name}.roi", roi.tobytes())

        yield add


def _outlined(part: MeasuredPart, *, simplified: bool = True) -> Iterator[tuple[Outline, dict[str, Any]]]:
    """Yield the outline and the row of each nucleus of a part."""
    outlines = outlines_of(part.labels, top=part.frame.top, left=part.frame.left, simplified=simplified)
    return zip(outlines, part.rows, strict=True)


@contextmanager
def _json_list(path: Path, head: str, tail: str) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Provide a JSON file whose last value is a list, one line for each of its values."""
    with atomic_path(path) as beside, _text_file(beside, compressed=path.suffix == ".gz") as file:
        file.write(head)
        separator = "\n"

        def write(values: list[dict[str, Any]]) -> None:
            nonlocal separator
            for value in values:
                file.write(f"{separator}{_encoded(value)}")
                separator = ",\n"

        yield write
        file.write(f"\n{tail}\n")


@contextmanager
def _text_file(path: Path, *, compressed: bool) -> Iterator[IO[str]]:
    if not compressed:
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    with (
        path.open("wb") as stored,
        gzip.GzipFile("", "wb", 6, stored, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as file,
    ):
        yield file


def write_labels(name: FormatName, stem: Path, labels: AssembledLabels, image: Frame) -> None:
    """Write the labels of an image as TIFF or OME-Zarr (`labels` or `zarr`)."""
    path = result_path(stem, ENDINGS[name])
    if name == "labels":
        labels.write(path)
    else:
        _write_zarr(path, labels, image)


def _write_zarr(path: Path, labels: AssembledLabels, image: Frame) -> None:
    """Write an OME-Zarr 0.5 label image: a pyramid whose levels take every second pixel of the one before."""
    with atomic_folder(path) as folder:
        group = zarr.open_group(folder, mode="w", zarr_format=3)
        levels = [labels.labels]
        while max(levels[-1].shape) > _SMALLEST_LEVEL:
            levels.append(levels[-1][::2, ::2])
        for number, pixels in enumerate(levels):
            array = group.create_array(
                str(number), shape=pixels.shape, chunks=(_CHUNK, _CHUNK), dtype=labels.kind, dimension_names=("y", "x")
            )
            for top in range(0, pixels.shape[0], _CHUNK):
                rows = slice(top, top + _CHUNK)
                array[rows] = pixels[rows].astype(labels.kind)
                labels.release()
        group.attrs["ome"] = _ome_attributes(len(levels), image)


def _ome_attributes(levels: int, image: Frame) -> dict[str, Any]:
    unit = {"unit": "micrometer"} if image.pixel_size else {}
    size = image.pixel_size or 1.0
    scales: list[dict[str, Any]] = [{"type": "scale", "scale": [size * 2**level] * 2} for level in range(levels)]
    datasets = [{"path": str(level), "coordinateTransformations": [scale]} for level, scale in enumerate(scales)]
    axes = [{"name": axis, "type": "space", **unit} for axis in "yx"]
    return {
        "version": "0.5",
        "multiscales": [{"name": "nuclei", "axes": axes, "datasets": datasets, "type": "nearest"}],
        "image-label": {"version": "0.5"},
    }
