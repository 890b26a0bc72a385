"""Whole slides (SVS, NDPI, MRXS, DICOM and others), read in parts by OpenSlide; and which files are slides."""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nucleus.data.pixel_files import Level, PixelFacts, PixelFile, ReadPart, level_steps, naming_damage
from nucleus.data.stacks import Stack
from nucleus.errors import ImageError, MissingPackageError
from nucleus.lazy import need, pip_install

if TYPE_CHECKING:
    import openslide

__all__ = ["SLIDE_SUFFIXES", "WITH_OTHER_FILES", "is_slide", "open_slide", "slides_among"]

SLIDE_SUFFIXES = frozenset({".svs", ".ndpi", ".mrxs", ".dcm", ".scn", ".bif", ".svslide"})
"""Names of slides that are looked for in folders. A slide that is named itself is known by its content."""
_BY_NAME = SLIDE_SUFFIXES | {".vms", ".vmu"}
"""Also the lists of JPEG files of Hamamatsu, which would be images of their own in a folder."""
_MIRAX, _DICOM = ".mrxs", ".dcm"
WITH_OTHER_FILES = frozenset({_MIRAX, _DICOM})
"""Names of slides that consist of several files."""
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OWN_FORMATS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM")
"""Beginnings of files that `nucleus.data.rasters` reads; a MIRAX slide begins with a JPEG, its thumbnail."""
_DICOM_MARK, _SQLITE = (128, b"DICM"), b"SQLite format 3"
_DESCRIPTION, _SOFTWARE, _TILE_WIDTH, _XMP, _HAMAMATSU = 270, 305, 322, 700, 65420
_MOST_TAGS, _TEXT_BYTES = 4096, 1 << 16
_GENERIC = (None, "generic-tiff")
"""What OpenSlide calls files that are not of a scanner: `nucleus.data.tiff` reads these TIFFs."""
_CACHE_BYTES = 256 << 20
"""Decoded tiles that are kept, of all open slides together: a row of tiles of a wide slide, and more."""
_BAND_PIXELS = 1 << 22
_SQUARE = 0.01
"""Pixels are square if their sides differ by less than this fraction."""
_SERIES, _LEVEL_KIND = "dicom.SeriesInstanceUID", "dicom.ImageType[3]"


