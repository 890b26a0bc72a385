"""Outlines in QuPath's GeoJSON and in ImageJ's RoiSet.zip, as shapes in pixels of the image."""

import io
import json
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import roifile

from nucleus.data.masks import Remarks
from nucleus.data.shapes import Ellipse, Polygons, Ring, Shape
from nucleus.errors import ImageError
from nucleus.text import plural

__all__ = ["LARGEST_JSON", "read_geojson", "read_json", "read_rois"]

LARGEST_JSON = 512 << 20
"""Largest JSON document, unpacked, bytes."""
_LARGEST_ROIS, _LARGEST_ROI, _MOST_ROIS = 256 << 20, 16 << 20, 200_000
_GZIP = b"\x1f\x8b"
_ZIP = b"PK"
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, OSError)
_BROKEN_ROI = (ValueError, TypeError, IndexError, OverflowError, AssertionError, struct.error, RuntimeError)
"""What roifile raises for files that are damaged or hostile; curves in a path are a `NotImplementedError`."""
_LEAST_POINTS = 3

_NUCLEI = ("detection", "cell")
_LEGACY = {
    "PathDetectionObject": "detection",
    "PathCellObject": "cell",
    "PathAnnotationObject": "annotation",
    "PathTileObject": "tile",
    "TMACoreObject": "tma_core",
    "PathRootObject": "root",
}
"""Types of objects, by the `id` that QuPath 0.2 and older wrote."""
_AREAS = {"Polygon", "MultiPolygon"}
_NO_OBJECT = ""

_DRAWN = {roifile.ROI_TYPE.POLYGON, roifile.ROI_TYPE.FREEHAND, roifile.ROI_TYPE.TRACED}
_OUTLINE_SUBTYPES = {roifile.ROI_SUBTYPE.UNDEFINED, roifile.ROI_SUBTYPE.ELLIPSE, roifile.ROI_SUBTYPE.ROTATED_RECT}


def read_json(data: bytes, name: str) -> Any:
    """Parse a JSON document, which may be compressed by gzip.

    Raises:
        ImageError: It is not JSON, is nested too deeply, or is larger than `LARGEST_JSON` when unpacked.
    """
    if data.startswith(_GZIP):
        data = _unzipped(data, name)
    if len(data) > LARGEST_JSON:
        raise ImageError(
            f"Expected at most {LARGEST_JSON >> 20} MiB of JSON in {name}; found more. Export fewer properties, or "
            "divide the file."
        )
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ImageError(f"Expected JSON in {name}; its values are nested too deeply. Export it again.") from error
    except ValueError as error:
        raise ImageError(f"Expected JSON in {name}; {error}. Export it again.") from error


def _unzipped(data: bytes, name: str) -> bytes:
    unpack = zlib.decompressobj(wbits=31)
    try:
        found = unpack.decompress(data, LARGEST_JSON + 1)
    except zlib.error as error:
        raise ImageError(f"Expected a whole gzip file at {name}; {error}. Export it again.") from error
    if not unpack.eof and len(found) <= LARGEST_JSON:
        raise ImageError(f"Expected a whole gzip file at {name}; it breaks off. Export it again.")
    return found


def read_geojson(data: bytes, name: str) -> tuple[list[Shape], Remarks]:
    """Read the nuclei of a GeoJSON file as QuPath writes it: a FeatureCollection, a list of features, or one feature.

    Detections and cells are nuclei, a cell by its `nucleusGeometry`. In a file without both, annotations are; features
    without an object type always are. Remarks say which other objects were passed over.

    Raises:
        ImageError: The file is damaged or is no GeoJSON; it has objects, but no outline of a nucleus; a nucleus has no
            area, no outline of its own, or lies in another plane of a stack.
    """
    features = _features(read_json(data, name), name)
    kinds = [_kind(feature) for feature in features]
    wanted = {*_NUCLEI, _NO_OBJECT} if set(kinds) & set(_NUCLEI) else {"annotation", _NO_OBJECT}
    passed: dict[str, list[str]] = defaultdict(list)
    shapes: list[Shape] = []
    for number, (feature, kind) in enumerate(zip(features, kinds, strict=True), 1):
        title = _title(feature, number, name)
        ignored = _is_ignored(feature)
        geometry = _geometry(feature, kind, title) if kind in wanted and not ignored else None
        if geometry is not None and (kind in _NUCLEI or geometry.get("type") in _AREAS):
            shapes.append(_polygons(geometry, title))
        else:
            what = "of an ignored class" if ignored else kind or "feature"
            passed[f"Objects of GeoJSON that are no outlines of nuclei ({what}), passed over"].append(title)
    if passed and not shapes:
        raise ImageError(
            f"Expected outlines of nuclei in {name}; found {plural(len(features), 'object')} of other "
            "kinds, such as points. Draw outlines; or if the image has no nuclei, export a file without objects."
        )
    return shapes, tuple((text, tuple(names)) for text, names in passed.items())


