"""Images in files and arrays, read in parts, from full resolution or a reduced copy (`ImageSource`)."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nucleus.data.images import check_colours, open_stacks
from nucleus.data.pixel_files import (
    Level,
    PixelFacts,
    PixelFile,
    ReadPart,
    memory_part,
    seen_channels,
    seen_pixels,
    unpacked_part,
)
from nucleus.data.stacks import (
    ChosenPlane,
    PlaneOptions,
    Stack,
    channel_number,
    check_channel,
    choose_planes,
    open_plane,
)
from nucleus.data.zarr_plates import image_paths, open_image_in
from nucleus.data.zarr_store import ZarrFolder, local_zarr
from nucleus.errors import ImageError, StorageError, UsageError
from nucleus.model.tiling import Region

__all__ = [
    "ImageSource",
    "SourceLevel",
    "array_source",
    "channel_count",
    "image_source",
    "open_source",
    "plane_source",
    "stack_source",
    "stacks_of",
]

_WHOLE_PIXELS = 1 << 24
"""Images of up to this many pixels are decoded when they are opened."""
_BAND_PIXELS = 1 << 24
_SLACK = 1.05
"""How much coarser than network pixels those of a level may be."""


@dataclass(frozen=True)
class SourceLevel:
    """A grid of pixels of an image: the image itself, or a reduced copy of it.

    Attributes:
        steps: Image pixels per pixel of the level, by rows and by columns.
        corner: Place of the image's first pixel in the level, in image pixels from the level's corner: not 0 in a part
            of an image.
        shape: Height and width of the level, px.
        read: As `ImageSource.read`, in pixels of the level.
    """

    steps: tuple[float, float]
    corner: tuple[int, int]
    shape: tuple[int, int]
    read: ReadPart


@dataclass(frozen=True)
class ImageSource:
    """An image that can be read in parts.

    Attributes:
        name: Name of the image in tables and messages.
        height: Height, px.
        width: Width, px.
        read: Function that reads rows and columns as eyes see them, h x w x 1 (grey) or h x w x 3 (RGB), in the depth
            of the image: palettes are applied, 0 is black, alpha and extra channels are left out.
        read_channels: Function that reads the same part as it is stored, h x w x C: all channels, alpha too, and the
            indices of a palette.
        pixel_size: Side of a pixel, micrometres; None if unknown.
        z: Depth of the plane in its stack, from 0; None for a projection, and where there is one depth.
        t: Time of the plane, from 0; None where there is one time.
        levels: Reduced copies that the network may look at instead, from fine to coarse.
        channels: Names of the channels that `read_channels` reads, in order; empty if the image does not name them.
    """

    name: str
    height: int
    width: int
    read: ReadPart
    read_channels: ReadPart
    pixel_size: float | None = None
    z: int | None = None
    t: int | None = None
    levels: tuple[SourceLevel, ...] = ()
    channels: tuple[str, ...] = ()

    def cropped(self, part: Region) -> "ImageSource":
        """Return a part of the image as an image."""

        def within(read: ReadPart) -> ReadPart:
            top, left = part.rows.start, part.columns.start
            return lambda rows, columns: read(
                slice(top + rows.start, top + rows.stop), slice(left + columns.start, left + columns.stop)
            )

        height, width = part.shape
        start = part.rows.start, part.columns.start
        levels = (replace(each, corner=(each.corner[0] + start[0], each.corner[1] + start[1])) for each in self.levels)
        return replace(
            self,
            height=height,
            width=width,
            read=within(self.read),
            read_channels=within(self.read_channels),
            levels=tuple(levels),
        )

    def level_at(self, scale: float) -> SourceLevel:
        """Return the coarsest level that is fine enough for `scale` network pixels per image pixel."""
        fine = [each for each in self.levels if 1 < max(each.steps) <= _SLACK / scale]
        return fine[-1] if fine else SourceLevel((1.0, 1.0), (0, 0), (self.height, self.width), self.read)

    def bands(self, multiple: int) -> Iterator[slice]:
        """Yield the rows of the image from the top, about 16 million pixels at a time, in multiples of `multiple`."""
        band = max(1, _BAND_PIXELS // self.width // multiple) * multiple
        return (slice(top, min(top + band, self.height)) for top in range(0, self.height, band))


def image_source(
    image: str | Path | ArrayLike, channel: int | str | None = None, planes: PlaneOptions | None = None
) -> ImageSource:
    """Open an image: a file (`open_source`) or an array (`array_source`). Raises `ImageError`, `UsageError`."""
    channel = _whole_number(channel)
    if isinstance(image, str | Path):
        return open_source(Path(image), channel, planes)
    if isinstance(channel, str) or planes not in {None, PlaneOptions()}:
        raise UsageError(
            "Expected a file for a channel's name, z or t; found an array, which has one plane and no names. Pass one "
            "plane of it, H x W or H x W x C, and the number of its channel."
        )
    return array_source(image, channel=channel)


def _whole_number(channel: int | str | None) -> int | str | None:
    """Return a channel as it was given. Raises `UsageError` if it is neither a whole number nor a name."""
    if channel is None or isinstance(channel, str):
        return channel
    with suppress(TypeError):
        if not isinstance(channel, bool | np.bool_):
            return operator.index(channel)
    raise UsageError(f"Expected a channel's number, from 0, or its name; found {channel!r}. Give one of them.")


def array_source(pixels: ArrayLike, name: str = "image", channel: int | None = None) -> ImageSource:
    """Return the source of an image in memory.

    Args:
        pixels: H x W (grey), or H x W x C with C = 1 (grey), 3 (RGB) or 4 (RGB and alpha, which is measured but not
            segmented); with any other C, `channel` is needed. Integers or floats of any depth, or bool.
        name: Name of the image in tables and messages.
        channel: Channel to segment, from 0; None segments grey and RGB images as a whole.

    Raises:
        ImageError: The array has another shape or type, or masked pixels, or it has several channels and `channel` is
            None.
    """
    array = np.asarray(pixels)
    if array.dtype.kind == "f" and array.dtype.itemsize > np.dtype(np.float64).itemsize:
        array = array.astype(np.float64)
    if np.ma.is_masked(pixels):
        raise ImageError(f"Expected values in all pixels of {name}; found masked ones. Fill them: image.filled(0).")
    if array.dtype.kind not in "buif" or array.ndim not in {2, 3} or 0 in array.shape:
        raise ImageError(
            f"Expected {name} to be an array of numbers, H x W or H x W x C; found shape {array.shape} of {array.dtype}"
            + (". Pass one plane of it." if array.ndim > 3 else ".")
        )
    stored = array if array.ndim == 3 else array[..., np.newaxis]
    channels = stored.shape[2]
    if channel is None and channels not in {1, 3, 4}:
        hint = " If its channels come first, pass np.moveaxis(image, 0, -1)." if array.shape[0] < array.shape[2] else ""
        raise ImageError(
            f"Expected one channel of {name}, which has {channels} (shape {array.shape}, read as H x W x C); "
            f"found no choice among them. Add: channel=0.{hint}"
        )
    facts = PixelFacts(colours=3 if channels in {3, 4} else 1)
    return _source(name, stored.shape, memory_part(stored), facts, channel)


def open_source(path: Path, channel: int | str | None = None, planes: PlaneOptions | None = None) -> ImageSource:
    """Open an image file.

    Small images are decoded whole. Of larger ones, only the parts that are read are decoded (tiled or uncompressed
    TIFF); others are unpacked to a temporary file.

    Args:
        path: PNG, TIFF, OME-TIFF, LSM, JPEG, BMP or WebP file.
        channel: Channel to segment, its number from 0 or its name; None segments grey and RGB images as a whole.
        planes: Which plane of a stack or time series to read; None for images of one plane.

    Raises:
        ImageError: The file is not an image or damaged; or it has several images, or several planes or channels and
            there is no choice of one.
    """
    stacks = stacks_of(path)
    chosen = choose_planes(stacks, planes or PlaneOptions())
    if len(chosen) > 1:
        raise ImageError(
            f"Expected one image in {path}; found {len(chosen)}. Add: --z and --t with a number, for one of them (in "
            "Python: z=0 and t=0, or Model.segment_planes for all of them)."
            if len(stacks) == 1
            else f"Expected one image in {path}; found {len(stacks)}. In Python: Model.segment_planes gives each."
        )
    return plane_source(path, stacks, chosen[0], channel)


def stacks_of(path: Path | ZarrFolder) -> list[Stack]:
    """Return the images of a file or of OME-Zarr, each of one or more times and depths, from the header.

    Raises:
        ImageError: There is no image, or one that is not read.
        StorageError: The bucket cannot be read.
    """
    with _readable(path):
        if isinstance(path, Path) and not path.is_dir():
            return open_stacks(path, str(path))
        folder = local_zarr(path) if isinstance(path, Path) else path
        return [open_image_in(folder, each, f"{path}/{each}".rstrip("/")) for each in image_paths(folder)]


def plane_source(
    path: Path | ZarrFolder, stacks: Sequence[Stack], chosen: ChosenPlane, channel: int | str | None
) -> ImageSource:
    """Open a plane or a projection of a file's images.

    Args:
        path: The file.
        stacks: Its images, from `stacks_of`.
        chosen: What was chosen of them, from `choose_planes`.
        channel: Channel to segment, its number from 0 or its name; None segments grey and RGB images as a whole.

    Raises:
        ImageError: The plane is damaged, or has no such channel, or has several and `channel` is None.
    """
    with _readable(path):
        source = stack_source(stacks, chosen, channel)
    return replace(source, name=path.name + stacks[chosen.stack].name.removeprefix(str(path)))


def stack_source(stacks: Sequence[Stack], chosen: ChosenPlane, channel: int | str | None) -> ImageSource:
    """Open a plane or a projection of images whose headers were read by `nucleus.data.open_stacks`.

    Args:
        stacks: The images.
        chosen: What was chosen of them, from `choose_planes`.
        channel: Channel to segment, its number from 0 or its name; None segments grey and RGB images as a whole.

    Returns:
        The source, with the name of its stack.

    Raises:
        ImageError: The plane is damaged, or has no such channel, or has several and `channel` is None.
        OSError: The file cannot be read.
    """
    stack = stacks[chosen.stack]
    number = channel_number(stack, channel)
    file, depth = open_plane(stack, chosen, number)
    check_channel(number, file.shape[2], file.name, stack.channels)
    if number is None and file.choose:
        raise ImageError(_no_channel(file, stack))
    large = file.shape[0] * file.shape[1] > _WHOLE_PIXELS
    source = _source(file.name, file.shape, _reader(file), file.facts, number, file.levels() if large else ())
    return replace(source, name=stack.name, pixel_size=file.pixel_size, z=depth, t=chosen.t, channels=stack.channels)


def _no_channel(file: PixelFile, stack: Stack) -> str:
    """Return the message for an image of several channels without a choice of one."""
    names = f": {', '.join(map(repr, stack.channels))}" if stack.channels else ""
    name = next((name for name in stack.channels if name.isalnum() and not name.isdigit()), None)
    example = f'--channel {name} (in Python: channel="{name}")' if name else "--channel 0 (in Python: channel=0)"
    return (
        f"Expected one channel of {file.name}, which has {file.shape[2]}{names}; found no choice among them. Add: "
        f"{example}"
    )


def channel_count(stacks: Sequence[Stack]) -> int:
    """Return the largest number of channels of the images of a file; damaged planes, which fail later, do not count."""
    return max(map(_channels_of, stacks))


def _channels_of(stack: Stack) -> int:
    for time, depth in product(range(stack.times), range(stack.depths)):
        with suppress(ImageError, OSError):
            return stack.plane(time, depth).shape[2]
    return 1


@contextmanager
def _readable(path: Path | ZarrFolder) -> Iterator[None]:
    """Raise `ImageError` for a file name that is not in UTF-8, as tables are, and for errors of the file system."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = str(path).encode(errors="backslashreplace").decode()
        raise ImageError(f"Expected a file name in UTF-8; found {shown}. Rename the file.") from error
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise ImageError(f"Cannot read {path}: {error.strerror or error}.") from error


