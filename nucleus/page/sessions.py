"""Workspaces of the page: the images that one browser has sent, in a folder of their own, and their segmentation.

A workspace is found by a random token that only its browser has, and is removed when nobody has used it for a day.
"""

import hashlib
import io
import json
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import tifffile
from pydantic import BaseModel, ConfigDict, Field

from nucleus.data.images import IMAGE_SUFFIXES
from nucleus.data.stacks import PlaneOptions, Stack, channel_number, choose_planes
from nucleus.errors import ImageError, NucleusError, UsageError
from nucleus.page.corrections import CorrectedFile, correction_stem
from nucleus.page.display import Pyramid, default_views, pyramid_of, thumbnail
from nucleus.page.editing import EditedImage, measure_shape
from nucleus.page.layers import Layer, LayerWriter, NucleusShape
from nucleus.predict.blocks import assembled_labels
from nucleus.predict.measurement import NucleiSummary, frame_of, image_row, measure_blocks
from nucleus.predict.model import Model
from nucleus.predict.source import plane_source, stacks_of
from nucleus.text import first_line, plural

__all__ = [
    "FOUND",
    "ImageOptions",
    "OpenedImage",
    "PageImage",
    "PageLimits",
    "Workspace",
    "Workspaces",
    "corrected_image",
    "image_document",
]

FOUND = "found"
"""Name of the layer that the model found."""
_THUMBNAIL_SIDE = 360
_KEPT_OPEN = 6
_KEPT_MEASURES = 5000
_LONGEST_NAME = 200
_TOKEN_BYTES = 24
_ID_BYTES = 6
_HASH_CHUNK = 1 << 20

Status = Literal["waiting", "working", "done", "failed"]


@dataclass(frozen=True)
class PageLimits:
    """Limits of the page.

    Attributes:
        image_bytes: Bytes of an image.
        image_pixels: Pixels of an image.
        workspace_bytes: Bytes that a workspace's images have together.
        images: Images of a workspace.
        workspaces: Workspaces at once; the one that was not used for longest makes room for another.
        idle_seconds: Seconds without use after which a workspace is removed.
    """

    image_bytes: int = 4 << 30
    image_pixels: int = 1 << 30
    workspace_bytes: int = 16 << 30
    images: int = 2000
    workspaces: int = 100
    idle_seconds: float = 86_400.0


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
    pixel_size: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None


@dataclass
class PageImage:
    """An image of a workspace.

    Attributes:
        id: Random name in addresses.
        name: Name for people: that of the file, with the folders that it was dropped with.
        folder: Folder of its files.
        file: The file.
        sha256: SHA-256 of the file.
        options: How it is segmented; choices that its file needs are made when it is opened.
        status: Where it stands.
        message: Why it failed.
        notes: What was chosen for want of a choice, and what the file has besides.
        summary: Row of `images.csv`, once it is done.
        model: NAME@VERSION of the model that found its nuclei.
        version: Number of segmentations; layers and drafts belong to one.
    """

    id: str
    name: str
    folder: Path
    file: Path
    sha256: str
    options: ImageOptions = field(default_factory=ImageOptions)
    status: Status = "waiting"
    message: str | None = None
    notes: list[str] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    model: str = ""
    version: int = 0

    @property
    def found(self) -> Layer:
        """The nuclei that the model found."""
        return self.layer(FOUND)

    def layer(self, name: str) -> Layer:
        """Return a layer. Raises `UsageError` if there is none of this name."""
        folder = self.folder / f"{self.version}-{name}"
        if not name.replace("-", "").isalnum() or not folder.is_dir():
            raise UsageError(f"Expected nuclei {name!r} of {self.name}; there are none. Open the image again.")
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


