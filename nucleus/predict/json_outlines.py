"""Outlines in JSON: GeoJSON for QuPath, COCO for annotation tools; written part by part.

A feature of GeoJSON is put together from texts that exist already: coordinates are multiples of half a pixel, so the
text of each is made once for a part, and the names of measurements once for an image. A general encoder of JSON takes
several times as long.
"""

import gzip
import hashlib
import io
import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nucleus.predict.measurement import Frame, MeasuredPart
from nucleus.predict.outlines import Outline, outlines_of
from nucleus.storage.files import atomic_path

__all__ = ["AddPart", "coco_annotations", "geojson_features", "outlined"]

_CLASS = '{"name":"Nucleus","color":[255,200,0]}'
_NUMBERS = {int, float}
_PLACE = ("plate", "row", "column", "field")
_encoded = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode

AddPart = Callable[[MeasuredPart], None]
"""Adds the nuclei of a part of an image to a file."""


@contextmanager
def geojson_features(path: Path, image: Frame, source: str) -> Iterator[AddPart]:
    """Provide a file of QuPath 0.6, to which the nuclei of parts are added; it appears if the block ends without error.

    It is a FeatureCollection of detections, or of cells where parts have them, in pixels of the image, with the numbers
    of the table as measurements. Where the image names its channels, so do the measurements: `mean_0 DAPI`.

    Args:
        path: The file; `.gz` at its end compresses it.
        image: Frame of the whole image.
        source: What found the nuclei; it makes their UUIDs differ from those of another model.

    Raises:
        OutputError: The file cannot be written.
    """
    writer = _FeatureWriter(image, uuid.uuid5(uuid.NAMESPACE_OID, f"{source}\n{image.image}\n{path.name}"))
    with _list_in(path, '{"type": "FeatureCollection", "features": [', "]}") as write:
        yield lambda part: write(writer.features(part))


@dataclass
class _FeatureWriter:
    """Writes the features of one image."""

    image: Frame
    namespace: uuid.UUID
    keys: dict[str, str] = field(default_factory=dict)

    def features(self, part: MeasuredPart) -> Iterator[str]:
        """Yield the text of the feature of each nucleus of a part."""
        plane, metadata = self._plane(), self._metadata()
        nuclei = _geometries(part.labels, part.frame, plane)
        if part.cells is None:
            kind, shapes = "detection", nuclei
        else:
            kind = "cell"
            cells = _geometries(part.cells.labels, part.cells.frame, plane)
            shapes = (f'{cell},"nucleusGeometry":{nucleus}' for cell, nucleus in zip(cells, nuclei, strict=True))
        for shape, row in zip(shapes, part.rows, strict=True):
            yield (
                f'{{"type":"Feature","id":"{self._uuid(row["label"])}","geometry":{shape},"properties":'
                f'{{"objectType":"{kind}","name":"{row["label"]}","classification":{_CLASS},"isLocked":false,'
                f'"measurements":{{{self._measurements(row)}}}{metadata}}}}}'
            )

    def _measurements(self, row: dict[str, Any]) -> str:
        """Return names and values of the numbers of a row; JSON has none that are not finite."""
        keys, finite = self.keys, math.isfinite
        numbers = [(name, value) for name, value in row.items() if type(value) in _NUMBERS and finite(value)]
        return ",".join([f"{keys.get(name) or self._key(name)}{value}" for name, value in numbers])

    def _key(self, name: str) -> str:
        """Return the name of a measurement in JSON, with its colon."""
        what, _, channel = name.rpartition("_")
        names = self.image.channels
        named = what in {"mean", "integrated"} and channel.isdecimal() and int(channel) < len(names)
        shown = f"{name} {names[int(channel)]}".rstrip() if named else name
        return self.keys.setdefault(name, f"{_encoded(shown)}:")

    def _plane(self) -> str:
        """Return the plane that a geometry is in; images of one plane have none."""
        if self.image.z is None and self.image.t is None:
            return ""
        return f',"plane":{{"c":-1,"z":{self.image.z or 0},"t":{self.image.t or 0}}}'  # -1: all channels

    def _metadata(self) -> str:
        """Return the place of the image in its plate, which QuPath shows; measurements are numbers only."""
        place = {name: self.image.keys[name] for name in _PLACE if name in self.image.keys}
        return f',"metadata":{_encoded(place)}' if place else ""

    def _uuid(self, label: int) -> str:
        """Return the UUID of a nucleus, as `uuid.uuid5` does, in a quarter of the time."""
        name = self.namespace.bytes + str(label).encode()
        digest = bytearray(hashlib.sha1(name, usedforsecurity=False).digest()[:16])
        digest[6], digest[8] = digest[6] & 0x0F | 0x50, digest[8] & 0x3F | 0x80  # version and variant
        text = digest.hex()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _geometries(labels: NDArray[np.int32], frame: Frame, plane: str) -> Iterator[str]:
    """Yield the geometry of each label: a polygon, or several of a nucleus in parts."""
    outlines = list(outlines_of(labels, top=frame.top, left=frame.left))
    texts = _ring_texts([ring for outline in outlines for ring in outline.rings])
    for outline in outlines:
        yield _geometry(outline, texts, plane)


