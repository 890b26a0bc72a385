"""An image of the page: files, options, how it is opened, and what the page and a set of corrections get of it."""

import hashlib
import io
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tifffile
from pydantic import BaseModel, ConfigDict, Field

from nucleus.data.images import IMAGE_SUFFIXES
from nucleus.data.stacks import PlaneOptions, Stack, channel_number, choose_planes
from nucleus.errors import ImageError, UsageError
from nucleus.page.corrections import CorrectedFile, correction_stem
from nucleus.page.display import Pyramid, default_views, pyramid_of
from nucleus.page.editing import EditedImage
from nucleus.page.layers import FOUND, Layer
from nucleus.predict.model import PIXEL_SIZES, Model
from nucleus.predict.source import plane_source, stacks_of
from nucleus.text import plural

__all__ = [
    "ImageOptions",
    "OpenedImage",
    "PageImage",
    "Status",
    "corrected_image",
    "image_document",
    "opened_image",
    "shown_name",
]

_LONGEST_NAME = 200
_OF_A_SEGMENTATION = ("options", "version", "summary", "model", "notes")
_LAYER = re.compile(r"[a-z0-9-]{1,64}")

Status = Literal["waiting", "working", "done", "failed"]
"""Where an image stands."""


class ImageOptions(BaseModel):
    """How an image is segmented, as the options of `nucleus predict`.

    Attributes:
        channel: Number of the channel, from 0; None for grey and RGB images as a whole.
        z: A depth from 0, "max", "mean" or "best".
        t: A time from 0.
        diameter: Typical diameter of the nuclei, px.
        pixel_size: Side of a pixel, micrometres.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    channel: Annotated[int, Field(ge=0)] | None = None
    z: Annotated[int, Field(ge=0)] | Literal["max", "mean", "best"] | None = None
    t: Annotated[int, Field(ge=0)] | None = None
    diameter: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] | None = None
    pixel_size: Annotated[float, Field(ge=PIXEL_SIZES[0], le=PIXEL_SIZES[1])] | None = None

    def sized(self, model: Model) -> Model:
        """Return a model with these sizes. Raises `ModelError` if they do not fit it."""
        return model.with_options(replace(model.options, diameter=self.diameter, pixel_size=self.pixel_size))


@dataclass
class PageImage:
    """An image of a workspace.

    Attributes:
        id: Random name in addresses.
        name: Name for people: that of the file, with the folders that it was dropped with.
        folder: Folder of its files.
        file: The file.
        sha256: SHA-256 of the file.
        size: Bytes of the file.
        options: How it is segmented; choices that its file needs are made when it is opened.
        status: Where it stands.
        message: Why it failed.
        notes: What was chosen for want of a choice, and what the file has besides.
        summary: Row of `images.csv`, once it is done.
        model: NAME@VERSION of the model that found its nuclei.
        version: Number of the segmentation; layers and drafts belong to one.
        latest: Largest number so far.
        before: What a segmentation by other options found before; it comes back if the next one fails.
    """

    id: str
    name: str
    folder: Path
    file: Path
    sha256: str
    size: int = 0
    options: ImageOptions = field(default_factory=ImageOptions)
    status: Status = "waiting"
    message: str | None = None
    notes: list[str] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    model: str = ""
    version: int = 0
    latest: int = 0
    before: dict[str, Any] | None = None

    def begin_again(self, options: ImageOptions) -> None:
        """Wait for another segmentation, by these options."""
        if self.status == "done":
            self.before = {name: getattr(self, name) for name in _OF_A_SEGMENTATION}
        self.latest += 1
        self.options, self.version, self.status, self.message = options, self.latest, "waiting", None
        self.summary = None

    def ended(self, status: Status, message: str | None) -> None:
        """Keep how a segmentation ended; if it failed, what was found before is there again."""
        if status == "failed" and self.before is not None:
            for name, value in self.before.items():
                setattr(self, name, value)
            status = "done"
        if status != "waiting":
            self.before = None
        self.status, self.message = status, message

    @property
    def found(self) -> Layer:
        """The nuclei that the model found."""
        return self.layer(FOUND)

    def layer(self, name: str) -> Layer:
        """Return a layer. Raises `UsageError` if there is none of this name."""
        folder = self.layer_folder(name)
        if not _LAYER.fullmatch(name) or not folder.is_dir():
            raise UsageError(f"Expected nuclei {name[:80]!r} of {self.name}; there are none. Open the image again.")
        return Layer(folder)

    def layer_folder(self, name: str) -> Path:
        """Return the folder of a layer that is to be written."""
        return self.folder / f"{self.version}-{name}"

    def document(self) -> dict[str, Any]:
        """Return what the page's list of images needs."""
        return {
            "id": self.id,
            "name": self.name,
            "status": self.status,
            "message": self.message,
            "notes": self.notes,
            "nuclei": self.summary["nuclei"] if self.summary else None,
            "warning": self.summary["warning"] if self.summary else None,
            "version": self.version,
        }


@dataclass(frozen=True)
class OpenedImage:
    """An image that can be read in parts.

    Attributes:
        edited: The image with its model.
        pyramid: The image for display.
        stored: Whether the pyramid is of all stored channels, one of which is segmented.
        channels: Names of the channels.
        depths: Number of depths of the file.
        times: Number of times.
        plain: Whether the file is a single grey or RGB image, which an import reads as it is.
    """

    edited: EditedImage
    pyramid: Pyramid
    stored: bool
    channels: tuple[str, ...]
    depths: int
    times: int
    plain: bool