class Workspace:
    """The images of one browser.

    Args:
        folder: Its folder.
        model: Function that returns the model.
        limits: Its limits.
    """

    def __init__(self, folder: Path, model: Callable[[], Model], limits: PageLimits) -> None:
        self.folder, self.limits = folder, limits
        self.images: dict[str, PageImage] = {}
        self.used = time.monotonic()
        self._model = model
        self._bytes = 0
        self._lock = threading.RLock()
        self._opened: OrderedDict[tuple[str, int], OpenedImage] = OrderedDict()
        self._measured: OrderedDict[tuple[str, int, NucleusShape], dict[str, Any]] = OrderedDict()

    def image(self, name: str) -> PageImage:
        """Return an image by its id. Raises `UsageError`."""
        found = self.images.get(name)
        if found is None:
            raise UsageError("Expected an image of this browser; found none. Drop the image again.")
        return found

    def new_file(self, name: str) -> tuple[Path, Path]:
        """Return the folder of a new image, and the path for its file. Raises `UsageError` if there are too many."""
        if len(self.images) >= self.limits.images:
            raise UsageError(f"Expected at most {self.limits.images:,} images; remove some, or use nucleus predict.")
        suffix = PurePosixPath(name).suffix.lower()
        folder = self.folder / secrets.token_hex(_ID_BYTES)
        folder.mkdir()
        return folder, folder / f"image{suffix if suffix in IMAGE_SUFFIXES else ''}"

    def spend(self, size: int) -> None:
        """Count bytes of images. Raises `UsageError` if there are too many."""
        with self._lock:
            if self._bytes + size > self.limits.workspace_bytes:
                raise UsageError(
                    f"Expected images of at most {self.limits.workspace_bytes >> 20:,} MiB together; remove some."
                )
            self._bytes += size

    def add(self, name: str, folder: Path, file: Path) -> PageImage:
        """Add an image whose file is complete."""
        image = PageImage(folder.name, _shown_name(name), folder, file, _sum(file))
        with self._lock:
            self.images[image.id] = image
        return image

    def remove(self, image: PageImage) -> None:
        """Remove an image with its files."""
        with self._lock:
            self.images.pop(image.id, None)
            self._bytes -= image.file.stat().st_size if image.file.exists() else 0
        shutil.rmtree(image.folder, ignore_errors=True)

    def segment(self, image: PageImage) -> None:
        """Find the nuclei of an image; failures are kept in it."""
        if image.id not in self.images:
            return
        version = image.version
        image.status, image.message = "working", None
        try:
            status, message = self._segment(image, version), None
        except NucleusError as error:
            status, message = "failed", self._shown(image, str(error))
        except Exception as error:  # a decoder's or the network's own
            status, message = "failed", self._shown(image, first_line(error) or type(error).__name__)
        if image.version == version:  # else other options were chosen meanwhile, and it waits again
            image.status, image.message = status, message

    def _shown(self, image: PageImage, message: str) -> str:
        """Return a message without paths of this machine."""
        return message.replace(str(image.file), image.name).replace(str(self.folder), "")

    def _segment(self, image: PageImage, version: int) -> Status:
        opened = self.opened(image)
        scaled, model = opened.edited.scaled, opened.edited.model
        frame, summary, writer = frame_of(scaled.source), NucleiSummary(), LayerWriter()
        (blocks,) = model.segment_blocks([scaled])
        with assembled_labels(frame.shape, image.folder) as labels:
            for part in measure_blocks(frame, blocks, labels):
                summary.add(part.rows)
                writer.add(part)
            if image.version != version:
                return "waiting"
            writer.write(image.layer_folder(FOUND), labels.labels)
            image.summary = image_row(frame, summary, labels.pixels, scaled.scale, model.doubt(summary))
            image.model = str(model)
            views = default_views(opened.pyramid, stored=opened.stored)
            picture = thumbnail(opened.pyramid, views, labels.labels, _THUMBNAIL_SIDE)
        (image.folder / "thumbnail.png").write_bytes(picture)
        return "done"

    def opened(self, image: PageImage) -> OpenedImage:
        """Open an image, or return it if it is open. Raises `ImageError`, `UsageError`."""
        key = (image.id, image.version)
        with self._lock:
            if key not in self._opened:
                self._opened[key] = self._open(image)
            self._opened.move_to_end(key)
            while len(self._opened) > _KEPT_OPEN:
                self._opened.popitem(last=False)
            return self._opened[key]

    def _open(self, image: PageImage) -> OpenedImage:
        stacks = stacks_of(image.file)
        stack = stacks[0]
        image.options, image.notes = _completed(image.options, stacks)
        options = image.options
        (chosen,) = choose_planes(stacks[:1], PlaneOptions(options.z, options.t))
        first = stack.plane(0, 0)
        if first.shape[0] * first.shape[1] > self.limits.image_pixels:
            raise ImageError(
                f"Expected at most {self.limits.image_pixels:,} px; {image.name} has {first.shape[1]} x "
                f"{first.shape[0]}. Use nucleus predict for it."
            )
        source = replace(plane_source(image.file, stacks, chosen, options.channel), name=image.name)
        model = self._model()
        sizes = replace(model.options, diameter=options.diameter, pixel_size=options.pixel_size)
        model = model.with_options(sizes)
        stored = options.channel is not None
        return OpenedImage(
            edited=EditedImage(model, model.scaled_image(source)),
            pyramid=pyramid_of(source, stored=stored),
            stored=stored,
            channels=tuple(stack.channels) if stored else (),
            depths=stack.depths,
            times=stack.times,
            plain=len(stacks) == 1 and stack.depths == stack.times == 1 and not stored,
        )

    def measure(self, image: PageImage, shape: NucleusShape) -> dict[str, Any]:
        """Return the row of a nucleus that was drawn. Raises `UsageError`."""
        key = (image.id, image.version, shape)
        with self._lock:
            if key in self._measured:
                return self._measured[key]
        row = measure_shape(self.opened(image).edited, shape)
        with self._lock:
            self._measured[key] = row
            while len(self._measured) > _KEPT_MEASURES:
                self._measured.popitem(last=False)
        return row

    def segment_again(self, image: PageImage, options: ImageOptions) -> None:
        """Take other options for an image, which waits to be segmented; what was found before stays until then."""
        with self._lock:
            image.options, image.status, image.message = options, "waiting", None
            image.summary = None
            image.version += 1

    def clear(self) -> None:
        """Remove all images and files."""
        self.images.clear()
        self._opened.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


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