def _geometry(outline: Outline, texts: Iterator[str], plane: str) -> str:
    """Return the geometry of an outline, from the texts of its rings."""
    if len(outline.rings) == 1:
        return f'{{"type":"Polygon","coordinates":[{next(texts)}]{plane}}}'
    own = {id(ring): next(texts) for ring in outline.rings}
    parts = [f"[{','.join(own[id(ring)] for ring in part)}]" for part in outline.parts]
    if len(parts) == 1:
        return f'{{"type":"Polygon","coordinates":{parts[0]}{plane}}}'
    return f'{{"type":"MultiPolygon","coordinates":[{",".join(parts)}]{plane}}}'


def _ring_texts(rings: Sequence[NDArray[np.float64]]) -> Iterator[str]:
    """Yield the text of each ring, closed; the coordinates are multiples of half a pixel."""
    if not rings:
        return
    halves = np.rint(2 * np.concatenate(rings)).astype(np.intp)
    low, high = halves.min(axis=0).tolist(), halves.max(axis=0).tolist()
    texts = np.empty(halves.shape, object)
    for axis, (before, after) in enumerate((("[", ""), ("", "]"))):
        known = [f"{before}{_half(value)}{after}" for value in range(low[axis], high[axis] + 1)]
        texts[:, axis] = np.array(known, object)[halves[:, axis] - low[axis]]
    flat = texts.ravel().tolist()
    start = 0
    for ring in rings:
        stop = start + ring.size
        yield f"[{','.join(flat[start:stop])},{flat[start]},{flat[start + 1]}]"
        start = stop


def _half(value: int) -> str:
    """Return half of an integer as text."""
    return f"{value // 2}.5" if value % 2 else str(value // 2)


@contextmanager
def coco_annotations(path: Path, image: Frame) -> Iterator[AddPart]:
    """Provide a file of COCO instances of one image, which appears if the block ends without error.

    An instance has polygons without holes, box, area and score.

    Raises:
        OutputError: The file cannot be written.
    """
    height, width = image.shape
    head = {
        "info": {"description": f"Nuclei in {image.image}"},
        "licenses": [],
        "images": [{"id": 1, "file_name": image.image, "width": width, "height": height}],
        "categories": [{"id": 1, "name": "nucleus", "supercategory": "cell"}],
    }
    with _list_in(path, f'{json.dumps(head)[:-1]}, "annotations": [', "]}") as write:
        yield lambda part: write(_encoded(_annotation(*each)) for each in outlined(part))


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


def outlined(part: MeasuredPart, *, simplified: bool = True) -> Iterator[tuple[Outline, dict[str, Any]]]:
    """Yield the outline and the row of each nucleus of a part; `simplified` is that of `outlines_of`."""
    outlines = outlines_of(part.labels, top=part.frame.top, left=part.frame.left, simplified=simplified)
    return zip(outlines, part.rows, strict=True)


@contextmanager
def _list_in(path: Path, head: str, tail: str) -> Iterator[Callable[[Iterable[str]], None]]:
    """Provide a JSON file whose last value is a list, one line for each of its values, which are added as text."""
    with atomic_path(path) as beside, _text_file(beside, compressed=path.suffix == ".gz") as file:
        file.write(head)
        separator = "\n"

        def write(values: Iterable[str]) -> None:
            nonlocal separator
            for value in values:
                file.write(separator + value)
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
