"""The decoder of TIFF: which pages are the image, or the planes of which images, and what their values mean."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from nucleus.data.pixel_files import Content, Level, PixelFacts, PixelFile, level_steps, naming_damage
from nucleus.data.stacks import Stack
from nucleus.data.tiff_metadata import channel_names, files_of, image_texts, metadata_file, pixel_size_of
from nucleus.data.tiff_pages import JPEG, StoredPage, fill_pages, page_reader
from nucleus.errors import ImageError

__all__ = ["open_tiff", "open_tiff_stacks"]

_SIDE_IMAGES = re.compile(r"thumbnail|label|macro|overview|map|resolution|level ?[1-9]\d*")
"""Names of the images that slide scanners add to the main one."""
_MISSING_PAGES = re.compile("corrupted tag list|invalid offset to page|invalid page offset|circular|corrupted file")
_SUFFIXES = (".tif", ".tiff")
_ALPHA = frozenset({1, 2})
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_REFUSED = {4: "a transparency mask", 5: "CMYK inks", 32803: "the mosaic of a camera sensor"}
_APERIO_YCBC, _WEBP = 33003, 50001
_LOSSLESS = {_WEBP: b"VP8L", **dict.fromkeys(JPEG, b"\xff\xc3")}
"""What the head of a strip or tile contains if a compression that is usually lossy is not."""
_ROLES = {"R": "P", "M": "P", "T": "T", "Z": "Z", "I": "Z", "Q": "Z", "C": "C", "S": "C"}
"""What an axis of pages counts: positions, times, depths or channels; pages that are not described count as depths."""
_UNDESCRIBED = frozenset("IQ")
PageAt = Callable[[int], StoredPage | None]
"""Function from the number of a page of an image to the page; None if the file lacks it."""
_ONE_OF_SEVERAL = (
    "Expected a complete image in {name}; it is one of several files of an OME-TIFF. Save them as one file."
)


def open_tiff(content: Content, name: str) -> PixelFile:
    """Read the header of a TIFF file, and find its main image among thumbnails, labels and reduced pages.

    Args:
        content: The file, or its bytes.
        name: Name of the file in messages.

    Raises:
        ImageError: The file is damaged, or has pixels of a kind that is not read.
        OSError: The file cannot be read.
    """
    with _opened(content, name) as (file, images):
        several = _several(file, images, name)
        pages = [_first_page(file, images[0])] if several else list(images[0])
        _check_kind(pages[0].keyframe, name)
        parts = [StoredPage.of(page, content, name) for page in pages]
        for part in parts:
            part.check_size(file.filehandle.size)
        size = pixel_size_of(file, image_texts(file)[file.series.index(images[0])])
        facts = _facts(pages[0].keyframe, alone=len(pages) == 1)
        facts = replace(facts, palette=parts[0].palette, pages=sum(map(_planes, images)))
        return replace(_pixel_file(parts, name, facts, size), several=several)


def open_tiff_stacks(content: Content, name: str) -> list[Stack]:
    """Read the header of a TIFF file: OME-TIFF, an ImageJ hyperstack, LSM, or plain pages.

    Each image of the file gives a stack, and so does each position of one. Pages whose meaning the file does not tell
    are counted as depths, in their order. A page of a stack is not looked at before that plane is opened.

    Any file of an OME-TIFF in several files gives the whole image; its other files are looked for in its folder.

    Args:
        content: The file, or its bytes.
        name: Name of the file in messages. With several images, `#0`, `#1`, ... follow it in their names.

    Raises:
        ImageError: The file is damaged, or has pixels or axes of a kind that is not read.
        OSError: The file cannot be read.
    """
    described = _described_by(content, name)
    content = described or content
    with _opened(content, name) as (file, images):
        found = [(series, order) for series in images for order in _orders(file, series, name)]
        names = [name] if len(found) == 1 else [f"{name}#{number}" for number in range(len(found))]
        return [_stack(file, *each, content, text) for each, text in zip(found, names, strict=True)]


def _described_by(content: Content, name: str) -> Path | None:
    """Return the other file that describes the planes of this one; None if it does itself, or for bytes."""
    if not isinstance(content, Path):
        return None
    with naming_damage(name, "TIFF"), tifffile.TiffFile(content) as file:
        other = metadata_file(file)
    if other is None:
        return None
    path = content.with_name(_plain(other, name))
    if not path.is_file() or path.suffix.lower() not in _SUFFIXES:
        raise ImageError(
            f"Expected the TIFF {path}, which describes the image that {name} is a part of; "
            f"{'it is no TIFF' if path.is_file() else 'nothing is there'}. Copy all files of the image into one "
            "folder, or save them as one file."
        )
    return path


def _plain(other: str, name: str) -> str:
    """Return the name of a file that an OME-TIFF names. Raises `ImageError` if it leads to another folder."""
    if "/" in other or "\\" in other or other in {"", ".", ".."}:
        raise ImageError(
            f"Expected the names of files in the folder of {name} in its metadata; found {other!r}. Save the image as "
            "one file."
        )
    return other


@contextmanager
def _opened(content: Content, name: str) -> Iterator[tuple[tifffile.TiffFile, list[tifffile.TiffPageSeries]]]:
    """Open a complete TIFF and provide it with its main images. Raises `ImageError` if it is damaged."""
    source = content if isinstance(content, Path) else io.BytesIO(content)
    with naming_damage(name, "TIFF") as lines, tifffile.TiffFile(source) as file:
        if len(files_of(file)) > 1:
            for other in files_of(file):
                _plain(other, name)
        images = _main_images(file, name)
        _check_complete(file, lines, name)
        yield file, images


def _stack(
    file: tifffile.TiffFile, series: tifffile.TiffPageSeries, order: NDArray[np.int64], content: Content, name: str
) -> Stack:
    """Return an image whose page numbers are `order`, T x Z x C. Raises `ImageError` for pixels that are not read."""
    _check_kind(series.keyframe, name)
    page_at = _pages(series, content, name)
    text = image_texts(file)[file.series.index(series)]
    size_of, pixel_size = _size_of(content, file.filehandle.size), pixel_size_of(file, text)
    times, depths, count = order.shape
    facts = _facts(series.keyframe, alone=count == 1)

    def plane(time: int, depth: int) -> PixelFile:
        where = [f"z {depth}"] * (depths > 1) + [f"t {time}"] * (times > 1)
        place = ", ".join([name, *where])
        parts = [page for page in map(page_at, order[time, depth].tolist()) if page is not None]
        if len(parts) < count:
            raise ImageError(f"Expected {count} pages of {place}; found {len(parts)}. Save the file again.")
        parts = [replace(part, name=place) for part in parts]
        for part in parts:
            part.check_size(size_of(part))
        return replace(
            _pixel_file(parts, place, replace(facts, palette=parts[0].palette), pixel_size),
            levels=lambda: _levels(levels, order[time, depth], parts, size_of),
        )

    levels = [(level, _pages(level, content, name)) for level in _reduced(series)]
    names = channel_names(file, text, series.keyframe.samplesperpixel * count)
    files = _files(series, content)
    title = series.name if series.kind == "ome" else ""
    return Stack(name=name, times=times, depths=depths, plane=plane, channels=names, files=files, title=title)


def _size_of(content: Content, size: int) -> Callable[[StoredPage], int]:
    """Return the function that gives the bytes of a page's file; `size` is that of the file that was opened."""

    def size_of(page: StoredPage) -> int:
        other = page.content if isinstance(page.content, Path) and page.content != content else None
        return size if other is None else other.stat().st_size

    return size_of