def is_slide(path: Path) -> bool:
    """Return whether OpenSlide reads a file, and not a decoder of this package.

    The content decides: a TIFF of a scanner (Aperio, Hamamatsu, Leica, Philips, Ventana, Trestle) with tiles, a MIRAX
    slide, DICOM, or a file that is of no other format that is known.

    Raises:
        MissingPackageError: It is a slide, and OpenSlide is not installed.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_DICOM_MARK[0] + len(_DICOM_MARK[1]))
        if head.startswith(_TIFF):
            return _is_of_scanner(_first_tags(file, head)) and _vendor(path) not in _GENERIC
    suffix = path.suffix.lower()
    if suffix == _MIRAX and (path.with_suffix("").is_dir() or head.startswith(_OWN_FORMATS)):
        return True
    if head.startswith(_OWN_FORMATS):
        return False
    return head[_DICOM_MARK[0] :] == _DICOM_MARK[1] or head.startswith(_SQLITE) or suffix in _BY_NAME


def _is_of_scanner(tags: Mapping[int, bytes]) -> bool:
    """Return whether the first tags of a TIFF are those of a scanner for whole slides."""
    text = tags.get(_DESCRIPTION, b"")
    return (
        (text.startswith(b"Aperio") and _TILE_WIDTH in tags)
        or _HAMAMATSU in tags
        or b"<scn" in text
        or b"DPUfsImport" in text
        or b"<iScan" in tags.get(_XMP, b"")
        or tags.get(_SOFTWARE, b"").startswith(b"MedScan")
    )


def _first_tags(file: IO[bytes], head: bytes) -> dict[int, bytes]:
    """Return the values of the first tags of a TIFF, at most 64 KiB of each; nothing if they cannot be read."""
    order, big = "<" if head[:2] == b"II" else ">", b"+" in head[2:4]
    place, count, entry = ("8xQ", "Q", "HHQ8s") if big else ("4xI", "H", "HHI4s")
    (first,) = struct.unpack_from(order + place, head.ljust(16, b"\0"))
    high = int.from_bytes(head[8:12], "little") << 32  # Hamamatsu's files of more than 4 GiB
    for start in (first, first | high):
        try:
            file.seek(start)
            (number,) = struct.unpack(order + count, file.read(struct.calcsize(order + count)))
            size = struct.calcsize(order + entry)
            data = file.read(size * min(number, _MOST_TAGS))
            entries = list(struct.iter_unpack(order + entry, data))
        except (struct.error, OverflowError, ValueError):  # no place in a file
            continue
        tags = [tag for tag, *_ in entries]
        if tags and tags == sorted(tags):
            return {tag: _value(file, length, value, order) for tag, _, length, value in entries}
    return {}


def _value(file: IO[bytes], length: int, value: bytes, order: str) -> bytes:
    """Return the text of a tag; of numbers, some bytes that say nothing."""
    if length <= len(value):
        return value[:length]
    file.seek(int.from_bytes(value, "little" if order == "<" else "big"))
    return file.read(min(length, _TEXT_BYTES))


def _library() -> Any:
    """Return the module openslide. Raises `MissingPackageError`."""
    need("openslide")
    try:
        import openslide  # noqa: PLC0415  slow to import, and only in the extra `slides`
    except (ImportError, OSError) as error:
        raise MissingPackageError(
            f"Expected the library OpenSlide, which whole slides need; it cannot be loaded: {error}. "
            f"Run: {pip_install(extras=['slides'])}"
        ) from error
    return openslide


def _vendor(path: Path) -> str | None:
    """Return what OpenSlide calls the format of a file; None if it does not know it."""
    found: str | None = _library().OpenSlide.detect_format(path)
    return found


@lru_cache(maxsize=1)
def _cache() -> Any:
    return _library().OpenSlideCache(_CACHE_BYTES)


def open_slide(path: Path, name: str) -> Stack:
    """Open a whole slide as an image of one plane: RGB of 8 bits, laid over the slide's background where it is empty.

    Where a slide states the part that was scanned (MIRAX and others), the image is that part, as in QuPath. The label,
    the macro image and the thumbnail are not touched, and profiles of colours are not applied.

    Args:
        path: The file; for MIRAX, the `.mrxs` file beside the folder of its name; for DICOM, a file of the series.
        name: Name of the file in messages.

    Raises:
        ImageError: The slide is damaged or incomplete, or its levels contradict each other.
        MissingPackageError: OpenSlide is not installed.
    """
    library = _library()
    with naming_damage(name, "whole slide"):
        try:
            slide = library.OpenSlide(path)
        except library.OpenSlideUnsupportedFormatError as error:
            raise ImageError(_unknown(path, name)) from error
        if slide.properties.get(_LEVEL_KIND, "NONE") != "NONE":
            raise ImageError(
                f"Expected the full resolution of the slide of {name}; found reduced levels alone. Copy all files of "
                "the series into its folder."
            )
        slide.set_cache(_cache())
        file = _Slide.of(slide, name).file()
    return Stack(name=name, times=1, depths=1, plane=lambda _time, _depth: file)


def slides_among(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the names of files without the further files of DICOM slides, each of which has a level or the label.

    Args:
        folder: Folder of the files.
        names: Their relative paths with forward slashes, in order.
    """
    seen: set[tuple[str, str]] = set()
    found = []
    for name in names:
        series = _series_of(folder / name) if name.lower().endswith(_DICOM) else None
        key = (str(PurePosixPath(name).parent), series or name)
        if key not in seen:
            seen.add(key)
            found.append(name)
    return found


def _series_of(path: Path) -> str | None:
    """Return the identifier that the files of a DICOM slide share; None for a file that cannot be read as one."""
    library = _library()
    try:
        with library.OpenSlide(path) as slide:
            found: str | None = slide.properties.get(_SERIES)
    except library.OpenSlideError:
        return None
    return found