def _features(document: Any, name: str) -> list[dict[str, Any]]:
    found = document
    if isinstance(document, dict):
        found = document.get("features") if document.get("type") == "FeatureCollection" else [document]
    if isinstance(found, list) and all(isinstance(item, dict) and item.get("type") == "Feature" for item in found):
        return found
    raise ImageError(
        f"Expected GeoJSON in {name}: a FeatureCollection, a list of features, or one feature; found something else. "
        "In QuPath: File > Export objects as GeoJSON."
    )


def _kind(feature: Mapping[str, Any]) -> str:
    """Return the type of an object in lower case, empty if it has none."""
    properties = feature.get("properties")
    stated = None
    if isinstance(properties, dict):
        stated = properties.get("objectType") or properties.get("object_type")
    stated = stated or _LEGACY.get(str(feature.get("id")))
    return str(stated).lower() if stated else _NO_OBJECT


def _is_ignored(feature: Mapping[str, Any]) -> bool:
    """Return whether an object is of a class such as `Ignore*` or `Region*`: QuPath leaves out those with a star."""
    properties = feature.get("properties")
    found = properties.get("classification") if isinstance(properties, dict) else None
    return isinstance(found, dict) and str(found.get("name")).endswith("*")


def _title(feature: Mapping[str, Any], number: int, name: str) -> str:
    known = feature.get("id")
    return f"feature {number} of {name}" + (f" ({str(known)[:36]})" if isinstance(known, str) else "")


def _geometry(feature: Mapping[str, Any], kind: str, title: str) -> Mapping[str, Any]:
    """Return the geometry of a nucleus. Raises `ImageError` for a cell without nucleus, and for another plane."""
    geometry = feature.get("geometry")
    if kind == "cell":
        geometry = feature.get("nucleusGeometry")
        if geometry is None:
            raise ImageError(
                f"Expected a nucleus (nucleusGeometry) in each cell; {title} has only the outline of the cell. Export "
                "detections of nuclei instead."
            )
    if not isinstance(geometry, dict):
        raise ImageError(f"Expected a geometry; {title} has none. Export the objects again.")
    plane = geometry.get("plane")
    if isinstance(plane, dict) and (plane.get("z") or plane.get("t")):
        raise ImageError(
            f"Expected objects of one plane; {title} is in z {plane.get('z')}, t {plane.get('t')}. Export each plane "
            "of the stack as an image with a file of its own."
        )
    return geometry


def _polygons(geometry: Mapping[str, Any], title: str) -> Polygons:
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind not in _AREAS:
        raise ImageError(
            f"Expected an outline (Polygon or MultiPolygon); {title} is {kind}. Remove it, or draw its outline."
        )
    parts = [coordinates] if kind == "Polygon" else coordinates
    if not isinstance(parts, list) or not all(isinstance(part, list) for part in parts):
        raise ImageError(f"Expected lists of coordinates; {title} has something else. Export the objects again.")
    return Polygons(title, tuple(tuple(_ring(points, title) for points in part) for part in parts))


def _ring(points: Any, title: str) -> Ring:
    try:
        ring = np.array([point[:2] for point in points], np.float64)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise ImageError(f"Expected pairs of numbers as coordinates; {title} has others. Export it again.") from error
    if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < _LEAST_POINTS:
        raise ImageError(
            f"Expected rings of at least {_LEAST_POINTS} points (x, y); {title} has one of "
            f"{plural(len(ring), 'point')}. Remove it, or draw it again."
        )
    return ring