def _files(series: tifffile.TiffPageSeries, content: Content) -> frozenset[Path]:
    """Return the files that the pages of an image are in; nothing if it is one."""
    if not isinstance(content, Path) or len(series) != _planes(series):
        return frozenset()
    found = {_file_of(page, content) for page in series if page is not None} | {content}
    return frozenset(found) if len(found) > 1 else frozenset()


def _file_of(page: Any, content: Path) -> Path:
    """Return the file of a page, which lies in the folder of the file that names it."""
    return content.with_name(Path(page.parent.filehandle.path).name)


def _reduced(series: tifffile.TiffPageSeries) -> list[tifffile.TiffPageSeries]:
    """Return the reduced copies of an image that have the same planes, each in a page."""
    planes = len(series)
    same = (each for each in series.levels[1:] if len(each) == planes == _planes(each) == _planes(series))
    return [each for each in same if each.keyframe is not None and None not in each]


def _levels(
    levels: Sequence[tuple[tifffile.TiffPageSeries, PageAt]],
    numbers: NDArray[np.int64],
    parts: Sequence[StoredPage],
    size_of: Callable[[StoredPage], int],
) -> tuple[Level, ...]:
    """Return the reduced copies of a plane that can be read in parts. Raises `ImageError` if they contradict it."""
    whole, name = parts[0].keyframe, parts[0].name
    found = []
    for level, page_at in levels:
        reduced = level.keyframe
        _check_same_kind(reduced, whole, name)
        shape = reduced.imagelength, reduced.imagewidth
        steps = level_steps((whole.imagelength, whole.imagewidth), shape, name)
        pages = [replace(page, name=name) for page in map(page_at, numbers.tolist()) if page is not None]
        for page in pages:
            page.check_size(size_of(page))
        read = page_reader(pages)
        found += [] if read is None else [Level(steps, shape, read)]
    return tuple(found)


