"""OME-TIFF in several files: one image, whichever of its files is named, with an error for a file that is missing."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from nucleus.data.images import open_stacks, read_stored
from nucleus.data.stacks import PlaneOptions
from nucleus.errors import ImageError
from nucleus.predict.planes import plan_images

PIXELS = np.random.default_rng(0).integers(0, 255, (2, 3, 40, 50), np.uint8)
"""Channels, depths, rows and columns; a file for each channel."""
NAMES = ("a.ome.tif", "b.ome.tif")
_START = (
    '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{}">'
)
_IDS = ("urn:uuid:00000000-0000-0000-0000-000000000001", "urn:uuid:00000000-0000-0000-0000-000000000002")


def metadata(own: int, names: tuple[str, str] = NAMES) -> str:
    """The description of the whole image, as each of its files has it."""
    planes = "".join(
        f'<TiffData FirstC="{c}" FirstZ="{z}" FirstT="0" IFD="{z}" PlaneCount="1"><UUID FileName="{names[c]}">{_IDS[c]}'
        "</UUID></TiffData>"
        for c in range(2)
        for z in range(3)
    )
    called = enumerate(("DAPI", "G"))
    channels = "".join(f'<Channel ID="C:{c}" Name="{name}" SamplesPerPixel="1"/>' for c, name in called)
    return (
        f'{_START.format(_IDS[own])}<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" '
        'SizeX="50" SizeY="40" SizeZ="3" SizeC="2" SizeT="1" PhysicalSizeX="0.5" PhysicalSizeY="0.5">'
        f"{channels}{planes}</Pixels></Image></OME>"
    )


def written(folder: Path, *texts: str) -> list[Path]:
    for channel, (name, text) in enumerate(zip(NAMES, texts or (metadata(0), metadata(1)), strict=True)):
        tifffile.imwrite(folder / name, PIXELS[channel], description=text, metadata=None, photometric="minisblack")
    return [folder / name for name in NAMES]


ELSEWHERE = f'{_START.format(_IDS[0])}<BinaryOnly MetadataFile="b.ome.tif" UUID="{_IDS[1]}"/></OME>'


@pytest.mark.parametrize("first", [metadata(0), ELSEWHERE])
def test_any_file_gives_the_whole_image(tmp_path: Path, first: str) -> None:
    """Also one that leaves the description to another."""
    paths = written(tmp_path, first, metadata(1))
    for path in paths:
        (stack,) = open_stacks(path, path.name)
        assert (stack.times, stack.depths, stack.channels) == (1, 3, ("DAPI", "G"))
        assert stack.files == frozenset(paths)
        for depth in range(3):
            plane = stack.plane(0, depth)
            out = np.empty(plane.shape, plane.dtype)
            plane.fill(out)
            assert (out == np.moveaxis(PIXELS[:, depth], 0, -1)).all()
            assert plane.pixel_size == 0.5


def test_its_files_are_no_images_of_their_own(tmp_path: Path) -> None:
    paths = written(tmp_path)
    other = tmp_path / "c.tif"
    tifffile.imwrite(other, PIXELS[0, 0])
    planned = plan_images({path.name: path for path in (*paths, other)}, PlaneOptions(z="all"))
    assert planned.failures == {}
    assert [image.name for image in planned.images] == ["a.ome.tif"] * 3 + ["c.tif"]
    assert planned.channels == 2


@pytest.mark.parametrize("lost", NAMES)
def test_a_missing_file_is_named(tmp_path: Path, lost: str) -> None:
    paths = written(tmp_path, ELSEWHERE, metadata(1))
    (tmp_path / lost).unlink()
    (left,) = (path for path in paths if path.exists())
    with pytest.raises(ImageError, match=lost):
        open_stacks(left, left.name)


def test_a_file_that_was_cut_off_is_told(tmp_path: Path) -> None:
    paths = written(tmp_path)
    (stack,) = open_stacks(paths[0], "a")
    paths[1].write_bytes(paths[1].read_bytes()[:3000])
    with pytest.raises(ImageError, match="strips"):
        stack.plane(0, 2)


def test_names_that_lead_to_other_folders_are_refused(tmp_path: Path) -> None:
    for name in ("../b.ome.tif", "/b.ome.tif", "x\\b.ome.tif"):
        path = written(tmp_path, metadata(0, ("a.ome.tif", name)), metadata(1))[0]
        with pytest.raises(ImageError, match="in its metadata"):
            open_stacks(path, "a")
    path = written(tmp_path, ELSEWHERE.replace("b.ome.tif", "../b.ome.tif"), metadata(1))[0]
    with pytest.raises(ImageError, match="in its metadata"):
        open_stacks(path, "a")


def test_bytes_have_no_other_files(tmp_path: Path) -> None:
    """Such as those of a mask, or of an image of an import."""
    data = written(tmp_path)[0].read_bytes()
    with pytest.raises(ImageError, match="one of several files"):
        open_stacks(data, "a")
    assert read_stored(data, "a").pages == 6
