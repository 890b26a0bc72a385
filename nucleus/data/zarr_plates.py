"""Where images are in OME-Zarr: one image, the fields of a well or of a plate, or the images of bioformats2raw."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path, PurePosixPath

from nucleus.data.stacks import Stack, chosen_series
from nucleus.data.zarr_images import OmeGroup, ome_attributes, open_zarr_image, read_group
from nucleus.data.zarr_store import ZarrFolder, bucket_zarr, is_zarr, local_zarr
from nucleus.errors import ImageError
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri, uri_or_path

__all__ = ["PlateField", "image_paths", "in_zarr", "open_image_in", "open_zarr", "plate_field", "zarr_name"]

_AT_ONCE = 16
_LAYOUT = "bioformats2raw.layout"
_LEVELS = 3
"""Parts of the path of a field in its plate: row, column, field."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class PlateField:
    """The place of an image in a plate.

    Attributes:
        plate: Name of the plate, without `.zarr`.
        row: Name of the row, such as `B`.
        column: Name of the column, such as `3`.
        field: Name of the field in its well, such as `0`.
    """

    plate: str
    row: str
    column: str
    field: str


def plate_field(name: str) -> PlateField | None:
    """Return the place of an image in a plate, from its name; None if it is not of a plate.

    >>> plate_field("screen/p1.zarr/B/3/0")
    PlateField(plate='p1', row='B', column='3', field='0')
    """
    parts = PurePosixPath(name).parts
    if len(parts) <= _LEVELS or not is_zarr(parts[-_LEVELS - 1]):
        return None
    return PlateField(PurePosixPath(parts[-_LEVELS - 1]).stem, *parts[-_LEVELS:])


def in_zarr(location: str) -> bool:
    """Return whether a path with forward slashes is that of a Zarr hierarchy, or of a part of one."""
    return any(map(is_zarr, PurePosixPath(location).parts))


def zarr_name(location: str) -> str:
    """Return the name of a place in Zarr: its path from the folder that ends in `.zarr`, or its last part."""
    parts = PurePosixPath(location).parts
    start = next((at for at, part in enumerate(parts) if is_zarr(part)), len(parts) - 1)
    return "/".join(parts[start:])


def open_zarr(
    location: str | Path | S3Uri,
    *,
    pixel_size: float | None = None,
    anonymous: bool = False,
    tell: Tell = lambda _: None,
) -> list[Stack]:
    """Open the images of OME-Zarr 0.4 or 0.5: an image, or all those of a well, a plate or a file of bioformats2raw.

    Args:
        location: Folder, or `s3://bucket/.../name.zarr`; also a group within.
        pixel_size: Side of a pixel that is fine enough, micrometres; see `open_zarr_image`. None for full resolution.
        anonymous: Whether requests to the bucket are not signed, as public buckets allow.
        tell: Called with a sentence for each well or field that the metadata list, but that is not there.

    Returns:
        The images. Names are paths from the folder that ends in `.zarr`: `plate.zarr/B/3/0` (see `plate_field`).

    Raises:
        ImageError: There is no OME-Zarr, or one that is not read.
        StorageError: The bucket cannot be read.
        MissingPackageError: zarr or yaozarrs is not installed.
    """
    if isinstance(location, str):
        location = uri_or_path(location)
    if isinstance(location, Path):
        folder, start = local_zarr(location), zarr_name(location.absolute().as_posix())
    else:
        folder, start = bucket_zarr(Bucket(location, anonymous=anonymous)), zarr_name(str(location))
    names = {path: f"{start}/{path}".rstrip("/") for path in image_paths(folder, tell)}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda path: open_image_in(folder, path, names[path], pixel_size), names))


def open_image_in(folder: ZarrFolder, path: str, name: str, pixel_size: float | None = None) -> Stack:
    """Open the image at a path below a group; an empty path is the group itself.

    Raises:
        ImageError: There is no image of OME-Zarr, or one that is not read; see `open_zarr_image`.
        StorageError: The bucket cannot be read.
    """
    group = _group(folder.below(path) if path else folder)
    if group.kind != "multiscales":
        raise ImageError(f"Expected an image of OME-Zarr at {group.folder.name}; found one of kind {group.kind}.")
    return open_zarr_image(group, name, pixel_size)


