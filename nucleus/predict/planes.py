"""Which images the files of a prediction hold: planes of stacks, projections, and several images of one file."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from nucleus.data.stacks import ChosenPlane, PlaneOptions, Stack, choose_planes
from nucleus.data.zarr_plates import in_zarr
from nucleus.data.zarr_store import ZarrFolder
from nucleus.errors import ImageError
from nucleus.predict.source import ImageSource, channel_count, plane_source, stacks_of

__all__ = ["FileImage", "ImageOpener", "PlannedImages", "images_of", "plan_images"]


@dataclass(frozen=True)
class FileImage:
    """An image of a file: the file itself, a plane of a stack, or a projection.

    Attributes:
        file: The file, or the group of OME-Zarr.
        source: Name of the file, a relative path with forward slashes.
        name: Name of the image in tables: that of the file, and `#1` if it is the second image of it, and so on.
        chosen: What it is of the file.
    """

    file: Path | ZarrFolder
    source: str
    name: str
    chosen: ChosenPlane

    @property
    def title(self) -> str:
        """Name for people, which is another one for each image of a file, such as `a.tif z=3`."""
        return f"{self.name}{self.chosen.label}"

    @property
    def output(self) -> str:
        """Name that the image would have as a file of its own, such as `a.z3.tif`; its results are named after it."""
        path = PurePosixPath(self.source)
        return str(path.with_name(f"{path.stem}{self.chosen.ending}{path.suffix}"))


@dataclass(frozen=True)
class PlannedImages:
    """The images of files.

    Attributes:
        images: The images, in the order of the files; those of one file follow each other.
        failures: Error message for each file whose header cannot be read or does not fit the options, by its name.
        channels: Number of channels of the image with the most, at least 1.
    """

    images: list[FileImage] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    channels: int = 1


def plan_images(
    files: Mapping[str, Path | ZarrFolder],
    options: PlaneOptions,
    header: Callable[[Path | ZarrFolder], list[Stack]] = stacks_of,
) -> PlannedImages:
    """Return the images of files, from their headers. Of an image in several files, the first one counts.

    Args:
        files: The files by their names, which are relative paths with forward slashes.
        options: Which planes of stacks and time series to take.
        header: Function that reads the header of a file, such as `ImageOpener.header`.
    """
    planned = PlannedImages()
    most, parts = 1, set[Path]()
    for name, file in files.items():
        if file in parts:
            continue
        try:
            stacks = header(file)
            parts.update(*(stack.files for stack in stacks))
            chosen = replace(options, series=None) if in_zarr(name) else options  # of Zarr, each is a place of its own
            planned.images.extend(images_of(file, name, stacks, chosen))
            most = max(most, channel_count(stacks))
        except ImageError as error:
            planned.failures[name] = str(error)
    return replace(planned, channels=most)


def images_of(file: Path | ZarrFolder, name: str, stacks: list[Stack], options: PlaneOptions) -> Iterator[FileImage]:
    """Return the images of a file.

    Args:
        file: The file.
        name: Its name in tables.
        stacks: What it holds, from `stacks_of`.
        options: Which planes to take.

    Raises:
        ImageError: A stack has several planes, and there is no choice among them; or it lacks the chosen one.
    """
    chosen = choose_planes(stacks, options)
    return (FileImage(file, name, name + stacks[each.stack].name.removeprefix(str(file)), each) for each in chosen)


class ImageOpener:
    """Opens images of files; it keeps the header of the last file, because its images follow each other.

    Args:
        channel: Channel to segment, its number from 0 or its name; None segments grey and RGB images as a whole.
    """

    def __init__(self, channel: int | str | None) -> None:
        self._channel = channel
        self._last: tuple[Path | ZarrFolder, list[Stack]] | None = None

    def header(self, file: Path | ZarrFolder) -> list[Stack]:
        """Return the images of a file, by `stacks_of`. Raises `ImageError`."""
        if self._last is None or self._last[0] != file:
            self._last = file, stacks_of(file)
        return self._last[1]

    def open(self, image: FileImage) -> ImageSource:
        """Open an image; its name is that in tables. Raises `ImageError`."""
        source = plane_source(image.file, self.header(image.file), image.chosen, self._channel)
        return replace(source, name=image.name)