def _shown_name(name: str) -> str:
    """Return a name for people: without control characters and steps upwards, and of a limited length."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in {"", ".", ".."}]
    shown = "".join(letter for letter in "/".join(parts) if letter.isprintable())
    return shown[-_LONGEST_NAME:] or "image"


def _sum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class Workspaces:
    """All workspaces of a process.

    Args:
        model: Function that returns the model.
        limits: Limits of each.
        executor: What segments images, one after the other; by default, a thread of its own.
        folder: Folder for all files; by default, a temporary one.
    """

    def __init__(
        self,
        model: Callable[[], Model],
        limits: PageLimits | None = None,
        executor: Executor | None = None,
        folder: Path | None = None,
    ) -> None:
        self.limits = limits or PageLimits()
        self._model = model
        self._executor = executor or ThreadPoolExecutor(1, "page")
        self._temporary = tempfile.TemporaryDirectory(prefix="nucleus-page-", dir=folder, ignore_cleanup_errors=True)
        self._found: dict[str, Workspace] = {}
        self._lock = threading.Lock()

    def get(self, token: str | None) -> Workspace | None:
        """Return the workspace of a token; None if there is none."""
        with self._lock:
            found = self._found.get(token or "")
            if found is not None:
                found.used = time.monotonic()
            return found

    def create(self) -> tuple[str, Workspace]:
        """Return a new workspace and its token; the oldest make room."""
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        with self._lock:
            self._remove_idle()
            folder = Path(self._temporary.name) / secrets.token_hex(_ID_BYTES)
            folder.mkdir()
            self._found[token] = Workspace(folder, self._model, self.limits)
            return token, self._found[token]

    def _remove_idle(self) -> None:
        now = time.monotonic()
        oldest = sorted(self._found, key=lambda token: self._found[token].used)
        surplus = len(oldest) - self.limits.workspaces + 1
        for number, token in enumerate(oldest):
            if number < surplus or now - self._found[token].used > self.limits.idle_seconds:
                self._found.pop(token).clear()

    def start(self, workspace: Workspace, image: PageImage) -> None:
        """Segment an image as soon as those before it are done."""
        self._executor.submit(workspace.segment, image)

    def close(self) -> None:
        """Remove all files."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        with suppress(OSError):
            self._temporary.cleanup()


def image_document(workspace: Workspace, image: PageImage) -> dict[str, Any]:
    """Return what the page's view of an image needs. Raises `ImageError`."""
    opened = workspace.opened(image)
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


def corrected_image(workspace: Workspace, image: PageImage) -> tuple[str, CorrectedFile]:
    """Return the name of an image in a set of corrections, and its file there.

    It is the file itself if an import reads it as it is; else, what was segmented of it, as TIFF.
    """
    opened = workspace.opened(image)
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