def _check_same_kind(reduced: tifffile.TiffPage, whole: tifffile.TiffPage, name: str) -> None:
    """Raise `ImageError` for a reduced copy with other pixels than the image."""
    _check_kind(reduced, name)
    kinds = [(page.dtype, page.samplesperpixel, page.photometric) for page in (whole, reduced)]
    if kinds[0] != kinds[1]:
        first, other = (f"{samples} channels of {dtype}" for dtype, samples, _ in kinds)
        raise ImageError(
            f"Expected the pixels of the image, {first}, in its reduced copies in {name}; found {other}. Save it again "
            "from its source."
        )


def _pages(series: tifffile.TiffPageSeries, content: Content, name: str) -> PageAt:
    """Return the function that finds the pages of an image."""
    if len(series) == _planes(series):
        places = ((page, _file_of(page, content) if isinstance(content, Path) and page else content) for page in series)
        found = [None if page is None else StoredPage.of(page, place, name) for page, place in places]
        return found.__getitem__
    first, step = series.keyframe, series.keyframe.nbytes  # pages without tags of their own follow the first
    return lambda number: StoredPage.of(first, content, name, number * step)


def _orders(file: tifffile.TiffFile, series: tifffile.TiffPageSeries, name: str) -> Iterator[NDArray[np.int64]]:
    """Yield the page numbers of each position of an image, T x Z x C.

    Raises:
        ImageError: The file has other axes, or a page has several planes, or pages are in other files.
    """
    leading, within = _axes(series)
    roles = [_role(axis, series.kind) for axis, _ in leading]
    undescribed = _UNDESCRIBED & {axis for axis, _ in leading}
    named = f"axes {series.axes} of {series.shape}"
    if None in roles or (undescribed and any(axis in "TZ" for axis, _ in leading)):
        raise ImageError(f"Expected times, depths and channels in {name}; found {named}. Save it with axes TZCYX.")
    if set(within) - set("YXSC") or not _is_whole(series):
        raise ImageError(f"Expected a page for each plane in {name}; found {named} in {len(series)}. Save it again.")
    _check_files(file, series, name)
    numbers = np.arange(_planes(series)).reshape([size for _, size in leading])
    places = sorted(range(len(leading)), key=lambda place: "PTZC".index(str(roles[place])))
    counts = dict.fromkeys("PTZC", 1)
    for place in places:
        counts[str(roles[place])] *= leading[place][1]
    yield from numbers.transpose(places).reshape(list(counts.values()))


