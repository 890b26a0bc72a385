"""Planes of stacks, time series and files of several images, as tifffile writes them; and the choice among them."""

import struct
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from nucleus.data import stacks as stacks_module
from nucleus.data.images import decode_image, open_stacks
from nucleus.data.pixel_files import PixelFile, seen_pixels
from nucleus.data.stacks import (
    PlaneOptions,
    Stack,
    channel_number,
    choose_planes,
    open_plane,
    sharpest,
)
from nucleus.data.synthetic import generated_image
from nucleus.errors import ImageError, UsageError

Pixels = NDArray[Any]
T, Z, C, Y, X = 2, 3, 2, 40, 48
NUMBERS = np.random.default_rng(1).integers(0, 4000, (T, Z, C, Y, X)).astype(np.uint16)
WHOLE = slice(0, Y), slice(0, X)


def pixels_of(file: PixelFile) -> Pixels:
    out = np.empty(file.shape, file.dtype)
    file.fill(out)
    if file.read_part is not None:
        assert (file.read_part(slice(3, 30), slice(5, 40)) == out[3:30, 5:40]).all()
    return out


def ome(path: Path, axes: str, **options: Any) -> None:
    order = ["TZCYX".index(axis) for axis in axes]
    metadata = {"axes": axes, "PhysicalSizeX": 0.5, "Channel": {"Name": ["DAPI", "GFP & co"]}}
    tifffile.imwrite(path, NUMBERS.transpose(order), metadata=metadata, ome=True, photometric="minisblack", **options)


def imagej(path: Path, **options: Any) -> None:
    metadata = {"axes": "TZCYX", "Labels": ["DAPI", "GFP & co"] * (T * Z), "unit": "um"}
    tifffile.imwrite(path, NUMBERS, imagej=True, metadata=metadata, resolution=(2.0, 2.0), **options)


def lsm(path: Path, pixels: Pixels, names: tuple[str, ...]) -> None:
    """A file with the tag of Zeiss LSM: a page of all channels, then its thumbnail, for each depth of each time."""
    times, depths, channels, height, width = pixels.shape
    known = {
        "MagicNumber": 67127628, "StructureSize": 188, "DimensionX": width, "DimensionY": height,
        "DimensionZ": depths, "DimensionChannels": channels, "DimensionTime": times, "DataType": 2, "ScanType": 6,
        "VoxelSizeX": 0.5e-6, "VoxelSizeY": 0.5e-6, "OffsetChannelColors": 0xABCDEF01,
    }  # fmt: skip
    dtype = np.dtype(tifffile.TIFF.CZ_LSMINFO).newbyteorder("<")
    info = np.zeros(1, dtype)
    for key, value in known.items():
        info[key] = value
    with tifffile.TiffWriter(path) as writer:
        for number, (time, depth) in enumerate(product(range(times), range(depths))):
            tag = [(34412, 1, dtype.itemsize, info.tobytes(), True)] if number == 0 else []
            page = {"metadata": None, "photometric": "minisblack", "planarconfig": "separate"}
            writer.write(pixels[time, depth], extratags=tag, **page)
            writer.write(np.zeros((channels, 8, 8), pixels.dtype), subfiletype=1, **page)
    texts = b"".join(struct.pack("<I", len(name) + 1) + name.encode() + b"\0" for name in names)
    start = 24 + 4 * len(names)
    block = struct.pack("<IIIIII", start + len(texts), len(names), len(names), 24, start, 0) + bytes(4 * len(names))
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", 0xABCDEF01), struct.pack("<I", len(data))) + block + texts)


