"""Parts of TIFFs: only what is needed is decoded, once, in any number of threads; what is missing is told."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from nucleus.data import tiff_pages
from nucleus.data.images import open_pixels, read_stored
from nucleus.data.pixel_files import ReadPart
from nucleus.errors import ImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (512, 480, 3)).astype(np.uint8)
PART = slice(100, 140), slice(200, 250)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of the strips and tiles that were decoded."""
    found: list[int] = []
    original = tiff_pages.StoredPage.decoded

    def counted(page: Any, read: Any, index: int) -> Any:
        found.append(index)
        return original(page, read, index)

    monkeypatch.setattr(tiff_pages.StoredPage, "decoded", counted)
    return found


def part_of(path: Path, pixels: NDArray[Any], **options: Any) -> ReadPart:
    tifffile.imwrite(path, pixels, photometric="rgb", **options)
    read = open_pixels(path, "x").read_part
    assert read is not None
    return read


def test_only_the_tiles_of_a_part_are_decoded_and_only_once(tmp_path: Path, decoded: list[int]) -> None:
    read = part_of(tmp_path / "x.tif", PIXELS, tile=(32, 32), compression="zlib")
    for _ in range(2):
        assert (read(*PART) == PIXELS[PART]).all()
    assert sorted(decoded) == [row * 15 + column for row in (3, 4) for column in (6, 7)]
    assert (read(slice(90, 140), slice(200, 250)) == PIXELS[90:140, 200:250]).all()
    assert len(decoded) == 6


def test_kept_tiles_are_limited(tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff_pages, "_KEPT_BYTES", 2 * 32 * 32 * 3)
    read = part_of(tmp_path / "x.tif", PIXELS, tile=(32, 32), compression="zlib")
    for _ in range(3):
        assert (read(*PART) == PIXELS[PART]).all()
    assert len(decoded) == 4 + 2 + 2


def test_uncompressed_pixels_are_not_decoded(tmp_path: Path, decoded: list[int]) -> None:
    for number, options in enumerate(({"rowsperstrip": 512}, {"rowsperstrip": 10}, {"byteorder": ">"})):
        pixels = PIXELS.astype(np.uint16) * 257
        read = part_of(tmp_path / f"{number}.tif", pixels, **options)
        assert (read(*PART) == pixels[PART]).all()
    assert decoded == []


def test_large_tiles_and_compressed_strips_have_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff_pages, "_LARGEST_TILE", 1 << 10)
    for options in ({"tile": (32, 32)}, {"rowsperstrip": 8}):
        tifffile.imwrite(tmp_path / "x.tif", PIXELS, photometric="rgb", compression="zlib", **options)
        assert open_pixels(tmp_path / "x.tif", "x").read_part is None


def test_threads_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff_pages, "_WORTH_THREADS", 0)
    for planar in ("contig", "separate"):
        stored = PIXELS if planar == "contig" else np.moveaxis(PIXELS, 2, 0)
        read = part_of(tmp_path / "x.tif", stored, tile=(32, 32), compression="lzw", planarconfig=planar)
        assert (read(*PART) == PIXELS[PART]).all()
        assert (read_stored((tmp_path / "x.tif").read_bytes(), "x").pixels == PIXELS).all()


def test_missing_tiles_are_told(tmp_path: Path) -> None:
    """tifffile would fill them with zeros."""

    def tiles() -> Iterator[NDArray[np.uint8] | None]:
        for number in range(4):
            yield None if number == 2 else np.full((32, 32), 9, np.uint8)

    file = io.BytesIO()
    tifffile.imwrite(file, tiles(), shape=(64, 64), dtype=np.uint8, tile=(32, 32), compression="zlib")
    with pytest.raises(ImageError, match=r"Expected 4 strips or tiles in x; found 3"):
        read_stored(file.getvalue(), "x")
    tifffile.imwrite(tmp_path / "x.tif", PIXELS, photometric="rgb", tile=(32, 32))
    (tmp_path / "x.tif").write_bytes((tmp_path / "x.tif").read_bytes()[:300_000])
    with pytest.raises(ImageError, match=r"Expected 240 strips or tiles in x"):
        open_pixels(tmp_path / "x.tif", "x")


def test_files_that_shrink_after_they_were_opened_are_told(tmp_path: Path) -> None:
    for options in ({}, {"tile": (32, 32), "compression": "zlib"}):
        read = part_of(tmp_path / "x.tif", PIXELS, **options)
        (tmp_path / "x.tif").write_bytes((tmp_path / "x.tif").read_bytes()[:50_000])
        with pytest.raises(ImageError, match="damaged"):
            read(slice(400, 512), slice(0, 480))
