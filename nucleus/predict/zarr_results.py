"""Labels as OME-Zarr: a store of their own, or below `labels` in the group of the image that they are of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nucleus.data.zarr_images import OmeGroup, read_group
from nucleus.data.zarr_planes import Axes
from nucleus.data.zarr_store import ZarrFolder, local_zarr
from nucleus.errors import AccessDeniedError, ImageError, ObjectExistsError, ObjectNotFoundError, OutputError
from nucleus.lazy import zarr
from nucleus.predict.blocks import AssembledLabels
from nucleus.predict.measurement import Frame
from nucleus.storage.bucket import Bucket
from nucleus.storage.claims import claimed_folder
from nucleus.storage.files import atomic_folder, temporary_folder, write_atomic

__all__ = ["ImageLabels", "IntoImage", "write_zarr"]

_CHUNK = 512
_SMALLEST_LEVEL = 512
_LABELS = "labels"
_CELLS = "_cells"
_DOCUMENTS = {2: ".zattrs", 3: "zarr.json"}
"""The document that makes a group of each version of Zarr known."""
_VERSIONS = {2: "0.4", 3: "0.5"}
_ATTEMPTS = 8


def write_zarr(path: Path, labels: AssembledLabels, image: Frame) -> None:
    """Write an OME-Zarr 0.5 label image: a pyramid whose levels take every second pixel of the one before."""
    unit = {"unit": "micrometer"} if image.pixel_size else {}
    grid = _Grid(
        name="nuclei",
        axes=[{"name": axis, "type": "space", **unit} for axis in "yx"],
        scale=[image.pixel_size or 1.0] * 2,
        translation=None,
        shape=image.shape,
        plane=(),
    )
    with atomic_folder(path) as folder:
        _write_pyramid(folder, labels, grid, 3, {})


@dataclass(frozen=True)
class _Grid:
    """The axes of a label image, Y and X last, and the plane of them that has labels.

    Attributes:
        name: Name of the labels.
        axes: Axes as OME-Zarr describes them.
        scale: Size of a pixel along each axis, in the units of the axes.
        translation: Place of the first pixel; None if the image does not say.
        shape: Length of each axis.
        plane: Index of the plane, along all axes but the last two.
    """

    name: str
    axes: Sequence[Mapping[str, Any]]
    scale: Sequence[float]
    translation: Sequence[float] | None
    shape: tuple[int, ...]
    plane: tuple[int, ...]

    def level(self, number: int) -> dict[str, Any]:
        """Return the metadata of a level, whose pixels are every second of those of the level before."""
        scale = [*self.scale[:-2], *(size * 2**number for size in self.scale[-2:])]
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        if self.translation is not None:
            steps.append({"type": "translation", "translation": list(self.translation)})
        return {"path": str(number), "coordinateTransformations": steps}


def _write_pyramid(
    folder: Path, labels: AssembledLabels, grid: _Grid, zarr_format: int, source: Mapping[str, Any]
) -> None:
    """Write the arrays of a label image, then its metadata."""
    group = zarr.open_group(folder, mode="w", zarr_format=zarr_format)  # type: ignore[arg-type]
    form: dict[str, Any] = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    if zarr_format == 3:
        form = {"dimension_names": [str(axis["name"]) for axis in grid.axes]}
    levels = [labels.labels]
    while max(levels[-1].shape) > _SMALLEST_LEVEL:
        levels.append(levels[-1][::2, ::2])
    for number, pixels in enumerate(levels):
        array = group.create_array(
            str(number),
            shape=(*grid.shape[:-2], *pixels.shape),
            chunks=(*(1 for _ in grid.plane), _CHUNK, _CHUNK),
            dtype=labels.kind,
            **form,
        )
        for top in range(0, pixels.shape[0], _CHUNK):
            rows = slice(top, top + _CHUNK)
            index: tuple[int | slice, ...] = (*grid.plane, rows)
            array[index] = pixels[rows].astype(labels.kind)
            labels.release()
    group.attrs.update(_attributes(grid, len(levels), _VERSIONS[zarr_format], source))


def _attributes(grid: _Grid, levels: int, version: str, source: Mapping[str, Any]) -> dict[str, Any]:
    scales = {
        "name": grid.name,
        "axes": list(grid.axes),
        "datasets": [grid.level(number) for number in range(levels)],
        "type": "nearest",
    }
    if version == "0.4":
        return {"multiscales": [{"version": version, **scales}], "image-label": {"version": version, **source}}
    return {"ome": {"version": version, "multiscales": [scales], "image-label": {"version": version, **source}}}


@dataclass(frozen=True)
class IntoImage:
    """That labels are written into the OME-Zarr of their image, below `labels` in its group.

    Attributes:
        name: Name of the labels; those of cells have `_cells` after it.
        overwrite: Whether labels of this name are replaced.
    """

    name: str = "nuclei"
    overwrite: bool = False


class ImageLabels:
    """Labels below `labels` in the group of an image, in the version of OME-Zarr and with the axes of the image.

    They are whole before the list of labels names them. In a bucket each object is created by a conditional write, so
    that two writers never mix; in a folder the labels are put in their place at once.

    Args:
        file: Where the image is.
        into: Name of the labels, and whether those that are there are replaced.

    Raises:
        ImageError: The image is not one of OME-Zarr.
    """

    def __init__(self, file: Path | ZarrFolder, into: IntoImage) -> None:
        if isinstance(file, Path) and not file.is_dir():
            raise ImageError(
                f"Expected OME-Zarr for --into-image; found {file}, which has no room for labels. Leave out "
                "--into-image: they get a file of their own."
            )
        self._folder = local_zarr(file) if isinstance(file, Path) else file
        self._into = into
        group = read_group(self._folder)
        if group is None or group.kind != "multiscales":
            raise ImageError(f"Expected an image of OME-Zarr at {file} for --into-image; found none.")
        self._group: OmeGroup = group

    def check(self, image: Frame, *, cells: bool) -> None:
        """Make the group `labels`, if there is none, before labels are computed.

        Raises:
            ImageError: The group cannot be written, or has labels of this name, which must not be replaced; or the
                labels would not be of one plane of the image.
            StorageError: The bucket cannot be read.
        """
        self._grid(image)
        for name in self._names(cells=cells):
            self._check_free(name)
        with self._writing():
            self._list(None)

    def write(self, labels: AssembledLabels, image: Frame, *, cells: bool = False) -> None:
        """Write labels of the image, or of the cells around its nuclei.

        Raises:
            ImageError: They are not of one plane of the image, or must not be written.
            OutputError: The disk has no room.
            StorageError: The bucket cannot be read or written.
        """
        name = self._names(cells=cells)[-1]
        grid, source = replace(self._grid(image), name=name), {"source": {"image": "../../"}}
        place = self._folder.below(_LABELS).place
        with self._writing():
            if isinstance(place, Path):
                with claimed_folder(place):
                    self._check_free(name)
                    with atomic_folder(place / name) as folder:
                        _write_pyramid(folder, labels, grid, self._group.zarr_format, source)
                    self._list(name)
                return
            with temporary_folder(_LABELS) as temporary:
                _write_pyramid(temporary / name, labels, grid, self._group.zarr_format, source)
                self._upload(*place, temporary / name)
            self._list(name)

    def _names(self, *, cells: bool) -> list[str]:
        return [self._into.name, f"{self._into.name}{_CELLS}"] if cells else [self._into.name]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise `ImageError` for an image that must not be written."""
        try:
            yield
        except (AccessDeniedError, OutputError) as error:
            if isinstance(error, OutputError) and os.access(str(self._folder), os.W_OK):
                raise
            raise ImageError(
                f"Expected permission to write labels into {self._folder}; found none. {error} Without --into-image "
                "the labels get a store of their own."
            ) from error

    def _check_free(self, name: str) -> None:
        """Raise `ImageError` if there are labels of this name, whole or in part, unless they are replaced."""
        place = self._folder.below(f"{_LABELS}/{name}").place
        there = place.exists() if isinstance(place, Path) else next(place[0].objects(f"{place[1]}/"), None) is not None
        if there and not self._into.overwrite:
            raise self._taken(name)

    def _taken(self, name: str) -> ImageError:
        return ImageError(
            f"Expected no labels {name!r} in {self._folder}; found some, whole or in part. Give the new ones another "
            "name by --label-name, or add --overwrite."
        )

    def _upload(self, bucket: Bucket, key: str, folder: Path) -> None:
        """Create the objects of labels, the document that makes them known last; first remove those to replace."""
        key = f"{key}/{folder.name}"
        if self._into.overwrite:
            for item in sorted(bucket.objects(f"{key}/"), key=lambda item: item.key.count("/")):
                bucket.delete(item.key)
        last = folder / _DOCUMENTS[self._group.zarr_format]
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path != last)
        for path in [*files, last]:
            try:
                bucket.put(f"{key}/{path.relative_to(folder).as_posix()}", path, if_absent=True)
            except ObjectExistsError as error:
                raise self._taken(folder.name) from error

    def _list(self, name: str | None) -> None:
        """Add a name to the list of labels, which is made if there is none."""
        place = self._folder.below(_LABELS).place
        document = _DOCUMENTS[self._group.zarr_format]
        if isinstance(place, Path):
            path = place / document
            listed = self._listed(path.read_bytes() if path.exists() else None, name)
            if self._group.zarr_format == 2 and not (place / ".zgroup").exists():
                write_atomic(place / ".zgroup", json.dumps({"zarr_format": 2}))
            if listed is not None:
                write_atomic(path, listed)
            return
        bucket, key = place
        if self._group.zarr_format == 2 and bucket.find(f"{key}/.zgroup") is None:
            bucket.put(f"{key}/.zgroup", json.dumps({"zarr_format": 2}).encode())
        self._list_in(bucket, f"{key}/{document}", name)

    def _list_in(self, bucket: Bucket, key: str, name: str | None) -> None:
        """Add a name to the list of labels in a bucket by compare-and-swap."""
        for attempt in range(_ATTEMPTS):
            try:
                data, tag = bucket.get_tagged(key)
            except ObjectNotFoundError:
                data, tag = None, None
            listed = self._listed(data, name)
            if listed is None:
                return
            try:
                bucket.put(key, listed, if_absent=tag is None, if_match=tag)
                return
            except ObjectExistsError:  # another writer added labels in between
                if attempt + 1 == _ATTEMPTS:
                    raise

    def _listed(self, data: bytes | None, name: str | None) -> bytes | None:
        """Return the document of the group `labels` with a name in its list; None if it has the name already."""
        version = self._group.zarr_format
        inside: dict[str, Any]
        if version == 2:
            found = inside = {} if data is None else self._parsed(data)
        else:
            found = {"zarr_format": 3, "node_type": "group"} if data is None else self._parsed(data)
            inside = found.setdefault("attributes", {}).setdefault("ome", {"version": _VERSIONS[version]})
        names = inside.setdefault(_LABELS, [])
        if data is not None and (name is None or name in names):
            return None
        inside[_LABELS] = [*names, *([name] if name else [])]
        return json.dumps(found, indent=1).encode()

    def _parsed(self, data: bytes) -> dict[str, Any]:
        try:
            found = json.loads(data)
            names = (found if self._group.zarr_format == 2 else found["attributes"].get("ome", {})).get(_LABELS, [])
            if isinstance(names, list):
                return dict(found)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise ImageError(
            f"Expected the list of labels in {self._folder}/{_LABELS}; found something else. Correct its "
            f"{_DOCUMENTS[self._group.zarr_format]}, or leave out --into-image."
        )

    def _grid(self, image: Frame) -> _Grid:
        """Return the axes of the labels: those of the image's level of this size, without channels."""
        scales = self._group.metadata["multiscales"][0]
        axes = Axes.of(scales["axes"], str(self._folder))
        if (axes.y, axes.x) != (len(axes.names) - 2, len(axes.names) - 1):
            raise ImageError(
                f"Expected Y and X as the last axes of {self._folder} for --into-image, whose labels have the same; "
                f"found {', '.join(axes.names)}. Leave out --into-image: the labels get a store of their own."
            )
        for level in scales["datasets"]:
            array = self._folder.array(level["path"], self._group.zarr_format)
            if array is not None and (array.shape[axes.y], array.shape[axes.x]) == image.shape:
                break
        else:
            raise ImageError(f"Expected a level of {image.shape} px in {self._folder}; found none. Copy it again.")
        kept = [number for number in range(len(axes.names)) if number != axes.channel]
        chosen = {axis: index for axis, index in ((axes.z, image.z), (axes.time, image.t)) if axis is not None}
        if any(array.shape[axis] > 1 and index is None for axis, index in chosen.items()):
            raise ImageError(
                f"Expected one depth of {self._folder} for --into-image; found a projection, which is not a plane of "
                "the image. Give --z best or a number, or leave out --into-image."
            )
        steps = (level, scales)
        return _Grid(
            name=self._into.name,
            axes=[scales["axes"][number] for number in kept],
            scale=_product([_step(part, "scale", 1.0, len(axes.names)) for part in steps], kept),
            translation=_translation(steps, kept, len(axes.names)),
            shape=tuple(int(array.shape[number]) for number in kept),
            plane=tuple(chosen.get(number) or 0 for number in kept[:-2]),
        )


def _step(part: Mapping[str, Any], kind: str, default: float, count: int) -> list[float]:
    """Return the values of a transformation for each axis; the default if there is none of this kind."""
    found = [each[kind] for each in part.get("coordinateTransformations") or [] if each.get("type") == kind]
    return [float(value) for value in found[0]] if found else [default] * count


def _product(factors: Sequence[Sequence[float]], kept: Sequence[int]) -> list[float]:
    return [factors[0][number] * factors[1][number] for number in kept]


def _translation(steps: tuple[Any, Any], kept: Sequence[int], count: int) -> list[float] | None:
    """Return where the first pixel is: the level's place, scaled and moved as the whole image is; None for nowhere."""
    own, whole = (_step(part, "translation", 0.0, count) for part in steps)
    sizes = _step(steps[1], "scale", 1.0, count)
    found = [own[number] * sizes[number] + whole[number] for number in kept]
    return found if any(found) else None