def _reader(file: PixelFile) -> ReadPart:
    """Return the function that reads parts of the stored pixels."""
    if file.shape[0] * file.shape[1] > _WHOLE_PIXELS:
        return file.read_part or unpacked_part(file)
    pixels = np.empty(file.shape, file.dtype)
    file.fill(pixels)
    return memory_part(pixels)


def _source(
    name: str,
    shape: tuple[int, ...],
    stored: ReadPart,
    facts: PixelFacts,
    channel: int | None,
    levels: Sequence[Level] = (),
) -> ImageSource:
    """Return the source of stored pixels of `shape` (H, W, C).

    Raises:
        ImageError: There is no such channel, or none was chosen and the image is in the alpha channel.
    """
    height, width, channels = shape
    check_channel(channel, channels, name)

    def seen(stored: ReadPart) -> ReadPart:
        def read(rows: slice, columns: slice) -> NDArray[Any]:
            pixels = stored(rows, columns)
            if channel is None:
                return _with_digits(seen_pixels(pixels, facts, name))
            one = pixels[..., channel : channel + 1]
            return _with_digits(seen_channels(one, facts) if channel < facts.colours else one)

        return read

    source = ImageSource(
        name,
        height,
        width,
        seen(stored),
        lambda rows, columns: _with_digits(stored(rows, columns)),
        levels=tuple(SourceLevel(each.steps, (0, 0), each.shape, seen(each.read)) for each in levels),
    )
    if channel is None and channels > facts.colours:
        bands = (stored(rows, slice(0, width)) for rows in source.bands(1))
        check_colours(bands, facts.colours, name, "Add: --channel {channel} (in Python: channel={channel})")
    return source


def _with_digits(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return half-precision floats as float32, because percentiles and sums need more digits."""
    return pixels.astype(np.float32) if pixels.dtype == np.float16 else pixels
