"""Images of OME-Zarr with their `labels/`: which label image belongs to an image, and the planes of both."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from nucleus.data.pixel_files import PixelFile
from nucleus.data.stacks import (
    ChosenPlane,
    PlaneOptions,
    Stack,
    channel_number,
    check_channel,
    choose_planes,
    one_channel,
    open_plane,
)
from nucleus.data.zarr_images import OmeGroup, ome_attributes, open_zarr_image, read_group
from nucleus.data.zarr_store import ZarrFolder
from nucleus.errors import ImageError, UsageError

__all__ = ["LabelledPlane", "ZarrChoice", "labelled_planes"]

_FOLDER = "labels"
_SAME = 0.01
"""Pixel sizes are the same if they differ by less than this fraction."""


@dataclass(frozen=True)
class ZarrChoice:
    """What to import of OME-Zarr.

    Attributes:
        labels: Name of the label image; None takes the only one.
        channel: Channel of the image, its number from 0 or its name; None takes grey and RGB images as a whole.
        planes: Depth and time: numbers, "all", or "best" for the depth. Not projections, which labels have none of.

    Raises:
        UsageError: `planes` is a projection.
    """

    labels: str | None = None
    channel: int | str | None = None
    planes: PlaneOptions = field(default_factory=PlaneOptions)

    def __post_init__(self) -> None:
        if self.planes.z in {"max", "mean"}:
            raise UsageError(
                f"Expected a depth, best or all for --z, because labels have no projection; found {self.planes.z}."
            )


@dataclass(frozen=True)
class LabelledPlane:
    """A plane of an image, and the same plane of its labels.

    Attributes:
        title: Name of the image, with its depth and time where there are several.
        stack: The image.
        labels: Its label image.
        chosen: The plane.
        channel: Number of the channel, or None.
    """

    title: str
    stack: Stack
    labels: Stack
    chosen: ChosenPlane
    channel: int | None

    def open(self) -> tuple[PixelFile, PixelFile]:
        """Return the image, of one channel or RGB, and its labels.

        Raises:
            ImageError: The labels are not integers in the pixels of the image, or the image lacks the channel, or has
                several and none was chosen.
        """
        image, depth = open_plane(self.stack, self.chosen, self.channel)
        labels = self.labels.plane(self.chosen.t or 0, depth or 0)
        _check_pair(image, labels)
        check_channel(self.channel, image.shape[2], image.name, self.stack.channels)
        if self.channel is None and image.choose:
            names = f": {', '.join(map(repr, self.stack.channels))}" if self.stack.channels else ""
            raise ImageError(
                f"Expected one channel of {image.name}, which has {image.shape[2]}{names}; found no choice among them. "
                "Add: --channel with its number, from 0, or its name."
            )
        return (image if self.channel is None else one_channel(image, self.channel)), labels


def labelled_planes(folder: ZarrFolder, name: str, choice: ZarrChoice) -> Iterator[LabelledPlane]:
    """Yield the planes of an image of OME-Zarr, each with its labels.

    Args:
        folder: The group of the image.
        name: Name of the image in messages, and the start of the titles.
        choice: Which labels, channel and planes to take.

    Raises:
        ImageError: There is no image or no such label image, or both have other depths or times, or there are several
            and no choice.
        StorageError: The bucket cannot be read.
    """
    group = read_group(folder)
    if group is None or group.kind != "multiscales":
        raise ImageError(f"Expected an image of OME-Zarr at {folder.name}; found none. Check the path.")
    stack, labels = open_zarr_image(group, name), _labels_of(group, name, choice.labels)
    if (stack.times, stack.depths) != (labels.times, labels.depths):
        raise ImageError(
            f"Expected {stack.times} times and {stack.depths} depths in the labels {labels.name}, as in the image; "
            f"found {labels.times} and {labels.depths}. Save the labels again, with the axes of the image."
        )
    if (stack.depths > 1 and choice.planes.z is None) or (stack.times > 1 and choice.planes.t is None):
        raise ImageError(
            f"Expected one plane in {name}; found {stack.depths} depths and {stack.times} times. Add: --z and --t with "
            "a number from 0, or all."
        )
    number = channel_number(stack, choice.channel)
    for chosen in choose_planes([stack], choice.planes):
        yield LabelledPlane(f"{name}{chosen.label}", stack, labels, chosen, number)


def _labels_of(group: OmeGroup, name: str, wanted: str | None) -> Stack:
    """Open a label image of an image."""
    names = _label_names(group)
    if not names:
        raise ImageError(
            f"Expected labels beside the image {group.folder.name}; found none in {_FOLDER}/. Save them as labels of "
            "OME-Zarr."
        )
    if wanted is None and len(names) > 1:
        raise ImageError(
            f"Expected one label image in {group.folder.name}; found {', '.join(names)}. Add: --labels {names[0]}"
        )
    if wanted is not None and wanted not in names:
        raise ImageError(f"Expected labels {wanted!r} in {group.folder.name}; found {', '.join(names)}.")
    path = f"{_FOLDER}/{wanted or names[0]}"
    found = read_group(group.folder.below(path))
    if found is None or found.kind != "multiscales":
        raise ImageError(
            f"Expected a label image at {group.folder.name}/{path}, which its list names; found none. Copy the Zarr "
            "again."
        )
    return open_zarr_image(found, f"{name}/{path}")


def _label_names(group: OmeGroup) -> list[str]:
    """Return the names of the label images that the group `labels` lists."""
    folder = group.folder.below(_FOLDER)
    document = folder.document(".zattrs") if group.zarr_format == 2 else ome_attributes(folder.document("zarr.json"))
    listed = (document or {}).get("labels")
    return [str(name) for name in listed] if isinstance(listed, list) else []


def _check_pair(image: PixelFile, labels: PixelFile) -> None:
    """Raise `ImageError` unless the labels are integers in the pixels of the image."""
    if labels.dtype.kind not in "biu" or labels.shape[2] != 1:
        raise ImageError(
            f"Expected integers in one channel in {labels.name}; found {labels.shape[2]} channels of {labels.dtype}. "
            "Save the labels as integers."
        )
    if labels.shape[:2] != image.shape[:2]:
        raise ImageError(
            f"Expected {image.shape[1]} x {image.shape[0]} px (width x height) in {labels.name}, as in the image; "
            f"found {labels.shape[1]} x {labels.shape[0]}. Save the labels at the full resolution of the image."
        )
    sizes = image.pixel_size, labels.pixel_size
    if sizes[0] and sizes[1] and abs(sizes[0] / sizes[1] - 1) > _SAME:
        raise ImageError(
            f"Expected pixels of {sizes[0]:g} micrometres in {labels.name}, as in the image; found {sizes[1]:g}. "
            "Correct the coordinateTransformations of the labels."
        )
