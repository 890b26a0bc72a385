"""Workspaces of the page: the images that one browser has sent, in a folder of their own, and their segmentation.

A workspace is found by a random token that only its browser has, and is removed when nobody has used it for a day.
"""

import secrets
import shutil
import tarfile
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nucleus.data.images import IMAGE_SUFFIXES
from nucleus.data.slides import SLIDE_SUFFIXES
from nucleus.data.zarr_store import is_zarr
from nucleus.errors import ImageError, NucleusError, UsageError
from nucleus.page.display import default_views, thumbnail
from nucleus.page.editing import EditedImage, measure_shape
from nucleus.page.layers import FOUND, Layer, LayerWriter, NucleusShape
from nucleus.page.page_images import ImageOptions, OpenedImage, PageImage, Status, opened_image, shown_name
from nucleus.predict.blocks import AssembledLabels, assembled_labels
from nucleus.predict.measurement import NucleiSummary, frame_of, image_row, measure_blocks
from nucleus.predict.model import Model
from nucleus.serve.problems import without_paths
from nucleus.serve.uploads import HEAD_BYTES, check_alone
from nucleus.storage.files import failed_write, sha256_of
from nucleus.text import first_line

__all__ = ["PageLimits", "Workspace", "Workspaces", "write_found"]

_THUMBNAIL_SIDE = 360
_SUFFIXES = {*IMAGE_SUFFIXES, *SLIDE_SUFFIXES}
_MOST_PARTS = 100_000
_KEPT_OPEN = 6
_KEPT_MEASURES = 5000
_TOKEN_BYTES = 24
_ID_BYTES = 6


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
        self._lock = threading.RLock()
        self._opened: OrderedDict[tuple[str, int], OpenedImage] = OrderedDict()
        self._measured: OrderedDict[tuple[str, int, NucleusShape], dict[str, Any]] = OrderedDict()

    def image(self, name: str) -> PageImage:
        """Return an image by its id. Raises `UsageError`."""
        found = self.images.get(name)
        if found is None:
            raise UsageError("Expected an image of this browser; found none. Drop the image again.")
        return found

    @contextmanager
    def new_file(self, name: str) -> Iterator[tuple[Path, Path]]:
        """Make the folder of a new image and the path for its file; if the block fails, the folder is removed.

        Raises:
            UsageError: There are too many images.
        """
        if len(self.images) >= self.limits.images:
            raise UsageError(f"Expected at most {self.limits.images:,} images; remove some, or use nucleus predict.")
        suffix = PurePosixPath(name).suffix.lower()
        folder = self.folder / secrets.token_hex(_ID_BYTES)
        folder.mkdir()
        try:
            yield folder, folder / f"image{suffix if suffix in _SUFFIXES else ''}"
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _check_room(self, size: int) -> None:
        if sum(image.size for image in list(self.images.values())) + size > self.limits.workspace_bytes:
            raise UsageError(
                f"Expected images of at most {self.limits.workspace_bytes >> 20:,} MiB together; remove some."
            )

    def add(self, name: str, folder: Path, file: Path) -> PageImage:
        """Add an image whose file is complete; that of OME-Zarr is an archive (tar) of its folder.

        Raises:
            ImageError: It is no such archive.
            RequestError: It is a slide of several files.
            UsageError: All images together are too large.
        """
        size, sha256 = file.stat().st_size, sha256_of(file)
        self._check_room(size)
        with file.open("rb") as opened:
            check_alone(shown_name(name), opened.read(HEAD_BYTES))
        if is_zarr(name):
            file = _unpacked(file, folder / "image.ome.zarr")
        image = PageImage(folder.name, shown_name(name), folder, file, sha256, size)
        with self._lock:
            self.images[image.id] = image
        return image

    def remove(self, image: PageImage) -> None:
        """Remove an image with its files."""
        with self._lock:
            self.images.pop(image.id, None)
        shutil.rmtree(image.folder, ignore_errors=True)

    def segment(self, image: PageImage) -> None:
        """Find the nuclei of an image; failures are kept in it, with what was found before by other options."""
        if image.id not in self.images:
            return
        version = image.version
        image.status, image.message = "working", None
        try:
            status, message = self._segment(image, version), None
        except NucleusError as error:
            status, message = "failed", self._shown(image, str(error))
        except Exception as error:  # a decoder's or the network's own
            said = str(failed_write(error) or first_line(error) or type(error).__name__)
            status, message = "failed", self._shown(image, said)
        with self._lock:
            if image.version == version:  # else other options were chosen meanwhile, and it waits again
                image.ended(status, message)

    def _shown(self, image: PageImage, message: str) -> str:
        """Return a message without paths of this machine."""
        return without_paths(message.replace(str(image.file), image.name))

    def _segment(self, image: PageImage, version: int) -> Status:
        opened, into = self.opened(image), image.folder / f"{version}-{FOUND}"
        scaled, model = opened.edited.scaled, opened.edited.model
        summary, labels = write_found(opened.edited, image.folder, into)
        if image.version != version:
            return "waiting"
        doubt = model.doubt(summary, labels.left_out)
        image.summary = image_row(frame_of(scaled.source), summary, labels.pixels, scaled, doubt)
        image.model = str(model)
        views = default_views(opened.pyramid, stored=opened.stored)
        picture = thumbnail(opened.pyramid, views, Layer(into).labels, _THUMBNAIL_SIDE)
        (image.folder / "thumbnail.png").write_bytes(picture)
        return "done"

    def opened(self, image: PageImage) -> OpenedImage:
        """Open an image, or return it if it is open. Raises `ImageError`, `UsageError`."""
        key = (image.id, image.version)
        with self._lock:
            if key not in self._opened:
                self._opened[key] = opened_image(image, self._model(), self.limits.image_pixels)
            self._opened.move_to_end(key)
            while len(self._opened) > _KEPT_OPEN:
                self._opened.popitem(last=False)
            return self._opened[key]

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
            image.begin_again(options)

    def clear(self) -> None:
        """Remove all images and files."""
        self.images.clear()
        self._opened.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def _unpacked(archive: Path, folder: Path) -> Path:
    """Unpack the files of a folder, and remove the archive; return the folder.

    Raises:
        ImageError: It is no archive of files below a folder, or of too many.
    """
    try:
        with tarfile.open(archive, "r:") as opened:
            members = [member for member in opened if member.isfile() and not member.issparse()]
            if len(members) > _MOST_PARTS:
                raise ImageError(f"Expected at most {_MOST_PARTS:,} files in a Zarr; found more. Use nucleus predict.")
            opened.extractall(folder, members, filter="data")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ImageError(
            "Expected the files of a Zarr folder; they cannot be unpacked. Drop the folder again."
        ) from error
    archive.unlink()
    return folder