def image_paths(folder: ZarrFolder, tell: Tell = lambda _: None, series: int | str | None = None) -> list[str]:
    """Return the paths of the images below a group, in the order of its metadata; [""] if it is an image itself.

    Args:
        folder: The group.
        tell: Called with a sentence for each well or field that is not there.
        series: Of the images of bioformats2raw, one by its path, which is its number from 0; None or "all" for all.

    Raises:
        ImageError: It is not an OME-Zarr, has no images at all or not the chosen one, or is the labels of one.
        StorageError: The bucket cannot be read.
    """
    group = _group(folder)
    if "image-label" in group.metadata:
        raise ImageError(
            f"Expected an image at {folder.name}; found labels of one (image-label). Name the image itself: the group "
            "above its labels."
        )
    readers: dict[str, Callable[[OmeGroup, Tell], list[str]]] = {"plate": _fields, "well": _images, _LAYOUT: _series}
    found = readers[group.kind](group, tell) if group.kind in readers else [""]
    if not found:
        raise ImageError(f"Expected images in {folder.name}; all that its metadata list are absent. Copy it again.")
    if group.kind in {"plate", "well"} and series is not None:
        raise ImageError(f"Expected no --series for the fields of {folder.name}; found {series}. Name a field's path.")
    path = str(series) if group.kind == _LAYOUT and series is not None else series  # numbers would skip absent images
    return [found[number] for number in chosen_series(found, path, folder.name)]


def _group(folder: ZarrFolder) -> OmeGroup:
    group = read_group(folder)
    if group is None:
        raise ImageError(
            f"Expected OME-Zarr in {folder.name}; nothing of Zarr is there (zarr.json, .zgroup or .zattrs). Check the "
            "path, or copy it again."
        )
    return group


def _fields(plate: OmeGroup, tell: Tell) -> list[str]:
    """Return the paths of the fields of a plate."""
    wells = [str(well["path"]) for well in plate.metadata["plate"]["wells"]]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        groups = list(pool.map(lambda path: read_group(plate.folder.below(path)), wells))
    found, absent = [], []
    for path, well in zip(wells, groups, strict=True):
        if well is None:
            absent.append(path)
        elif well.kind != "well":
            raise ImageError(f"Expected a well at {well.folder.name}; found metadata of kind {well.kind}.")
        else:
            found += [f"{path}/{image}" for image in _images(well, tell)]
    _tell_of(absent, "wells", plate, tell)
    return found


def _images(well: OmeGroup, tell: Tell) -> list[str]:
    """Return the paths of the fields of a well."""
    listed = [str(image["path"]) for image in well.metadata["well"]["images"]]
    absent = [path for path in listed if not _is_there(well.folder.below(path))]
    _tell_of(absent, "fields", well, tell)
    return [path for path in listed if path not in absent]


def _is_there(folder: ZarrFolder) -> bool:
    return any(folder.read(key) is not None for key in ("zarr.json", ".zattrs"))


def _series(group: OmeGroup, tell: Tell) -> list[str]:
    """Return the paths of the images that bioformats2raw wrote: those that it lists, or 0, 1, 2 and so on."""
    beside = group.folder.below("OME")
    document = beside.document(".zattrs") if group.zarr_format == 2 else ome_attributes(beside.document("zarr.json"))
    listed = (document or {}).get("series")
    if not isinstance(listed, list):
        return list(takewhile(lambda path: _is_there(group.folder.below(path)), map(str, count())))
    paths = [str(path) for path in listed]
    absent = [path for path in paths if not _is_there(group.folder.below(path))]
    _tell_of(absent, "images", group, tell)
    return [path for path in paths if path not in absent]


def _tell_of(absent: Sequence[str], what: str, group: OmeGroup, tell: Tell) -> None:
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        tell(f"{group.folder.name}: {what} without data: {', '.join(absent[:5])}{more}")
