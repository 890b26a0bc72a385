"""Whole slides: what is read of them, and what is refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from nucleus.data.images import open_stacks
from nucleus.data.pixel_files import PixelFile, level_steps
from nucleus.data.slides import is_slide, slides_among
from nucleus.errors import ImageError, MissingPackageError
from tests.slide_files import BACKGROUND, MPP, reduced, write_dicom, write_mirax, write_ndpi, write_svs

SHAPE = (384, 512)
"""Whole tiles of MIRAX, and whole blocks of JPEG."""
PIXELS = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (*SHAPE, 3), np.uint8), (0, 0), 9)
PIXELS = cv2.normalize(PIXELS, None, 0, 255, cv2.NORM_MINMAX)
LOSSY = 6
"""Largest mean difference after JPEG at high quality."""
WRITERS: dict[str, Callable[[Path], Path]] = {
    "svs": lambda folder: write_svs(folder / "a.svs", PIXELS, compression="deflate"),
    "ndpi": lambda folder: write_ndpi(folder / "a.ndpi", PIXELS),
    "mirax": lambda folder: write_mirax(folder / "a.mrxs", PIXELS),
    "dicom": lambda folder: write_dicom(folder, PIXELS),
}


def opened(path: Path) -> PixelFile:
    (stack,) = open_stacks(path, path.name)
    assert (stack.times, stack.depths) == (1, 1)
    return stack.plane(0, 0)


def pixels_of(file: PixelFile) -> NDArray[Any]:
    assert file.read_part is not None
    out = np.empty(file.shape, file.dtype)
    file.fill(out)
    rows, columns = slice(37, 201), slice(100, 363)
    assert (file.read_part(rows, columns) == out[rows, columns]).all()
    return out


def distance(first: NDArray[Any], second: NDArray[Any]) -> float:
    return float(np.abs(first.astype(float) - second).mean())


@pytest.mark.parametrize("kind", WRITERS)
def test_a_slide_is_one_image_with_levels(tmp_path: Path, kind: str) -> None:
    """Its thumbnail, label and macro image are none."""
    file = opened(WRITERS[kind](tmp_path))
    assert (file.shape, file.dtype, file.facts.colours, file.choose) == ((*SHAPE, 3), np.uint8, 3, False)
    assert file.pixel_size == pytest.approx(MPP)
    assert distance(pixels_of(file), PIXELS) < (LOSSY if kind != "svs" else 1e-9)
    level = file.levels()[0]
    step = 2 if kind in {"mirax", "ndpi"} else 4
    assert (level.steps, level.shape) == ((step, step), (SHAPE[0] // step, SHAPE[1] // step))
    part = slice(8, 60), slice(16, 100)
    assert distance(level.read(*part), reduced(PIXELS, step)[part]) < LOSSY


def test_the_content_decides(tmp_path: Path) -> None:
    """Names do not; a region saved by a viewer keeps the description, but is no slide."""
    slide = write_svs(tmp_path / "a.svs", PIXELS).rename(tmp_path / "a.tif")
    assert is_slide(slide)
    assert len(opened(slide).levels()) == 1
    region = write_svs(tmp_path / "b.svs", PIXELS, tiled=False)
    assert not is_slide(region)
    generic = tmp_path / "c.svs"
    tifffile.imwrite(generic, PIXELS, photometric="rgb", tile=(256, 256))
    assert not is_slide(generic)
    assert (pixels_of(opened(generic)) == PIXELS).all()
    for path in (tmp_path / "a.png", tmp_path / "a.jpg"):
        assert cv2.imwrite(str(path), PIXELS)
        assert not is_slide(path)


def test_what_was_not_scanned_has_the_colour_of_the_background(tmp_path: Path) -> None:
    """And the image is the part that was scanned, with its levels, as QuPath shows it."""
    path = write_mirax(
        tmp_path / "a.mrxs", PIXELS, lambda row, column: row < 4 and column > 1 and (row, column) != (0, 2)
    )
    file = opened(path)
    found = pixels_of(file)
    assert found.shape == (256, 384, 3)
    assert (found[:60, :60] == BACKGROUND).all()
    assert distance(found[64:, 64:], PIXELS[64:256, 192:]) < LOSSY
    (level,) = file.levels()
    assert level.shape == (128, 192)
    assert distance(level.read(slice(64, 120), slice(40, 180)), reduced(PIXELS, 2)[64:120, 104:244]) < LOSSY


def test_a_dicom_slide_is_found_once(tmp_path: Path) -> None:
    write_dicom(tmp_path / "s", PIXELS)
    write_dicom(tmp_path / "s", PIXELS, "1.2.4")
    (tmp_path / "s" / "other.dcm").write_bytes(bytes(128) + b"DICM")
    names = ["s/1.2.3-0.dcm", "s/1.2.3-1.dcm", "s/1.2.4-0.dcm", "s/1.2.4-1.dcm", "s/other.dcm", "s/z.png"]
    assert slides_among(tmp_path, names) == ["s/1.2.3-0.dcm", "s/1.2.4-0.dcm", "s/other.dcm", "s/z.png"]
    assert (pixels_of(opened(tmp_path / "s/1.2.3-1.dcm")) == pixels_of(opened(tmp_path / "s/1.2.3-0.dcm"))).all()
    with pytest.raises(ImageError, match="no whole slide"):
        open_stacks(tmp_path / "s/other.dcm", "other.dcm")


def test_reduced_levels_alone_are_no_slide(tmp_path: Path) -> None:
    """Their areas would be in other pixels than those of the slide."""
    with pytest.raises(ImageError, match="found reduced levels alone"):
        open_stacks(write_dicom(tmp_path, PIXELS, levels=(4,)), "a.dcm")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    path = write_mirax(tmp_path / "a.mrxs", PIXELS).rename(tmp_path / "b.mrxs")
    with pytest.raises(ImageError, match=f"Expected the folder {tmp_path / 'b'} beside b.mrxs"):
        open_stacks(path, "b.mrxs")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_damaged_slide_is_told(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path)
    damaged = path.with_suffix("") / "Data0000.dat" if kind == "mirax" else path
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 3])
    with pytest.raises(ImageError, match="Expected"):
        pixels_of(opened(path))


def test_levels_that_contradict_each_other_are_told(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "a.svs", PIXELS, level=np.ascontiguousarray(PIXELS[:300, :200]))
    with pytest.raises(ImageError, match=r"512 x 384 px .* level of 200 x 300 px"):
        open_stacks(path, "a.svs")


def test_steps_of_levels() -> None:
    """Sides are rounded up, down and more than once; a step is exact where a whole number explains both sides."""
    assert level_steps((1001, 999), (250, 249), "a") == (4, 4)
    assert level_steps((1001, 999), (251, 250), "a") == (4, 4)
    assert level_steps((1000, 800), (400, 320), "a") == (2.5, 2.5)
    for level in ((500, 399), (2000, 1600)):
        with pytest.raises(ImageError):
            level_steps((1000, 800), (level[0], level[1] - 2), "a")


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_svs(tmp_path / "a.svs", PIXELS)
    monkeypatch.setitem(sys.modules, "openslide", None)
    monkeypatch.setattr("nucleus.lazy._is_installed", lambda _: False)
    with pytest.raises(MissingPackageError, match=r"nucleus\[slides\]"):
        open_stacks(path, "a.svs")
    tifffile.imwrite(tmp_path / "b.tif", PIXELS, photometric="rgb", tile=(256, 256))
    assert opened(tmp_path / "b.tif").shape == (*SHAPE, 3)