def read_rois(data: bytes, name: str) -> tuple[list[Shape], Remarks]:
    """Read the regions of ImageJ's ROI manager: a RoiSet.zip, or a single .roi.

    Polygons, freehand and traced regions, ovals, rectangles and composites are read.

    Raises:
        ImageError: The file is damaged or too large; a region is a line, point, text or image, or has curves; or the
            regions belong to several planes of a stack.
    """
    shapes: list[Shape] = []
    planes = {}
    for entry, content in _roi_files(data, name):
        title = f"{entry} of {name}" if entry else name
        try:
            roi = roifile.ImagejRoi.frombytes(content)
            shapes.append(_shape_of(roi, title))
        except _BROKEN_ROI as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"Expected a region of ImageJ; {title} cannot be read: {error}. Save it again.") from error
        planes[_plane(roi)] = title
    if len(planes) > 1:
        one, other = list(planes.values())[:2]
        raise ImageError(
            f"Expected regions of one plane in {name}; {one} and {other} are in different ones. Save the regions of "
            "each plane in a file of their own, beside its image."
        )
    return shapes, ()


def _plane(roi: roifile.ImagejRoi) -> tuple[int, ...]:
    """Return channel, slice and frame of a region, or the position; zeros if it belongs to all planes."""
    stacked = (roi.z_position, roi.t_position)
    return stacked if roi.c_position or any(stacked) else (roi.position,)


def _roi_files(data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each region; the name is empty for a single one."""
    if not data.startswith(_ZIP):
        yield "", data
        return
    total = 0
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [info for info in archive.infolist() if not info.is_dir()]
            for info in entries:
                total += info.file_size
                _check_roi_file(info, total, len(entries), name)
                yield info.filename, archive.read(info)
    except _BROKEN_ZIP as error:
        raise ImageError(f"Expected a whole RoiSet.zip at {name}; {error}. Save it again in ImageJ.") from error


def _check_roi_file(info: zipfile.ZipInfo, total: int, entries: int, name: str) -> None:
    if not info.filename.lower().endswith(".roi"):
        raise ImageError(
            f"Expected only regions (.roi) in {name}; found {info.filename!r}. Save the regions alone: in ImageJ, ROI "
            "Manager > More > Save."
        )
    if info.file_size > _LARGEST_ROI or total > _LARGEST_ROIS or entries > _MOST_ROIS:
        raise ImageError(
            f"Expected regions of at most {_LARGEST_ROI >> 20} MiB each, {_LARGEST_ROIS >> 20} MiB and {_MOST_ROIS:,} "
            f"in all, in {name}; {info.filename} exceeds this. Divide the image into tiles."
        )


def _shape_of(roi: roifile.ImagejRoi, title: str) -> Shape:
    kind = roi.roitype
    if roi.subtype not in _OUTLINE_SUBTYPES:
        raise _refused(title, f"{roi.subtype.name.lower()} region")
    if roi.options & roifile.ROI_OPTIONS.SPLINE_FIT and kind in _DRAWN:
        raise _refused(title, "spline; in ImageJ, Edit > Selection > Interpolate makes it an outline")
    if kind == roifile.ROI_TYPE.OVAL:
        return Ellipse(title, *_roi_box(roi))
    if kind == roifile.ROI_TYPE.RECT and roi.multi_coordinates is not None:
        rings = roi.path2coords(roi.multi_coordinates)
        return Polygons(title, (tuple(_ring(ring, title) for ring in rings if len(ring) > 1),))
    if kind == roifile.ROI_TYPE.RECT and roi.rounded_rect_arc_size == 0:
        left, top, width, height = _roi_box(roi)
        corners = [[left, top], [left + width, top], [left + width, top + height], [left, top + height]]
        return Polygons(title, ((np.array(corners, np.float64),),))
    if kind in _DRAWN and roi.integer_coordinates is not None:
        return Polygons(title, ((_ring(roi.coordinates(), title),),))
    raise _refused(title, "rounded rectangle" if kind == roifile.ROI_TYPE.RECT else f"region of type {kind.name}")


def _roi_box(roi: roifile.ImagejRoi) -> tuple[float, float, float, float]:
    """Return left, top, width and height of an oval or rectangle."""
    if roi.subpixelrect:
        return float(roi.xd), float(roi.yd), float(roi.widthd), float(roi.heightd)
    return float(roi.left), float(roi.top), float(roi.right - roi.left), float(roi.bottom - roi.top)


def _refused(title: str, what: str) -> ImageError:
    return ImageError(
        "Expected areas (polygon, freehand, traced, oval, rectangle, composite of polygons); "
        f"{title} is a {what}. Remove it from the ROI manager, or draw its outline, and save again."
    )