WRITERS: dict[str, Callable[[Path], None]] = {
    "OME": lambda path: ome(path, "TZCYX"),
    "OME, other order": lambda path: ome(path, "CTZYX"),
    "OME, compressed tiles": lambda path: ome(path, "ZTCYX", tile=(16, 16), compression="zlib"),
    "OME, compressed strips": lambda path: ome(path, "TCZYX", rowsperstrip=8, compression="zlib"),
    "ImageJ": imagej,
    "ImageJ, compressed": lambda path: imagej(path, compression="zlib"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_each_plane_of_each_format(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path / "x.bin")
    for content in (tmp_path / "x.bin", (tmp_path / "x.bin").read_bytes()):
        (stack,) = open_stacks(content, "x")
        assert (stack.name, stack.times, stack.depths) == ("x", T, Z)
        assert stack.channels == ("DAPI", "GFP & co")
        for time, depth in product(range(T), range(Z)):
            file = stack.plane(time, depth)
            assert (pixels_of(file) == np.moveaxis(NUMBERS[time, depth], 0, -1)).all()
            assert (file.pixel_size, file.choose, file.several) == (pytest.approx(0.5), True, None)


def test_lsm(tmp_path: Path) -> None:
    """Of three channels: tifffile has a special case for two, which is for damaged files."""
    pixels = np.concatenate([NUMBERS, 4000 - NUMBERS[:, :, :1]], axis=2)
    lsm(tmp_path / "x.lsm", pixels, ("Ch1", "Ch2-T1", "405"))
    (stack,) = open_stacks(tmp_path / "x.lsm", "x")
    assert (stack.times, stack.depths, stack.channels) == (T, Z, ("Ch1", "Ch2-T1", "405"))
    for time, depth in product(range(T), range(Z)):
        file = stack.plane(time, depth)
        assert (pixels_of(file) == np.moveaxis(pixels[time, depth], 0, -1)).all()
        assert (file.pixel_size, file.choose) == (pytest.approx(0.5), True)


def written(path: Path, pixels: Pixels, **options: Any) -> Stack:
    tifffile.imwrite(path, pixels, **{"photometric": "minisblack", **options})
    (stack,) = open_stacks(path, "x")
    return stack


def plain(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        for page in NUMBERS[0, :, 0]:
            writer.write(page, metadata=None, contiguous=False)


def test_pages_whose_meaning_is_not_told_are_depths(tmp_path: Path) -> None:
    plain(tmp_path / "plain.tif")
    (stack,) = open_stacks(tmp_path / "plain.tif", "x")
    stacks = [
        stack,
        written(tmp_path / "shaped.tif", NUMBERS[0, :, 0]),
        written(tmp_path / "one header.tif", NUMBERS[0, :, 0], truncate=True),
        written(
            tmp_path / "one header, ImageJ.tif",
            NUMBERS[0, :, 0],
            truncate=True,
            imagej=True,
            metadata={"axes": "ZYX"},
        ),
        written(tmp_path / "colours.tif", np.moveaxis(NUMBERS[:, :, [0, 1, 0]][0], 1, -1), photometric="rgb"),
    ]
    for each in stacks:
        assert (each.times, each.depths, each.channels) == (1, Z, ())
        for depth in range(Z):
            assert (pixels_of(each.plane(0, depth))[..., 0] == NUMBERS[0, depth, 0]).all()
    assert stacks[-1].plane(0, 0).shape == (Y, X, 3)
    assert not stacks[-1].plane(0, 0).choose
    both = written(tmp_path / "both.tif", NUMBERS[:, :, 0])
    assert (both.times, both.depths) == (1, T * Z)
    assert (pixels_of(both.plane(0, 4))[..., 0] == NUMBERS[1, 1, 0]).all()


def test_one_plane_is_what_it_was(tmp_path: Path) -> None:
    stack = written(tmp_path / "x.tif", NUMBERS[0, 0, 0])
    assert (stack.times, stack.depths, stack.name) == (1, 1, "x")
    assert choose_planes([stack], PlaneOptions()) == choose_planes([stack], PlaneOptions("max", "all"))
    file, depth = open_plane(stack, choose_planes([stack], PlaneOptions("best"))[0])
    assert (pixels_of(file)[..., 0] == NUMBERS[0, 0, 0]).all()
    assert (file.name, depth) == ("x", None)


def several(path: Path) -> None:
    with tifffile.TiffWriter(path, ome=True) as writer:
        for number, name in enumerate(("left", "right")):
            metadata = {"axes": "ZYX", "Name": name, "PhysicalSizeX": 0.5 + number, "Channel": {"Name": [f"{name}-1"]}}
            writer.write(NUMBERS[number, :, 0], metadata=metadata, photometric="minisblack")


def test_several_images_of_a_file(tmp_path: Path) -> None:
    several(tmp_path / "x.ome.tif")
    found = open_stacks(tmp_path / "x.ome.tif", "x")
    assert [stack.name for stack in found] == ["x#0", "x#1"]
    assert [stack.channels for stack in found] == [("left-1",), ("right-1",)]
    for number, stack in enumerate(found):
        assert (stack.depths, stack.plane(0, 0).pixel_size) == (Z, pytest.approx(0.5 + number))
        assert (pixels_of(stack.plane(0, 2))[..., 0] == NUMBERS[number, 2, 0]).all()
    endings = [chosen.ending for chosen in choose_planes(found, PlaneOptions("all"))]
    assert endings == [".s0.z0", ".s0.z1", ".s0.z2", ".s1.z0", ".s1.z1", ".s1.z2"]
    assert [chosen.ending for chosen in choose_planes(found, PlaneOptions("max"))] == [".s0", ".s1"]
    with tifffile.TiffWriter(tmp_path / "sizes.tif") as writer:
        for side in (30, 20):
            writer.write(NUMBERS[0, 0, 0, :side, :side], metadata=None)
    sizes = open_stacks(tmp_path / "sizes.tif", "x")
    assert [stack.plane(0, 0).shape for stack in sizes] == [(30, 30, 1), (20, 20, 1)]


def test_endings_tell_planes_apart_and_sort_as_they_do() -> None:
    def endings(times: int, depths: int, z: int | str | None = None, t: int | str | None = None) -> list[str]:
        stack = Stack(name="x", times=times, depths=depths, plane=lambda *_: pytest.fail("was opened"))
        return [each.ending for each in choose_planes([stack], PlaneOptions(z, t))]

    assert endings(1, 12, "all")[::11] == [".z00", ".z11"]
    assert endings(101, 2, "all", "all")[:3] == [".z0.t000", ".z1.t000", ".z0.t001"]
    assert endings(101, 2, "max", "all")[-1] == ".t100"
    assert endings(2, 101, "all", 1)[-1] == ".z100"
    for z, t in (("max", 0), (1, 1), ("best", 1)):
        assert endings(2, 2, z, t) == [""]
    assert endings(1, 1, "all", "all") == [""]


@pytest.mark.parametrize(
    ("counts", "options", "said"),
    [
        ((1, 5), (None, 0), r"5 depths \(z\)\. Add: --z max, --z best or --z all .*z=\"max\".*not followed through"),
        ((4, 1), (0, None), r"4 times \(t\)\. Add: --t 0 or --t all .*t=0"),
        ((4, 5), (None, None), r"5 depths \(z\) and 4 times \(t\)\. Add: --z max.* and --t 0"),
        ((4, 5), (5, 0), r"z from 0 to 4 in x; found --z 5"),
        ((4, 5), ("all", 4), r"t from 0 to 3 in x; found --t 4"),
        ((1, 1), (1, None), r"z from 0 to 0 in x"),
    ],
)
def test_choices_that_do_not_fit(counts: tuple[int, int], options: tuple[Any, Any], said: str) -> None:
    stack = Stack(name="x", times=counts[0], depths=counts[1], plane=lambda *_: pytest.fail("was opened"))
    with pytest.raises(ImageError, match=said):
        choose_planes([stack], PlaneOptions(*options))


def test_wrong_options() -> None:
    for options in (("median", None), ("Max", None), (-1, None), (1.5, None), (True, None), ("1", None), (None, "max")):
        with pytest.raises(UsageError, match=r"Expected [zt] to be .*all or a number from 0"):
            PlaneOptions(*options)
    assert PlaneOptions(np.int64(2)) == PlaneOptions(2)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "u8", "i8", "f2", "f4", "f8", "?"])
@pytest.mark.parametrize("large", [False, True])
def test_projections_in_the_depth_of_the_image(
    dtype: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(stacks_module, "_IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(stacks_module, "_BAND_ROWS", 16)
        monkeypatch.setattr(stacks_module, "_BAND_PIXELS", 1)
    rng = np.random.default_rng(2)
    kind = np.dtype(dtype)
    if kind.kind in "ui":
        pixels = rng.integers(np.iinfo(kind).min, np.iinfo(kind).max, (5, Y, X), kind, endpoint=True)
        pixels[:, 0, 0] = np.iinfo(kind).max
    else:
        pixels = (rng.normal(0, 9, (5, Y, X)) > 3 if kind.kind == "b" else rng.normal(0, 9, (5, Y, X))).astype(kind)
    stack = written(tmp_path / "x.tif", pixels, compression=None if kind.kind == "b" else "zlib")
    found = {}
    for name in ("max", "mean"):
        file, depth = open_plane(stack, choose_planes([stack], PlaneOptions(name))[0])
        assert (file.dtype, file.shape, depth) == (kind, (Y, X, 1), None)
        found[name] = pixels_of(file)[..., 0]
    assert (found["max"] == pixels.max(axis=0)).all()
    if kind.kind == "f":
        np.testing.assert_allclose(found["mean"], pixels.astype(np.float64).mean(axis=0), rtol=1e-2, atol=1e-2)
        return
    exact = pixels.astype(object).sum(axis=0)
    distance = np.abs(found["mean"].astype(object) * 5 - exact)
    assert (distance <= (2 if kind.itemsize < 8 else 5 * 4096)).all()  # sums are floats, of 53 bits
    assert found["mean"][0, 0] == pixels[0, 0, 0] or kind.itemsize == 8


def test_projections_of_channels_and_times_and_of_white_is_zero(tmp_path: Path) -> None:
    ome(tmp_path / "x.tif", "TZCYX")
    (stack,) = open_stacks(tmp_path / "x.tif", "x")
    chosen = choose_planes([stack], PlaneOptions("max", "all"))
    assert [each.label for each in chosen] == [" t=0", " t=1"]
    for time, each in enumerate(chosen):
        assert (pixels_of(open_plane(stack, each)[0]) == np.moveaxis(NUMBERS[time].max(axis=0), 0, -1)).all()
    white = written(tmp_path / "white.tif", NUMBERS[0, :, 0], photometric="miniswhite")
    file, _ = open_plane(white, choose_planes([white], PlaneOptions("max"))[0])
    assert (pixels_of(file)[..., 0] == NUMBERS[0, :, 0].min(axis=0)).all()


def test_palettes_have_planes_but_no_projections(tmp_path: Path) -> None:
    colours = np.random.default_rng(3).integers(0, 1 << 16, (3, 256)).astype(np.uint16)
    indices = NUMBERS[0, :, 0].astype(np.uint8)
    stack = written(tmp_path / "x.tif", indices, photometric="palette", colormap=colours)
    assert (pixels_of(stack.plane(0, 1))[..., 0] == indices[1]).all()
    with pytest.raises(ImageError, match=r"indices of a palette.*--z 0"):
        open_plane(stack, choose_planes([stack], PlaneOptions("mean"))[0])


def test_each_page_has_its_own_palette(tmp_path: Path) -> None:
    grey, ramp = NUMBERS[0, 0, 0].astype(np.uint8), np.stack([np.arange(256, dtype=np.uint16) * 257] * 3)
    with tifffile.TiffWriter(tmp_path / "x.tif") as writer:
        for indices, colours in ((grey, ramp), (255 - grey, ramp[:, ::-1])):
            page = {"photometric": "palette", "colormap": colours, "metadata": None, "contiguous": False}
            writer.write(indices, **page)
    (stack,) = open_stacks(tmp_path / "x.tif", "x")
    planes = [stack.plane(0, depth) for depth in range(stack.depths)]
    assert len(planes) == 2
    for plane in planes:
        assert (seen_pixels(pixels_of(plane), plane.facts, "x")[..., 0] == grey).all()


def test_the_sharpest_plane_is_found(tmp_path: Path) -> None:
    """With the noise of a camera, an offset and bleaching; by the chosen channel, whichever the bands are."""
    rng = np.random.default_rng(4)
    for seed, best in ((1, 0), (2, 3), (3, 5)):
        image = generated_image(seed, 96, 120)[0].mean(axis=2)
        planes = [cv2.GaussianBlur(image, (0, 0), 0.3 + 0.9 * abs(depth - best)) for depth in range(6)]
        planes = [plane * 0.98**depth + 300 + rng.normal(0, 4, plane.shape) for depth, plane in enumerate(planes)]
        noise = rng.normal(500, 1, (6, 96, 120))
        pixels = np.stack([noise, np.stack(planes)], axis=1).astype(np.uint16)
        metadata = {"axes": "ZCYX"}
        stack = written(tmp_path / "x.tif", pixels, imagej=True, metadata=metadata, photometric=None)
        assert sharpest(stack, 0, 1) == best
        chosen = choose_planes([stack], PlaneOptions("best"))[0]
        file, depth = open_plane(stack, chosen, 1)
        assert depth == best
        assert (pixels_of(file) == np.moveaxis(pixels[best], 0, -1)).all()
    with pytest.raises(ImageError, match="Expected channel 2"):
        sharpest(stack, 0, 2)
    equal = written(tmp_path / "y.tif", np.zeros((3, 5, 2), np.float32))
    assert sharpest(equal, 0) == 0
    with pytest.raises(ImageError, match="finite values in x, z 1"):
        sharpest(
            written(tmp_path / "z.tif", np.array([0, np.nan, 0], np.float32)[:, None, None] + np.ones((3, 9, 9))), 0
        )


def test_each_depth_is_read_once_in_bounded_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks_module, "_BAND_PIXELS", 10 * 16)
    monkeypatch.setattr(stacks_module, "_BAND_ROWS", 8)
    read: list[tuple[int, int]] = []

    def plane(_: int, depth: int) -> PixelFile:
        def part(rows: slice, columns: slice) -> Pixels:
            read.append((depth, rows.start))
            assert rows.stop - rows.start <= 8
            return np.full((rows.stop - rows.start, columns.stop, 1), depth, np.uint8)

        return PixelFile(name="x", shape=(40, 16, 1), dtype=np.dtype(np.uint8), fill=pytest.fail, read_part=part)

    stack = Stack(name="x", times=1, depths=3, plane=plane)
    for name, expected in (("max", 2), ("mean", 1)):
        read.clear()
        assert (pixels_of(open_plane(stack, choose_planes([stack], PlaneOptions(name))[0])[0]) == expected).all()
        assert read == [(depth, row) for depth in range(3) for row in range(0, 40, 8)]


def test_channels_by_name() -> None:
    stack = Stack(name="x", times=1, depths=1, plane=pytest.fail, channels=("DAPI", "GFP", "gfp", "dapi 2"))
    assert [channel_number(stack, channel) for channel in (None, 3, "DAPI", "dapi", "gfp", "GFP")] == [
        None,
        3,
        0,
        0,
        2,
        1,
    ]
    with pytest.raises(ImageError, match="'Cy5' in x; found the channels 0 'DAPI', 1 'GFP', 2 'gfp', 3 'dapi 2'"):
        channel_number(stack, "Cy5")
    with pytest.raises(ImageError, match="found 2 channels of that name"):
        channel_number(stack, "Gfp")
    with pytest.raises(ImageError, match=r"names no channels\. Give its number"):
        channel_number(Stack(name="x", times=1, depths=1, plane=pytest.fail), "DAPI")
    wavelengths = Stack(name="x", times=1, depths=1, plane=pytest.fail, channels=("488", "405", "0"))
    assert [channel_number(wavelengths, channel) for channel in (405, "405", 0, "0", 2, 640)] == [1, 1, 0, 2, 2, 640]


@pytest.mark.parametrize(
    ("xml", "expected"),
    [
        ("<Channel ID='Channel:0:0' Name='a'/><Channel ID=\"Channel:0:1\" Name=\"b\"/>", ("a", "b")),
        ('<Channel ID="Channel:0:0"/><Channel ID="Channel:0:1" Name=""/>', ()),
        ('<Channel ID="Channel:0:0"/><Channel ID="Channel:0:1" Name="b"/>', ("", "b")),
        ('<Channel ID="0" Name="&lt;a&gt;"><LightPath/></Channel><Channel ID="1" Name="b"/>', ("<a>", "b")),
        ('<!-- <Image><Channel Name="no"/> --><Channel ID="0" Name="a"/><Channel ID="1" Name="b"/>', ("a", "b")),
        ('<Channel ID="0" Name="only one"/>', ()),
        ('<Channel ID="0" Name="a>b"/><Channel ID="1" Name = "b"/>', ("a>b", "b")),
    ],
)
def test_names_of_channels_in_ome(xml: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    whole = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        f'<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="{X}" SizeY="{Y}" SizeC="2" SizeZ="1" '
        f'SizeT="1">{xml}<TiffData/></Pixels></Image></OME>'
    )
    with tifffile.TiffWriter(tmp_path / "x.tif") as writer:
        for page in NUMBERS[0, 0]:
            writer.write(page, description="x", metadata=None, contiguous=False)
    tifffile.tiffcomment(tmp_path / "x.tif", whole)
    (stack,) = open_stacks(tmp_path / "x.tif", "x")
    assert stack.channels == expected
    assert stack.plane(0, 0).shape == (Y, X, 2)


def test_a_damaged_plane_leaves_the_others(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "x.tif") as writer:
        for page in NUMBERS[0, :, 0]:
            writer.write(page, metadata=None, contiguous=False, compression="zlib", rowsperstrip=Y)
    with tifffile.TiffFile(tmp_path / "x.tif") as file:
        places = [page.dataoffsets[0] for page in file.pages]
        counts = [page.tags["StripByteCounts"].valueoffset for page in file.pages]
    whole = (tmp_path / "x.tif").read_bytes()
    cut = bytearray(whole)
    cut[counts[1] : counts[1] + 4] = struct.pack("<I", 1 << 30)
    garbled = bytearray(whole)
    garbled[places[1] + 2 : places[1] + 400] = bytes(398)
    for data in (cut, garbled):
        (tmp_path / "x.tif").write_bytes(data)
        (stack,) = open_stacks(tmp_path / "x.tif", "x")
        for depth in (0, 2):
            assert (pixels_of(stack.plane(0, depth))[..., 0] == NUMBERS[0, depth, 0]).all()
        with pytest.raises(ImageError, match=r"x, z 1\b"):
            pixels_of(stack.plane(0, 1))
        with pytest.raises(ImageError, match=r"x, z 1\b"):
            pixels_of(open_plane(stack, choose_planes([stack], PlaneOptions("max"))[0])[0])


def test_a_plane_that_the_file_lacks(tmp_path: Path) -> None:
    """As after an acquisition that was stopped."""
    ome(tmp_path / "x.ome.tif", "TZCYX")
    with tifffile.TiffFile(tmp_path / "x.ome.tif") as file:
        text = str(file.ome_metadata)
    tifffile.tiffcomment(tmp_path / "x.ome.tif", text.replace('SizeT="2"', 'SizeT="3"').encode())
    (stack,) = open_stacks(tmp_path / "x.ome.tif", "x")
    assert (stack.times, stack.depths) == (3, Z)
    assert (pixels_of(stack.plane(1, 2)) == np.moveaxis(NUMBERS[1, 2], 0, -1)).all()
    with pytest.raises(ImageError, match="Expected 2 pages of x, z 0, t 2; found 0"):
        stack.plane(2, 0)


def test_axes_that_are_not_read(tmp_path: Path) -> None:
    for axes, said in (("HYX", "times, depths and channels in x; found axes HYX"), ("QZYX", "found axes QZYX")):
        pixels = NUMBERS[0, :, 0] if axes == "HYX" else NUMBERS[:, :, 0]
        tifffile.imwrite(tmp_path / "x.tif", pixels, metadata={"axes": axes}, photometric="minisblack")
        with pytest.raises(ImageError, match=said):
            open_stacks(tmp_path / "x.tif", "x")
    tifffile.imwrite(tmp_path / "x.tif", NUMBERS[0, :, 0], volumetric=True, photometric="minisblack", tile=(1, 16, 16))
    with pytest.raises(ImageError, match="a page for each plane in x"):
        open_stacks(tmp_path / "x.tif", "x")


def test_imports_go_on_refusing_stacks(tmp_path: Path) -> None:
    for number, write in enumerate((plain, imagej, several)):
        write(tmp_path / f"{number}.tif")
        with pytest.raises(ImageError, match=r"Expected one image in x; found (2|a stack with axes)"):
            decode_image((tmp_path / f"{number}.tif").read_bytes(), "x")


def test_other_formats_are_stacks_of_one_plane(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "x.png"), NUMBERS[0, 0, 0])
    (stack,) = open_stacks(tmp_path / "x.png", "x")
    assert (stack.times, stack.depths, stack.name) == (1, 1, "x")
    assert (pixels_of(stack.plane(0, 0))[..., 0] == NUMBERS[0, 0, 0]).all()