def _role(axis: str, kind: str) -> str | None:
    return "P" if (axis, kind) == ("P", "lsm") else _ROLES.get(axis)


def _axes(series: tifffile.TiffPageSeries) -> tuple[list[tuple[str, int]], str]:
    """Return axes and sizes that count the pages of an image, and the axes within a page."""
    sizes = [(axis, size) for axis, size in zip(series.axes, series.shape, strict=True) if size > 1]
    number = 0
    while number < len(sizes) and math.prod(size for _, size in sizes[:number]) < _planes(series):
        number += 1
    return sizes[:number], "".join(axis for axis, _ in sizes[number:])


def _is_whole(series: tifffile.TiffPageSeries) -> bool:
    """Return whether each plane is a page, or the pixels of all planes follow each other."""
    leading, _ = _axes(series)
    if math.prod(size for _, size in leading) != _planes(series):
        return False
    return len(series) == _planes(series) or (series.keyframe.is_final and series.dataoffset is not None)


def _check_files(file: tifffile.TiffFile, series: tifffile.TiffPageSeries, name: str) -> None:
    """Raise `ImageError` if pages of an OME-TIFF are in files that are not beside it, or if it has no folder."""
    names = files_of(file)
    if len(names) < 2 or len(series) != _planes(series) or None not in list(series):
        return
    folder = Path(file.filehandle.path).parent if file.filehandle.is_file else None
    if folder is None:
        raise ImageError(_ONE_OF_SEVERAL.format(name=name))
    missing = sorted(other for other in names if not (folder / other).is_file())
    absent = f"not {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}" if missing else "not all pages"
    raise ImageError(
        f"Expected the {len(names)} files of the OME-TIFF {name} in {folder}; found {absent}. Copy all files of the "
        "image into one folder."
    )


def _pixel_file(parts: Sequence[StoredPage], name: str, facts: PixelFacts, pixel_size: float | None) -> PixelFile:
    """Return an image of one page, or of a page for each channel."""
    first = parts[0].keyframe
    return PixelFile(
        name=name,
        shape=(first.imagelength, first.imagewidth, first.samplesperpixel * len(parts)),
        dtype=np.dtype(first.dtype),
        fill=lambda out: fill_pages(parts, out),
        read_part=page_reader(parts),
        facts=replace(facts, lossy=_is_lossy(parts[0])),
        pixel_size=pixel_size,
        choose=len(parts) > 1 or _is_multichannel(first),
    )


def _main_images(file: tifffile.TiffFile, name: str) -> list[tifffile.TiffPageSeries]:
    """Return the images of a file without thumbnails, labels, transparency masks and reduced copies."""
    found = [series for series in file.series if len(series) and series.keyframe is not None]
    main = [series for series in found if not _is_beside(series)] or found[:1]
    if not main:
        raise ImageError(f"Expected an image in {name}; found a TIFF without one.")
    return main


def _check_complete(file: tifffile.TiffFile, lines: Sequence[str], name: str) -> None:
    """Raise `ImageError` if pages are missing: tifffile tells of them in its log alone."""
    pages = len(file.pages)  # reads the places of all of them
    missing = next((line for line in lines if _MISSING_PAGES.search(line)), None)
    if missing is not None:
        raise ImageError(
            f"Expected a complete TIFF image in {name}; found a damaged one: pages after the first {pages} are "
            "missing. Copy it again, or save it again from its source."
        )


def _is_beside(series: tifffile.TiffPageSeries) -> bool:
    page = series.keyframe
    named = _SIDE_IMAGES.fullmatch(series.name.lower()) is not None
    return named or page.is_reduced or page.is_mask or page.is_subifd