def opened_image(image: PageImage, model: Model, most_pixels: int) -> OpenedImage:
    """Open an image; choices that its file needs are made, and noted in it.

    Args:
        image: The image.
        model: The model that segments it.
        most_pixels: Largest number of pixels.

    Raises:
        ImageError: It is no image, is damaged, too large, or lacks what the options name.
    """
    stacks = stacks_of(image.file)
    stack = stacks[0]
    image.options, image.notes = _completed(image.options, stacks)
    options = image.options
    (chosen,) = choose_planes(stacks[:1], PlaneOptions(options.z, options.t))
    first = stack.plane(0, 0)
    if first.shape[0] * first.shape[1] > most_pixels:
        raise ImageError(
            f"Expected at most {most_pixels:,} px; {image.name} has {first.shape[1]} x "
            f"{first.shape[0]}. Use nucleus predict for it."
        )
    source = replace(plane_source(image.file, stacks, chosen, options.channel), name=image.name)
    sized = options.sized(model)
    stored = options.channel is not None
    return OpenedImage(
        edited=EditedImage(sized, sized.scaled_image(source)),
        pyramid=pyramid_of(source, stored=stored),
        stored=stored,
        channels=tuple(stack.channels) if stored else (),
        depths=stack.depths,
        times=stack.times,
        plain=len(stacks) == 1 and stack.depths == stack.times == 1 and not stored,
    )


def _completed(options: ImageOptions, stacks: list[Stack]) -> tuple[ImageOptions, list[str]]:
    """Return options with the choices that a file needs, and a sentence for each that was made here."""
    stack, notes = stacks[0], []
    changes: dict[str, Any] = {}
    if len(stacks) > 1:
        notes.append(f"The file holds {plural(len(stacks), 'image')}; this is the first.")
    if stack.times > 1 and options.t is None:
        changes["t"] = 0
        notes.append(f"Time 0 of {stack.times}.")
    if stack.depths > 1 and options.z is None:
        changes["z"] = "max"
        notes.append(f"The brightest of {stack.depths} depths (z max).")
    first = stack.plane(0, 0)
    if first.choose and options.channel is None:
        changes["channel"] = 0
        name = f" ({stack.channels[0]})" if stack.channels else ""
        notes.append(f"Nuclei of channel 0{name} of {first.shape[2]}.")
    channel_number(stack, options.channel)
    return options.model_copy(update=changes), notes


def image_document(image: PageImage, opened: OpenedImage) -> dict[str, Any]:
    """Return what the page's view of an image needs."""
    pyramid, source = opened.pyramid, opened.edited.scaled.source
    views = default_views(pyramid, stored=opened.stored)
    found = hashlib.sha256(image.found.outlines).hexdigest()
    known_by = json.dumps([image.sha256, image.options.model_dump(), found])
    return {
        **image.document(),
        "width": source.width,
        "height": source.height,
        "levels": len(pyramid.levels),
        "pixel_size": source.pixel_size,
        "depths": opened.depths,
        "times": opened.times,
        "options": image.options.model_dump(),
        "choose": opened.stored,
        "summary": image.summary,
        "key": hashlib.sha256(known_by.encode()).hexdigest()[:32],
        "model": image.model,
        "channels": [
            {
                "name": (dict(enumerate(opened.channels)).get(view.channel) or _channel_name(opened, view.channel)),
                "low": view.low,
                "high": view.high,
                "colour": view.colour,
                "range": pyramid.ranges[view.channel],
                "contrast": pyramid.contrast[view.channel],
            }
            for view in views
        ],
    }


def corrected_image(image: PageImage, opened: OpenedImage) -> tuple[str, CorrectedFile]:
    """Return the name of an image in a set of corrections, and its file there.

    It is the file itself if an import reads it as it is; else, what was segmented of it, as TIFF.
    """
    suffix = image.file.suffix
    if opened.plain and suffix in IMAGE_SUFFIXES:
        return correction_stem(image.name, image.sha256), CorrectedFile(suffix, image.file.read_bytes)
    chosen = image.options.model_dump(include={"channel", "z", "t"}, exclude_none=True)
    source = opened.edited.scaled.source

    def tiff() -> bytes:
        pixels = source.read(slice(0, source.height), slice(0, source.width))
        file = io.BytesIO()
        grey = pixels.shape[2] == 1
        kind = "minisblack" if grey else "rgb"
        tifffile.imwrite(file, pixels[..., 0] if grey else pixels, photometric=kind, compression="zlib")
        return file.getvalue()

    return correction_stem(image.name, image.sha256, json.dumps(chosen, sort_keys=True)), CorrectedFile(".tif", tiff)


def _channel_name(opened: OpenedImage, channel: int) -> str:
    if opened.stored:
        return f"channel {channel}"
    return "Grey" if opened.pyramid.channels == 1 or opened.pyramid.is_grey else ("Red", "Green", "Blue")[channel]


def shown_name(name: str) -> str:
    """Return a name for people: without control characters and steps upwards, and of a limited length."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in {"", ".", ".."}]
    shown = "".join(letter for letter in "/".join(parts) if letter.isprintable())
    return shown[-_LONGEST_NAME:] or "image"