def write_found(edited: EditedImage, folder: Path, into: Path) -> tuple[NucleiSummary, AssembledLabels]:
    """Segment an image, and write what is found as a layer; return its summary and its labels.

    Args:
        edited: The image with its model.
        folder: Folder for a temporary file, if the image is large.
        into: Folder of the layer.
    """
    frame, summary, writer = frame_of(edited.scaled.source), NucleiSummary(), LayerWriter()
    (blocks,) = edited.model.segment_blocks([edited.scaled])
    with assembled_labels(frame.shape, folder) as labels:
        for part in measure_blocks(frame, blocks, labels):
            summary.add(part.rows)
            writer.add(part)
        writer.write(into, labels.labels)
        return summary, labels


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
        self._folder = folder
        self._temporary = self._new_folder()
        self._found: dict[str, Workspace] = {}
        self._lock = threading.Lock()

    def _new_folder(self) -> "tempfile.TemporaryDirectory[str]":
        return tempfile.TemporaryDirectory(prefix="nucleus-page-", dir=self._folder, ignore_cleanup_errors=True)

    def get(self, token: str | None) -> Workspace | None:
        """Return the workspace of a token; None if there is none, or if the system has removed its old files."""
        with self._lock:
            found = self._found.get(token or "")
            if found is not None and not found.folder.is_dir():
                del self._found[token or ""]
                return None
            if found is not None:
                found.used = time.monotonic()
            return found

    def create(self) -> tuple[str, Workspace]:
        """Return a new workspace and its token; the oldest make room."""
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        with self._lock:
            self._remove_idle()
            if not Path(self._temporary.name).is_dir():
                self._temporary.cleanup()
                self._temporary = self._new_folder()
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

    def in_turn(self, work: Callable[[], str]) -> str:
        """Return the result of work that segments an image, after those before it are done."""
        return self._executor.submit(work).result()

    def close(self) -> None:
        """Remove all files."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        with suppress(OSError):
            self._temporary.cleanup()