def _planes(series: tifffile.TiffPageSeries) -> int:
    """Return the number of planes of an image, each as large as a page."""
    return int(math.prod(series.shape) // max(1, math.prod(series.keyframe.shape)))


def _several(file: tifffile.TiffFile, images: Sequence[tifffile.TiffPageSeries], name: str) -> str | None:
    """Return why a file is not a single image; None if it is one, with its channels in one page or a page each."""
    if len(images) != 1:
        return f"Expected one image in {name}; found {len(images)}. Save each as a separate file."
    (series,) = images
    axes = {axis for axis, size in zip(series.axes, series.shape, strict=True) if size > 1}
    if axes - set("YXSC"):
        return (
            f"Expected one image in {name}; found a stack with axes {series.axes} of {series.shape}. "
            "Save its planes as separate files."
        )
    if _planes(series) != len(series):
        return (
            f"Expected a page for each channel in {name}; found {_planes(series)} channels in {len(series)} page. "
            "Save them as separate files."
        )
    if any(page is None or page.parent is not file for page in series):
        return _ONE_OF_SEVERAL.format(name=name)
    return None


def _first_page(file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Any:
    """Return the first page of an image that is in this file, which may be one of several."""
    return next((page for page in series if page is not None and page.parent is file), file.pages.first)


def _check_kind(page: tifffile.TiffPage, name: str) -> None:
    """Raise `ImageError` for pixels of a kind that is not read, by its name."""
    found = None
    plain = {_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE}
    jpeg = page.compression in JPEG
    if page.photometric not in plain and not (page.photometric == _YCBCR and jpeg):
        found = _REFUSED.get(page.photometric, f"photometric interpretation {_name_of(page.photometric)}")
    elif page.photometric == _RGB and page.samplesperpixel < 3:
        found = f"RGB with {page.samplesperpixel} sample per pixel"
    elif page.dtype is not None and page.dtype.kind == "c":
        found = "complex numbers"
    elif page.dtype is None or page.dtype.kind not in "buif" or isinstance(page.bitspersample, tuple):
        found = f"{page.bitspersample} bits per value, sample format {_name_of(page.sampleformat)}"
    elif page.compression == _APERIO_YCBC or not _is_known(page.compression):
        found = f"compression {_name_of(page.compression)}"
    if found is not None:
        fix = "Save it as RGB." if "CMYK" in found else "Save it again as an uncompressed grey or RGB TIFF."
        raise ImageError(f"Expected grey, RGB or palette pixels in {name}; found {found}. {fix}")


def _name_of(value: Any) -> str:
    return f"{value.name} ({int(value)})" if hasattr(value, "name") else str(value)


def _is_lossy(part: StoredPage) -> bool:
    compression = part.keyframe.compression
    return compression in _LOSSLESS and _LOSSLESS[compression] not in part.head()


def _is_known(compression: int) -> bool:
    try:
        return compression == 1 or bool(tifffile.TIFF.DECOMPRESSORS[compression])
    except KeyError:
        return False


def _colours(page: tifffile.TiffPage) -> int:
    return 3 if page.photometric in {_RGB, _YCBCR} else 1


def _is_multichannel(page: tifffile.TiffPage) -> bool:
    """Return whether a page has several channels of which neither three are RGB nor one is alpha."""
    return page.samplesperpixel > 1 and _colours(page) == 1 and _alpha(page) is None


def _alpha(page: tifffile.TiffPage) -> int | None:
    """Return the channel that is declared as alpha."""
    first = page.samplesperpixel - len(page.extrasamples)
    return next((first + i for i, kind in enumerate(page.extrasamples) if kind in _ALPHA), None)


def _facts(page: tifffile.TiffPage, *, alone: bool) -> PixelFacts:
    """Return what the tags of an open file say about the values of its pages; `alone` if they have all channels."""
    orientation = page.tags.valueof("Orientation", 1)
    return PixelFacts(
        colours=_colours(page) if alone else 1,
        bits=page.bitspersample,
        alpha=_alpha(page) if alone else None,
        white_is_zero=page.photometric == _WHITE_IS_ZERO,
        orientation=orientation if orientation in range(1, 9) else 1,
    )
