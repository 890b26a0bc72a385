"""Every form of image file has the values that were written, in small and large files alike, or is refused by name.

The truth is the array that was written; where a codec changes values (JPEG), it is what tifffile or Pillow decodes.
"""

import io
import struct
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from nucleus.data.images import decode_image, open_pixels, read_stored
from nucleus.data.pixel_files import unpacked_part
from nucleus.errors import ImageError
from nucleus.predict import source as sources
from nucleus.predict.source import channel_count, open_source, stacks_of

HEIGHT, WIDTH = 50, 37
TILES = [{"tile": (32, 16)}, {"rowsperstrip": 19}, {"rowsperstrip": HEIGHT}]
WHOLE = slice(0, HEIGHT), slice(0, WIDTH)
PART = slice(11, 34), slice(20, 37)
FORMATS = [*product("<", TILES), (">", TILES[1])]
"""Byte order and layout."""
DEPTHS = ["bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]
COMPRESSIONS = [None, "lzw", "zlib", "packbits", "zstd"]

Pixels = NDArray[Any]


def pixels_of(depth: str, channels: int, seed: int = 0, bits: int | None = None) -> Pixels:
    """Pixels that use the whole range of their type, H x W x C."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(depth)
    shape = (HEIGHT, WIDTH, channels)
    if dtype.kind == "f":
        return rng.normal(size=shape).astype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) > 0.5
    highest = np.iinfo(dtype).max if bits is None else (1 << bits) - 1
    lowest = np.iinfo(dtype).min if bits is None else 0
    return rng.integers(lowest, highest, shape, dtype=dtype, endpoint=True)


def tiff(pixels: Pixels, *, planar: bool = False, **options: Any) -> bytes:
    """A TIFF of pixels H x W x C."""
    file = io.BytesIO()
    stored = pixels[..., 0] if pixels.shape[2] == 1 else np.moveaxis(pixels, 2, 0) if planar else pixels
    if pixels.shape[2] > 1:
        options["planarconfig"] = "separate" if planar else "contig"
    tifffile.imwrite(file, stored, metadata=None, **options)
    return file.getvalue()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def same(found: Pixels, expected: Pixels) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and bool((found == expected).all())


def check_all_ways(data: bytes, stored: Pixels, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare what masks and imports read, what predictions of small files read, and what those of large ones read."""
    image = read_stored(data, "x")
    assert same(image.pixels, stored)
    path = folder / "x.bin"
    path.write_bytes(data)
    file = open_pixels(path, "x")
    assert file.shape == stored.shape
    wanted = stored.astype(np.float32) if stored.dtype == np.float16 else stored
    for read in (file.read_part, unpacked_part(file)):
        assert read is None or same(read(*PART), stored[PART])
    monkeypatch.setattr(sources, "_WHOLE_PIXELS", 0)
    assert same(open_source(path, 0 if file.choose else None).read_channels(*WHOLE), wanted)


# Photometric interpretation and channels of the TIFFs: name, number of channels, options.
FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "grey": (1, {"photometric": "minisblack"}),
    "white is zero": (1, {"photometric": "miniswhite"}),
    "grey and alpha": (2, {"photometric": "minisblack", "extrasamples": ["unassalpha"]}),
    "five channels": (5, {"photometric": "minisblack"}),
    "RGB": (3, {"photometric": "rgb"}),
    "RGB and alpha": (4, {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
    "RGB and two more": (5, {"photometric": "rgb", "extrasamples": [0, 0]}),
}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("form", FORMS)
def test_tiffs_have_the_values_that_were_written(
    form: str, depth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels, options = FORMS[form]
    pixels = pixels_of(depth, channels)
    contiguous = [False] if channels == 1 or depth != "bool" else []  # tifffile writes them as no reader reads them
    for planar in [*contiguous, True] if channels > 1 else contiguous:
        for compression, (order, layout) in product(COMPRESSIONS[: 5 if channels == 1 else 3], FORMATS):
            data = tiff(pixels, planar=planar, byteorder=order, compression=compression, **layout, **options)
            check_all_ways(data, pixels, tmp_path, monkeypatch)
    (tmp_path / "x.bin").write_bytes(data)
    assert channel_count(stacks_of(tmp_path / "x.bin")) == channels
    facts = read_stored(data, "x")
    assert facts.colours == (3 if "RGB" in form else 1)
    assert facts.alpha == (channels - 1 if "alpha" in form else None)
    assert (facts.white_is_zero, facts.lossy, facts.pages) == (form == "white is zero", False, 1)


@pytest.mark.parametrize(("depth", "predictor"), [("u1", 2), ("u2", 2), ("u4", 2), ("f4", 3), ("f8", 3)])
def test_predictors(depth: str, predictor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = pixels_of(depth, 3)
    for planar, (order, layout), compression in product((False, True), FORMATS, ("lzw", "zlib")):
        options = {"photometric": "rgb", "predictor": predictor, "compression": compression, "byteorder": order}
        check_all_ways(tiff(pixels, planar=planar, **layout, **options), pixels, tmp_path, monkeypatch)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 10, 12, 14, 20])
def test_packed_bits(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = pixels_of("u1" if bits < 8 else "u2" if bits < 16 else "u4", 1, bits=bits)
    for photometric, layout in product(("minisblack", "miniswhite"), TILES):
        data = tiff(pixels, photometric=photometric, bitspersample=bits, **layout)
        check_all_ways(data, pixels, tmp_path, monkeypatch)
        assert read_stored(data, "x").bits == bits


@pytest.mark.parametrize("bigtiff", [False, True])
def test_palettes_of_tiff(bigtiff: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for depth, bits in (("u1", 8), ("u2", 16)):
        pixels = pixels_of(depth, 1, bits=bits)
        colours = np.random.default_rng(1).integers(0, 65536, (3, 1 << bits)).astype(np.uint16)
        data = tiff(pixels, photometric="palette", colormap=colours, bitspersample=bits, bigtiff=bigtiff)
        check_all_ways(data, pixels, tmp_path, monkeypatch)
        assert (read_stored(data, "x").palette == colours.T).all()
        seen = open_source(tmp_path / "x.bin").read(*WHOLE)
        assert same(seen, (colours.T >> 8).astype(np.uint8)[pixels[..., 0]])
        assert same(decode_image(data, "x"), seen)


@pytest.mark.parametrize("photometric", ["minisblack", "rgb", "ycbcr"])
def test_jpeg_within_tiff(photometric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = cv2.GaussianBlur(pixels_of("u1", 3), (0, 0), 3)[..., : 1 if photometric == "minisblack" else 3]
    for layout in TILES[:2]:
        rounded = {key: (32, 16) if key == "tile" else 16 for key in layout}
        data = tiff(smooth, photometric=photometric, compression="jpeg", **rounded)
        expected = tifffile.imread(io.BytesIO(data)).reshape(smooth.shape)
        assert photometric == "ycbcr" or np.abs(expected.astype(int) - smooth).max() < 60
        check_all_ways(data, expected, tmp_path, monkeypatch)
        assert read_stored(data, "x").lossy


@pytest.mark.parametrize("compression", ["webp", "jpeg2000", "jpegxl", "png", "lerc", "jpegxr"])
def test_image_codecs_within_tiff(compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = pixels_of("u1", 3)
    options = {"webp": {"lossless": True}, "jpegxl": {"lossless": True}, "jpeg2000": {"reversible": True}}
    for layout in ({"tile": (16, 32)}, {"rowsperstrip": HEIGHT}):
        data = tiff(
            pixels, photometric="rgb", compression=compression, compressionargs=options.get(compression), **layout
        )
        check_all_ways(data, pixels, tmp_path, monkeypatch)
        assert not read_stored(data, "x").lossy


@pytest.mark.parametrize("codec", ["group3", "group4", "tiff_ccitt"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_fax_codecs(codec: str, photometric: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    white = pixels_of("bool", 1)[..., 0]
    data = saved(Image.fromarray(white), "TIFF", compression=codec, tiffinfo={262: photometric})
    check_all_ways(data, (~white if photometric == 0 else white)[..., np.newaxis], tmp_path, monkeypatch)
    assert (decode_image(data, "x")[..., 0] == white * 255).all()


def test_white_is_zero_is_seen_inverted(tmp_path: Path) -> None:
    """Tables have the stored values; the network sees white as high, in every depth."""
    for depth, bits, inverted in [
        ("bool", 1, lambda v: ~v),
        ("u1", 8, lambda v: 255 - v),
        ("u2", 16, lambda v: 65535 - v),
        ("u2", 12, lambda v: 4095 - v),
        ("u4", 32, lambda v: 2**32 - 1 - v),
        ("i2", 16, lambda v: -1 - v),
        ("f4", 32, lambda v: -v),
    ]:
        pixels = pixels_of(depth, 1, bits=bits if depth == "u2" else None)
        (tmp_path / "x.tif").write_bytes(tiff(pixels, photometric="miniswhite", bitspersample=bits))
        for channel in (None, 0):
            source = open_source(tmp_path / "x.tif", channel)
            assert same(source.read(*WHOLE), inverted(pixels))
            assert same(source.read_channels(*WHOLE), pixels)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: Pixels, bits: int, colour: int, *more: bytes, adam7: bool = False) -> bytes:
    """A PNG made by hand of values H x W x C: of few bits, or interlaced."""

    def lines(part: Pixels) -> bytes:
        if bits == 16:
            packed = part.astype(">u2").reshape(len(part), -1).view(np.uint8)
        else:
            wide = np.unpackbits(part.astype(np.uint8).reshape(len(part), -1, 1), axis=2)[..., 8 - bits :]
            packed = np.packbits(wide.reshape(len(part), -1), axis=1)
        return np.pad(packed, ((0, 0), (1, 0))).tobytes()

    starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    passes = [values[y::down, x::across] for y, x, down, across in starts] if adam7 else [values]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, int(adam7))
    body = zlib.compress(b"".join(map(lines, passes)))
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("adam7", [False, True])
@pytest.mark.parametrize(
    ("colour", "bits"),
    [*product((0,), (1, 2, 4, 8, 16)), *product((3,), (1, 2, 4, 8)), *product((2, 4, 6), (8, 16))],
)
def test_pngs(colour: int, bits: int, adam7: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    pixels = pixels_of("bool" if bits == 1 else "u1" if bits <= 8 else "u2", channels, bits=bits)
    palette = np.random.default_rng(2).integers(0, 256, (1 << min(bits, 8), 3)).astype(np.uint8)
    transparent = {0: b"\0\1", 2: b"\0\1\0\2\0\3", 3: b"\0\7"}  # a transparent colour is no channel
    more = [chunk(b"PLTE", palette.tobytes())] if colour == 3 else []
    more += [chunk(b"tRNS", transparent[colour])] if colour in transparent else []
    data = png(pixels, bits, colour, *more, adam7=adam7)
    check_all_ways(data, pixels, tmp_path, monkeypatch)
    image = read_stored(data, "x")
    assert (image.colours, image.alpha) == (3 if channels > 2 else 1, channels - 1 if channels in (2, 4) else None)
    seen = open_source(tmp_path / "x.bin").read(*WHOLE)
    if colour == 3:
        assert same(seen, palette[pixels[..., 0].astype(int)])
    elif 1 < bits < 8:
        assert same(seen, pixels * (255 // ((1 << bits) - 1)))
    else:
        assert same(seen, pixels[..., : image.colours])
    if bits <= 8 and not (adam7 and colour == 3):
        reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., :3]
        assert same(decode_image(data, "x"), reference)


def test_jpegs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = cv2.GaussianBlur(pixels_of("u1", 3), (0, 0), 3)
    for image, progressive, subsampling in product(
        (Image.fromarray(smooth), Image.fromarray(smooth[..., 0])), (False, True), (0, 2)
    ):
        data = saved(image, "JPEG", quality=92, progressive=progressive, subsampling=subsampling)
        expected = np.asarray(Image.open(io.BytesIO(data))).reshape(HEIGHT, WIDTH, -1)
        check_all_ways(data, expected, tmp_path, monkeypatch)
        assert read_stored(data, "x").lossy
    deep = imagecodecs.jpeg8_encode(cv2.GaussianBlur(pixels_of("u2", 1, bits=12), (0, 0), 3), bitspersample=12)
    expected = imagecodecs.jpeg8_decode(deep).reshape(HEIGHT, WIDTH, 1)
    check_all_ways(deep, expected, tmp_path, monkeypatch)
    assert read_stored(deep, "x").bits == 12


def test_webps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for channels, lossless in product((3, 4), (True, False)):
        data = saved(Image.fromarray(pixels_of("u1", channels)), "WEBP", lossless=lossless, exact=True)
        expected = np.asarray(Image.open(io.BytesIO(data)))
        check_all_ways(data, expected, tmp_path, monkeypatch)
        image = read_stored(data, "x")
        assert (image.colours, image.alpha, image.lossy) == (3, 3 if channels == 4 else None, not lossless)


def test_bmps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colour = Image.fromarray(pixels_of("u1", 3))
    for mode in ("1", "L", "RGB"):
        expected = np.asarray(colour.convert(mode)).reshape(HEIGHT, WIDTH, -1)
        check_all_ways(saved(colour.convert(mode), "BMP"), expected, tmp_path, monkeypatch)
    quantized = colour.quantize(16)
    data = saved(quantized, "BMP")
    check_all_ways(data, np.asarray(quantized)[..., np.newaxis], tmp_path, monkeypatch)
    assert (decode_image(data, "x") == np.asarray(quantized.convert("RGB"))).all()
    rgba = pixels_of("u1", 4)
    header = struct.pack("<IiiHHIIiiII", 108, WIDTH, -HEIGHT, 1, 32, 3, 0, 0, 0, 0, 0)  # from the top
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(108 - 56)
    top_down = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 108) + header + rgba[..., [2, 1, 0, 3]].tobytes()
    check_all_ways(top_down, rgba, tmp_path, monkeypatch)
    assert read_stored(top_down, "x").alpha == 3


def short_tag(number: int, value: int) -> bytes:
    return struct.pack("<HHII", number, 3, 1, value)


def rle_bmp() -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 8, 1, 4, 0, 0, 1, 0) + bytes(4)
    return b"BM" + struct.pack("<IHHI", 62, 0, 0, 58) + header + bytes(4)


REFUSED = {
    "CMYK inks": [
        tiff(pixels_of("u1", 4), photometric="separated"),
        saved(Image.fromarray(pixels_of("u1", 3)).convert("CMYK"), "JPEG"),
    ],
    "complex numbers": [tiff(pixels_of("f4", 1).astype(np.complex64), photometric="minisblack")],
    "CIELAB": [tiff(pixels_of("u1", 3), photometric="cielab")],
    "LOGLUV": [tiff(pixels_of("u2", 3), photometric="logluv")],
    "mosaic of a camera": [tiff(pixels_of("u2", 1), photometric="cfa")],
    "YCBCR": [tiff(pixels_of("u1", 3), photometric="ycbcr", subsampling=(1, 1))],
    "compression NEXT": [tiff(pixels_of("u1", 1)).replace(short_tag(259, 1), short_tag(259, 32766))],
    "RLE8": [rle_bmp()],
    "GIF": [saved(Image.fromarray(pixels_of("u1", 1)[..., 0]), "GIF")],
    "animation of 2 frames": [
        saved(Image.new("RGB", (9, 9)), kind, save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])
        for kind in ("PNG", "WEBP")
    ],
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_read_is_named(said: str, tmp_path: Path) -> None:
    for data in REFUSED[said]:
        (tmp_path / "x.bin").write_bytes(data)
        with pytest.raises(ImageError, match=said):
            decode_image(data, "x")
        with pytest.raises(ImageError, match=said):
            open_source(tmp_path / "x.bin")


def pages(*written: tuple[Pixels, dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for pixels, options in written:
            writer.write(pixels, metadata=None, **options)
    return file.getvalue()


def test_the_main_page_is_taken(tmp_path: Path) -> None:
    main = pixels_of("u2", 1)[..., 0]
    small = main[::4, ::4].copy()
    colour = np.dstack([small >> 8] * 3).astype(np.uint8)
    files = [
        pages((small, {"subfiletype": 1}), (main, {})),
        pages((main, {}), (colour, {"subfiletype": 1, "photometric": "rgb"})),
        pages((main, {"tile": (16, 16)}), (main[::2, ::2].copy(), {"subfiletype": 1}), (small, {"subfiletype": 1})),
        pages((main, {"subifds": 1}), (small, {"subfiletype": 1})),
        pages((main, {}), (main > 9, {"subfiletype": 4})),
    ]
    for data in files:
        assert same(read_stored(data, "x").pixels[..., 0], main)
        assert read_stored(data, "x").pages == 1
        (tmp_path / "x.tif").write_bytes(data)
        assert same(open_source(tmp_path / "x.tif").read(*WHOLE)[..., 0], main)
    several = pages((main, {}), (main, {}), (small, {"subfiletype": 1}))
    assert read_stored(several, "x").pages == 2
    with pytest.raises(ImageError, match="stack with axes IYX"):
        decode_image(several, "x")


def test_parts_of_an_image_in_several_files_are_told(tmp_path: Path) -> None:
    plane = pixels_of("u1", 1)[..., 0]
    names = ("a.ome.tif", "b.ome.tif")
    places = "".join(
        f'<TiffData FirstC="{number}" IFD="0" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{name}</UUID></TiffData>'
        for number, name in enumerate(names)
    )
    for name in names:
        xml = (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:{name}"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" '
            f'SizeX="{WIDTH}" SizeY="{HEIGHT}" SizeC="2" SizeZ="1" SizeT="1">{places}</Pixels></Image></OME>'
        )
        (tmp_path / name).write_bytes(tiff(plane[..., np.newaxis], description=xml))
    for name in names:
        source = open_source(tmp_path / name, channel=1)
        whole = slice(0, source.height), slice(0, source.width)
        assert source.read_channels(*whole).shape[2] == len(names)
        with pytest.raises(ImageError, match=name):
            decode_image((tmp_path / name).read_bytes(), name)


def oriented(pixels: Pixels, orientation: int) -> dict[str, bytes]:
    """One image in each format, with a tag that tells viewers to turn it."""
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(pixels)
    return {
        "TIFF": tiff(pixels[..., np.newaxis], extratags=[(274, "H", 1, orientation, True)]),
        "16 bits": tiff(pixels[..., np.newaxis].astype(np.uint16), extratags=[(274, "H", 1, orientation, True)]),
        "PNG": saved(image, "PNG", exif=exif),
        "JPEG": saved(image, "JPEG", exif=exif, quality=100),
        "WebP": saved(image.convert("RGB"), "WEBP", exif=exif, lossless=True),
    }


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 40))
def test_no_orientation_turns_pixels(orientation: int, height: int, width: int) -> None:
    pixels = np.add.outer(np.arange(height) * 3, np.arange(width)).astype(np.uint8)
    for data in oriented(pixels, orientation).values():
        image = read_stored(data, "x")
        assert image.orientation == orientation
        assert image.pixels.shape[:2] == (height, width)
        assert np.abs(image.pixels[..., 0].astype(int) - pixels).max() <= 3


def test_large_files_are_not_turned_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.add.outer(np.arange(HEIGHT) * 3, np.arange(WIDTH)).astype(np.uint8)
    monkeypatch.setattr(sources, "_WHOLE_PIXELS", 0)
    for data in oriented(pixels, 6).values():
        (tmp_path / "x.bin").write_bytes(data)
        found = open_source(tmp_path / "x.bin").read(*WHOLE)[..., 0].astype(int)
        assert np.abs(found - pixels).max() <= 3


@given(st.integers(1, 32), st.sampled_from(["minisblack", "miniswhite"]), st.integers(0, 99))
def test_every_number_of_bits(bits: int, photometric: str, seed: int) -> None:
    depth = "bool" if bits == 1 else "u1" if bits <= 8 else "u2" if bits <= 16 else "u4"
    pixels = pixels_of(depth, 1, seed, None if bits == 1 else bits)
    data = tiff(pixels, photometric=photometric, bitspersample=bits)
    assert same(read_stored(data, "x").pixels, pixels)


def test_the_image_in_the_alpha_channel_is_named(tmp_path: Path) -> None:
    alpha = pixels_of("u1", 1)[..., 0]
    path = tmp_path / "x.png"
    path.write_bytes(saved(Image.fromarray(np.dstack([np.zeros_like(alpha)] * 3 + [alpha])), "PNG"))
    for read in (lambda: open_source(path), lambda: decode_image(path.read_bytes(), "x")):
        with pytest.raises(ImageError, match="channel 3"):
            read()
    assert (open_source(path, channel=3).read(*WHOLE)[..., 0] == alpha).all()


def test_full_disks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(saved(Image.fromarray(pixels_of("u1", 3)), "PNG"))
    monkeypatch.setattr(sources, "_WHOLE_PIXELS", 0)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ImageError, match=r"5,550 free bytes in .* No space left on device.* TMPDIR"):
        open_source(path).read(*WHOLE)


def test_wrong_sums_of_png_are_told() -> None:
    data = bytearray(saved(Image.fromarray(pixels_of("u1", 3)), "PNG"))
    data[data.index(b"IEND") - 5] ^= 1  # the last byte of the sum of the chunk before
    with pytest.raises(ImageError, match="wrong sum"):
        read_stored(bytes(data), "x")
