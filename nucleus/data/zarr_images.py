"""Images in OME-Zarr 0.4 (Zarr v2) and 0.5 (Zarr v3): their metadata, and their planes, read by blocks of chunks."""

import json
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from nucleus.data.pixel_files import Level, PixelFacts, PixelFile
from nucleus.data.stacks import Stack
from nucleus.data.zarr_planes import Axes, PlaneReader
from nucleus.data.zarr_store import ZarrFolder, array_key
from nucleus.errors import ImageError
from nucleus.lazy import need

if TYPE_CHECKING:
    import zarr

__all__ = ["OmeGroup", "ome_attributes", "open_zarr_image", "read_group"]

_KINDS = ("plate", "multiscales", "well", "bioformats2raw.layout")
"""The key of each kind of metadata, in the order in which they decide: a plate may be written by bioformats2raw."""
_VERSIONS = {2: "0.4", 3: "0.5"}
"""Versions of OME-Zarr by those of Zarr."""
_MICROMETRES = {
    "yoctometer": 1e-18,
    "zeptometer": 1e-15,
    "attometer": 1e-12,
    "femtometer": 1e-9,
    "picometer": 1e-6,
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "decimeter": 1e5,
    "meter": 1e6,
    "inch": 25_400.0,
    "foot": 304_800.0,
    "yard": 914_400.0,
}
"""Units of length in which microscopes and slides are measured."""
_SQUARE = 0.01
"""Largest difference between the sides of a pixel that counts as square, as a part of one."""
_SLACK = 1.05
"""How much coarser than wanted a resolution level may be."""
_ROUNDED = 1.01
"""How far the side of a reduced level may be from what its scale says, pixels: writers round up or down."""
Steps = tuple[float, float]
"""Pixels of an image per pixel of a reduced level, by rows and by columns."""
_RGB_LABELS = (("red", "green", "blue"), ("r", "g", "b"))
_RGB_COLOURS = ("FF0000", "00FF00", "0000FF")
_UNNAMED = ("", "channel")
_MOST_CHANNELS, _MOST_PLANES = 1_000, 1_000_000
"""All channels are measured together; and each plane is an image with a name."""
_validating = threading.Lock()
"""Held while yaozarrs validates: warnings are switched off for the whole process."""


@dataclass(frozen=True)
class OmeGroup:
    """A group with metadata of OME-Zarr.

    Attributes:
        folder: The group.
        zarr_format: Version of Zarr, 2 or 3.
        kind: `plate`, `multiscales` (an image), `well` or `bioformats2raw.layout` (several images).
        metadata: The metadata of OME-Zarr, validated.
        consolidated: Copies of the metadata of what is below the group, by key; empty without.
    """

    folder: ZarrFolder
    zarr_format: int
    kind: str
    metadata: dict[str, Any]
    consolidated: Mapping[str, Any] = field(default_factory=dict)


def read_group(folder: ZarrFolder) -> OmeGroup | None:
    """Read the metadata of a group; None if nothing is there.

    Raises:
        ImageError: It is not a Zarr group with metadata of OME-Zarr 0.4 or 0.5, or has two that differ, or differ from
            its consolidated metadata.
        StorageError: The bucket cannot be read.
    """
    newer, older = folder.document("zarr.json"), folder.document(".zattrs")
    marks = [folder.document(key) for key in (".zgroup", ".zarray")] if newer is None else []
    if newer is None and older is None and not any(mark is not None for mark in marks):
        return None
    found = {2: older or {}, 3: ome_attributes(newer)}
    usable = {version: content for version, content in found.items() if any(kind in content for kind in _KINDS)}
    if not usable:
        raise ImageError(
            f"Expected the metadata of OME-Zarr (multiscales, plate or well) in {folder.name}; found a Zarr without "
            "them. Save the image as OME-Zarr 0.4 or 0.5."
        )
    _check_agreement(folder, usable)
    version = max(usable)
    kind = next(kind for kind in _KINDS if kind in usable[version])
    consolidated = _consolidated(folder, newer, version)
    if older is not None:
        _check_consolidated(folder, consolidated, ".zattrs", older)
    return OmeGroup(folder, version, kind, _validated(folder, usable[version], version), consolidated)