def _unknown(path: Path, name: str) -> str:
    if path.suffix.lower() == _MIRAX:
        return (
            f"Expected the folder {path.with_suffix('')} beside {name}, which has the pixels of a MIRAX slide "
            "(Slidedat.ini, Data*.dat); found none, or another one. Copy the folder and the file together."
        )
    return (
        f"Expected a whole slide in {name}; found a file that OpenSlide does not read: a damaged one, or DICOM that is "
        "no whole slide. Copy it again, or save it as TIFF."
    )


@dataclass(frozen=True)
class _Slide:
    """An open slide, and the part of it that is the image."""

    slide: "openslide.OpenSlide"
    name: str
    top: int
    left: int
    shape: tuple[int, int]
    background: tuple[int, int, int]

    @classmethod
    def of(cls, slide: "openslide.OpenSlide", name: str) -> "_Slide":
        width, height = slide.dimensions
        texts = [slide.properties.get(f"openslide.bounds-{side}") for side in ("y", "x", "height", "width")]
        top, left, rows, columns = map(int, texts) if all(texts) else (0, 0, height, width)  # type: ignore[arg-type]
        if min(top, left) < 0 or min(rows, columns) < 1 or top + rows > height or left + columns > width:
            raise ImageError(
                f"Expected the bounds of what was scanned within {name}; found {columns} x {rows} px from {left}, "
                f"{top} in {width} x {height} px. The slide is damaged: copy it again from its source."
            )
        colour = bytes.fromhex(slide.properties.get("openslide.background-color") or "FFFFFF")
        return cls(slide, name, top, left, (rows, columns), (colour[0], colour[1], colour[2]))

    def file(self) -> PixelFile:
        """Return the slide as an image, with its levels."""
        levels = tuple(self._levels())
        return PixelFile(
            name=self.name,
            shape=(*self.shape, 3),
            dtype=np.dtype(np.uint8),
            fill=self._fill,
            read_part=self._reader(0, (1.0, 1.0)),
            facts=PixelFacts(colours=3, lossy=True),
            pixel_size=self._pixel_size(),
            levels=lambda: levels,
        )

    def _levels(self) -> list[Level]:
        width, height = self.slide.dimensions
        found = []
        for number, (columns, rows) in enumerate(self.slide.level_dimensions[1:], 1):
            steps = level_steps((height, width), (rows, columns), self.name)
            shape = max(1, int(self.shape[0] / steps[0])), max(1, int(self.shape[1] / steps[1]))
            found.append(Level(steps, shape, self._reader(number, steps)))
        return found

    def _pixel_size(self) -> float | None:
        """Return the side of a pixel, micrometres; None if it is unknown or not square."""
        try:
            sides = [float(self.slide.properties[f"openslide.mpp-{axis}"]) for axis in "xy"]
        except (KeyError, ValueError):
            return None
        usable = all(math.isfinite(side) and side > 0 for side in sides)
        return sides[0] if usable and abs(sides[0] - sides[1]) <= _SQUARE * sides[0] else None

    def _reader(self, level: int, steps: tuple[float, float]) -> ReadPart:
        def read(rows: slice, columns: slice) -> NDArray[Any]:
            start = self.left + round(columns.start * steps[1]), self.top + round(rows.start * steps[0])
            size = columns.stop - columns.start, rows.stop - rows.start
            with naming_damage(self.name, "whole slide"):
                return self._on_background(np.asarray(self.slide.read_region(start, level, size)))

        return read

    def _on_background(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return RGBA pixels, h x w x 4, over the colour that the slide has where nothing was scanned, h x w x 3."""
        alpha = pixels[..., 3:]
        if alpha.min(initial=255) == 255:
            return np.ascontiguousarray(pixels[..., :3])
        share = alpha.astype(np.float32) / 255
        background = np.array(self.background, np.float32)
        return np.asarray(np.rint(pixels[..., :3] * share + background * (1 - share)), np.uint8)

    def _fill(self, out: NDArray[Any]) -> None:
        read, (height, width) = self._reader(0, (1.0, 1.0)), self.shape
        band = max(1, _BAND_PIXELS // width)
        for top in range(0, height, band):
            rows = slice(top, min(top + band, height))
            out[rows] = read(rows, slice(0, width))
