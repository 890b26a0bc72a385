"""What a request brings: an image in memory or in a private temporary file, and the options of its segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import open_stacks
from nucleus.data.slides import WITH_OTHER_FILES
from nucleus.data.stacks import ChosenPlane, PlaneOptions, Stack, choose_planes
from nucleus.data.zarr_plates import image_paths, open_image_in
from nucleus.data.zarr_store import ZarrFolder
from nucleus.errors import RequestError
from nucleus.predict.model import PredictionOptions
from nucleus.predict.source import ImageSource, array_source, stack_source

__all__ = ["HEAD_BYTES", "OpenedUpload", "SegmentOptions", "Upload", "check_alone", "open_upload"]

_OF_SEVERAL_FILES = (*WITH_OTHER_FILES, ".vms", ".vmu")
"""Ends of the names of slides that are several files; a MIRAX slide alone would pass for the JPEG of its thumbnail."""
_DICOM = slice(128, 132), b"DICM"
HEAD_BYTES = _DICOM[0].stop
"""Bytes of a file from which `check_alone` knows what it is."""
_MOST_IMAGES = 384
"""Images of a plate in OME-Zarr that a request may name together: a field of each well of the most usual ones."""
_CHANNELS_OF_A_PIXEL = 4
"""Images with more channels count as several in the limit of pixels: their values need as much more memory."""


@dataclass(frozen=True)
class Upload:
    """An image to segment.

    Attributes:
        name: Name of the image in tables and messages, as the client gave it, without folders; of an image in OME-Zarr,
            also its path in it.
        content: The bytes of a file, a file, an OME-Zarr or a part of one, or an array (H x W, or H x W x C).
    """

    name: str
    content: bytes | Path | ZarrFolder | NDArray[Any]


@dataclass(frozen=True)
class SegmentOptions:
    """Options of a request, named as those of `nucleus predict`.

    Attributes:
        diameter: Typical diameter of the nuclei, px; None estimates it from the image.
        pixel_size: Side of a pixel, micrometres; None for that of the file.
        channel: Channel to segment, its number from 0 or its name.
        z: A depth from 0, "max", "mean", "best" or "all".
        t: A time from 0, or "all".
        tta: Whether to average over flips and quarter turns.
        as_is: See `nucleus.predict.PredictionOptions`.
        denoise: See there.
    """

    diameter: float | None = None
    pixel_size: float | None = None
    channel: int | str | None = None
    z: int | str | None = None
    t: int | str | None = None
    tta: bool = False
    as_is: bool = False
    denoise: bool = False

    @property
    def prediction(self) -> PredictionOptions:
        """The options that a model takes."""
        return PredictionOptions(
            diameter=self.diameter,
            pixel_size=self.pixel_size,
            turns=self.tta,
            as_is=self.as_is,
            denoise=self.denoise,
        )


@dataclass(frozen=True)
class OpenedUpload:
    """An upload whose header was read.

    Attributes:
        upload: The upload.
        options: Options of the request.
        stacks: The images of the file; none for an array.
        chosen: The planes to segment.
        pixels: Number of pixels that are read to segment them.
    """

    upload: Upload
    options: SegmentOptions
    stacks: Sequence[Stack]
    chosen: Sequence[ChosenPlane]
    pixels: int

    def source(self, chosen: ChosenPlane) -> ImageSource:
        """Open one of the planes. Raises `ImageError`."""
        if isinstance(self.upload.content, np.ndarray):
            channel = self.options.channel
            return array_source(self.upload.content, self.upload.name, channel if isinstance(channel, int) else None)
        return stack_source(self.stacks, chosen, self.options.channel)

    def output(self, chosen: ChosenPlane) -> str:
        """Return the name that a plane would have as a file of its own, such as `a.z3.tif`."""
        path = PurePosixPath(self.upload.name)
        return f"{path.stem}{chosen.ending}{path.suffix}"


def check_alone(name: str, head: bytes) -> None:
    """Raise `RequestError` for a slide that is several files; `head` has the first `HEAD_BYTES` of a file."""
    if name.lower().endswith(_OF_SEVERAL_FILES) or head[_DICOM[0]] == _DICOM[1]:
        raise RequestError(
            f"Expected an image in one file; {name} is a slide of several files (MIRAX, DICOM, or a list of JPEG "
            "files). Save it as one TIFF, or run nucleus predict beside its files.",
            415,
        )


def open_upload(upload: Upload, options: SegmentOptions, most: int) -> OpenedUpload:
    """Read the header of an upload, and choose its planes; no pixel is decoded.

    Args:
        upload: The upload.
        options: Options of the request.
        most: Number of pixels that the service accepts.

    Raises:
        RequestError: The chosen planes have more than `most` pixels, or an OME-Zarr has too many images.
        ImageError: It is no image, or there is no choice among its planes.
        MissingPackageError: It is a whole slide or an OME-Zarr, for which a package is missing here.
        StorageError: An OME-Zarr cannot be read.
        UsageError: `z` or `t` is none of what `SegmentOptions` says.
    """
    planes = PlaneOptions(options.z, options.t)
    if isinstance(upload.content, np.ndarray):
        stacks, chosen, pixels = [], [ChosenPlane(0)], _pixels(upload.content.shape)
    else:
        stacks = _stacks(upload.content, upload.name)
        chosen = choose_planes(stacks, planes)
        pixels = sum(_pixels_read(stacks[each.stack], each) for each in chosen)
    if pixels > most:
        raise RequestError(
            f"Expected an image of at most {most:,} px in {upload.name}, all chosen planes together; found {pixels:,}. "
            "Cut it into tiles, or run nucleus predict on your own machine.",
            413,
        )
    return OpenedUpload(upload, options, stacks, chosen, pixels)


def _stacks(content: bytes | Path | ZarrFolder, name: str) -> list[Stack]:
    if not isinstance(content, ZarrFolder):
        return open_stacks(content, name)
    paths = image_paths(content)
    if len(paths) > _MOST_IMAGES:
        raise RequestError(
            f"Expected at most {_MOST_IMAGES} images in {content}; found {len(paths):,}. Name a part of it, such as "
            f"{content}/{paths[0]}, or run nucleus predict.",
            413,
        )
    return [open_image_in(content, path, f"{name}/{path}".rstrip("/")) for path in paths]


def _pixels(shape: Sequence[int]) -> int:
    channels = shape[2] if len(shape) > 2 else 1
    return shape[0] * shape[1] * -(-channels // _CHANNELS_OF_A_PIXEL)


def _pixels_read(stack: Stack, chosen: ChosenPlane) -> int:
    """Return the pixels that are read for a plane, or for a projection of all depths of a time."""
    one = isinstance(chosen.z, int) or chosen.z is None
    shape = stack.plane(chosen.t or 0, chosen.z if isinstance(chosen.z, int) else 0).shape
    return _pixels(shape) * (1 if one else stack.depths)