def _consolidated(folder: ZarrFolder, newer: Mapping[str, Any] | None, version: int) -> Mapping[str, Any]:
    """Return the copies of metadata that Zarr keeps in one document, by key."""
    found = folder.document(".zmetadata") if version == 2 else (newer or {}).get("consolidated_metadata")
    copies = found.get("metadata") if isinstance(found, dict) else None
    return copies if isinstance(copies, dict) else {}


def _check_consolidated(
    folder: ZarrFolder, consolidated: Mapping[str, Any], key: str, document: Mapping[str, Any]
) -> None:
    """Raise `ImageError` if the copy of a document says something else, which other programs would go by."""
    copy = consolidated.get(key)
    copy = copy if isinstance(copy, dict) else {}
    other = [each for each in copy if each in document and not _same(copy[each], document[each])]
    if other:
        raise ImageError(
            f"Expected one description of {folder.name}/{key}; found another one in the consolidated metadata of "
            f"{folder.name}, which differs in {', '.join(other)}. Write them again with zarr.consolidate_metadata, or "
            "remove them."
        )


def _same(first: Any, second: Any) -> bool:
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)  # NaN too


def ome_attributes(document: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what `zarr.json` says of OME-Zarr."""
    attributes = (document or {}).get("attributes")
    ome = attributes.get("ome") if isinstance(attributes, dict) else None
    return ome if isinstance(ome, dict) else {}


def _check_agreement(folder: ZarrFolder, usable: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise `ImageError` if metadata of both versions of Zarr say different things."""
    plain = [_without_version({kind: content.get(kind) for kind in _KINDS}) for content in usable.values()]
    if len(plain) > 1 and plain[0] != plain[1]:
        raise ImageError(
            f"Expected one description of {folder.name}; found two that differ, in zarr.json (Zarr v3) and .zattrs "
            "(Zarr v2). Remove the one that is out of date."
        )


def _without_version(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_version(item) for key, item in value.items() if key != "version"}
    return [_without_version(item) for item in value] if isinstance(value, list) else value


def _validated(folder: ZarrFolder, metadata: dict[str, Any], version: int) -> dict[str, Any]:
    """Return metadata that yaozarrs finds valid; hints for display (`omero`) are not looked at.

    Raises `ImageError` for others.
    """
    need("yaozarrs")
    import yaozarrs  # noqa: PLC0415  slow to import
    from pydantic import ValidationError  # noqa: PLC0415

    expected = _VERSIONS[version]
    _check_version(folder, metadata, expected)
    plain = {key: value for key, value in metadata.items() if key != "omero"}
    whole = plain if version == 2 else {"zarr_format": 3, "node_type": "group", "attributes": {"ome": plain}}
    model: Any = yaozarrs.v04.OMEZarrGroupJSON if version == 2 else yaozarrs.v05.OMEZarrGroupJSON
    try:
        with _validating, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yaozarrs.validate_ome_object(whole, model)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ImageError(
            f"Expected metadata of OME-Zarr {expected} in {folder.name}; found others: {where}: "
            f"{' '.join(first['msg'].split())}. Save the image again as OME-Zarr."
        ) from error
    return metadata


def _check_version(folder: ZarrFolder, metadata: Mapping[str, Any], expected: str) -> None:
    """Raise `ImageError` for a version of OME-Zarr that is not read."""
    parts = [metadata, metadata.get("plate"), metadata.get("well"), *_list(metadata.get("multiscales"))]
    stated = [part["version"] for part in parts if isinstance(part, dict) and "version" in part]
    other = next((version for version in stated if version != expected), None)
    if other is not None:
        raise ImageError(
            f"Expected OME-Zarr 0.4 in Zarr v2, or 0.5 in Zarr v3, in {folder.name}; found version {other!r}. Convert "
            "it, for example with ome2024-ngff-challenge or bioformats2raw."
        )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def open_zarr_image(group: OmeGroup, name: str, pixel_size: float | None = None) -> Stack:
    """Open an image of OME-Zarr as a stack.

    Args:
        group: The group of the image, whose kind is `multiscales`.
        name: Name of the image in messages and tables.
        pixel_size: Side of a pixel that is fine enough, micrometres: the coarsest resolution level that is as fine is
            opened, if the image knows the size of its pixels. None opens the full resolution, whose pixels are those
            that results are measured in.

    Raises:
        ImageError: A level is missing, or the image has axes, units, types or codecs that are not read.
        StorageError: The bucket cannot be read.
    """
    scales = group.metadata["multiscales"][0]
    axes = Axes.of(scales["axes"], group.folder.name)
    sides = _pixel_sides(axes, scales, group.folder.name)
    opened = _level(sides, pixel_size)
    arrays = _Arrays(group, axes, tuple(str(level["path"]) for level in scales["datasets"]))
    array = arrays.at(opened)
    factors = [
        [_scale(scales, axis) * _scale(level, axis) for axis in range(array.ndim)] for level in scales["datasets"]
    ]
    channels = _Channels.of(group.metadata, axes.size(array.shape, axes.channel))
    coarser = cache(lambda: arrays.coarser(opened, factors))
    return _stack(array, axes, name, channels, sides[opened], coarser)


@dataclass(frozen=True)
class _Arrays:
    """The arrays of the resolution levels of an image."""

    group: OmeGroup
    axes: Axes
    paths: tuple[str, ...]

    def at(self, level: int) -> "zarr.Array[Any]":
        """Open the array of a level. Raises `ImageError` if it is not there, or has other axes."""
        name, path = self.group.folder.name, self.paths[level]
        array = self.group.folder.array(path, self.group.zarr_format)
        if array is None or array.ndim != len(self.axes.names):
            found = "nothing is there" if array is None else f"it has {array.ndim} axes"
            raise ImageError(
                f"Expected resolution level {path!r} of {name}, with axes {''.join(self.axes.names)}; {found}. "
                "Copy the Zarr again, with all its levels."
            )
        _check_level(self.group, path)
        return array

    def coarser(self, opened: int, factors: Sequence[Sequence[float]]) -> list[tuple["zarr.Array[Any]", Steps]]:
        """Open the levels that reduce one in Y and X alone; those that reduce depths too have other planes.

        Args:
            opened: Number of the level that is the image.
            factors: Scale of each level along each axis.

        Raises:
            ImageError: A level is not there, or contradicts its scale or the image.
        """
        found = []
        for level in range(opened + 1, len(self.paths)):
            ratios = [factor / own for factor, own in zip(factors[level], factors[opened], strict=True)]
            steps = ratios[self.axes.y], ratios[self.axes.x]
            others = [ratio for axis, ratio in enumerate(ratios) if axis not in {self.axes.y, self.axes.x}]
            if min(steps) > 1 and all(math.isclose(ratio, 1) for ratio in others):
                found.append((self._reduced(level, self.at(opened), ratios), steps))
        return found

    def _reduced(self, level: int, whole: "zarr.Array[Any]", ratios: Sequence[float]) -> "zarr.Array[Any]":
        array, wanted = self.at(level), [side / ratio for side, ratio in zip(whole.shape, ratios, strict=True)]
        fits = all(abs(side - full) <= _ROUNDED for side, full in zip(array.shape, wanted, strict=True))
        if not fits or array.dtype != whole.dtype:
            raise ImageError(
                f"Expected about {' x '.join(f'{side:.5g}' for side in wanted)} of {whole.dtype} in resolution level "
                f"{self.paths[level]!r} of {self.group.folder.name}, as its scale says; found "
                f"{' x '.join(map(str, array.shape))} of {array.dtype}. Save the image again from its source."
            )
        return array


def _check_level(group: OmeGroup, path: str) -> None:
    """Raise `ImageError` if the consolidated metadata of an image say something else about a level."""
    key = array_key(path, group.zarr_format)
    copy = key if group.zarr_format == 2 else path
    _check_consolidated(group.folder, group.consolidated, copy, group.folder.document(key) or {})


def _level(sides: Sequence[float | None], wanted: float | None) -> int:
    """Return the number of the coarsest level with pixels of this size or smaller; 0 if there is or is known none."""
    fine = [
        (side, level) for level, side in enumerate(sides) if wanted and side is not None and side <= wanted * _SLACK
    ]
    return max(fine)[1] if fine else 0


def _pixel_sides(axes: Axes, scales: Mapping[str, Any], name: str) -> list[float | None]:
    """Return the side of the pixels of each level, micrometres; None if there is no unit.

    Also None for a reduced level whose pixels are not square, as those of a narrow image are whose writer rounds sides.

    Raises:
        ImageError: The unit is unknown, or X and Y have different units or, at full resolution, sizes.
    """
    units = axes.units[axes.y], axes.units[axes.x]
    if units[0] != units[1]:
        raise ImageError(
            f"Expected the same unit for X and Y in {name}; found {units[1] or 'none'} and {units[0] or 'none'}. "
            "Correct the units of its axes."
        )
    if units[0] is not None and units[0] not in _MICROMETRES:
        raise ImageError(
            f"Expected a unit of length that is known in {name}, such as micrometer or nanometer; found {units[0]!r}. "
            "Correct the unit of its axes."
        )
    found: list[float | None] = []
    for number, level in enumerate(scales["datasets"]):
        height, width = (_scale(scales, axis) * _scale(level, axis) for axis in (axes.y, axes.x))
        usable = min(height, width) > 0 and math.isfinite(height) and math.isfinite(width)
        square = usable and abs(height / width - 1) <= _SQUARE
        if not usable or (number == 0 and not square):
            raise ImageError(
                f"Expected square pixels in {name}; found a scale of {width:g} for X and {height:g} for Y. "
                "Correct its coordinateTransformations, or resample the image."
            )
        found.append(width * _MICROMETRES[units[0]] if square and units[0] is not None else None)
    return found


def _scale(part: Mapping[str, Any], axis: int) -> float:
    """Return the factor of an axis in the transformations of a level, or of all levels."""
    found = [each["scale"] for each in part.get("coordinateTransformations") or [] if each.get("type") == "scale"]
    return float(found[0][axis]) if found else 1.0


@dataclass(frozen=True)
class _Channels:
    """What is known of the channels of an image."""

    count: int
    names: tuple[str, ...]
    rgb: bool

    @classmethod
    def of(cls, metadata: Mapping[str, Any], count: int) -> "_Channels":
        omero = metadata.get("omero")
        listed = _list(omero.get("channels") if isinstance(omero, dict) else None)
        known = listed if len(listed) == count and all(isinstance(each, dict) for each in listed) else []
        labels = tuple(str(each.get("label") or "") for each in known)
        colours = tuple(str(each.get("color")).lstrip("#").upper() for each in known)
        return cls(count, labels if any(labels) else (), _are_rgb(labels, colours))


def _are_rgb(labels: Sequence[str], colours: Sequence[str]) -> bool:
    """Return whether three channels are the colours of one picture, and not stains that are shown in these colours."""
    if tuple(label.lower() for label in labels) in _RGB_LABELS:
        return True
    unnamed = all(label.lower().rstrip("0123456789: ") in _UNNAMED for label in labels)
    return unnamed and tuple(colours) == _RGB_COLOURS


def _stack(
    array: "zarr.Array[Any]",
    axes: Axes,
    name: str,
    channels: _Channels,
    pixel_size: float | None,
    coarser: Callable[[], list[tuple["zarr.Array[Any]", Steps]]],
) -> Stack:
    if 0 in array.shape:
        raise ImageError(f"Expected an image with pixels in {name}; found {'x'.join(map(str, array.shape))}.")
    planes = axes.size(array.shape, axes.time) * axes.size(array.shape, axes.z)
    if channels.count > _MOST_CHANNELS or planes > _MOST_PLANES:
        raise ImageError(
            f"Expected at most {_MOST_CHANNELS:,} channels and {_MOST_PLANES:,} planes in {name}; found "
            f"{channels.count:,} and {planes:,}. Save a part of it as an image of its own."
        )
    dtype = np.dtype(array.dtype).newbyteorder("=")
    rgb = channels.rgb and channels.count == 3 and dtype == np.uint8
    facts = PixelFacts(colours=3 if rgb else 1, bits=1 if dtype == np.bool_ else 8 * dtype.itemsize)

    def levels(time: int, depth: int) -> tuple[Level, ...]:
        readers = ((PlaneReader(each, axes, name, time, depth), steps) for each, steps in coarser())
        return tuple(Level(steps, reader.shape[:2], reader.read) for reader, steps in readers)

    def plane(time: int, depth: int) -> PixelFile:
        reader = PlaneReader(array, axes, name, time, depth)
        return PixelFile(
            name=name,
            shape=reader.shape,
            dtype=reader.dtype,
            fill=reader.fill,
            read_part=reader.read,
            facts=facts,
            pixel_size=pixel_size,
            choose=channels.count > 1 and not rgb,
            levels=lambda: levels(time, depth),
        )

    return Stack(
        name=name,
        times=axes.size(array.shape, axes.time),
        depths=axes.size(array.shape, axes.z),
        plane=plane,
        channels=channels.names,
    )
