"""Damaged image files end in our own errors: no crash, no hang, no line of a library, no memory beyond the pixels."""

import io
import os
import resource
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nucleus.data.images import open_pixels, read_stored
from nucleus.errors import ImageError

SECONDS = 10.0
"""What an image of so few pixels may take of the processor, however busy that is."""
HANGS = 900
"""Seconds after which one that waits is given up."""
MIB = 1 << 20
ROOM = 96 * MIB
"""What the process may grow by beside the pixels: the libraries that it loads, and what the allocator keeps."""

RGB = np.random.default_rng(0).integers(0, 256, (40, 48, 3)).astype(np.uint8)
GREY = RGB[..., 0]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


SEEDS = {
    "PNG": saved(Image.fromarray(RGB), "PNG"),
    "PNG with a palette": saved(Image.fromarray(RGB).quantize(16), "PNG"),
    "JPEG": saved(Image.fromarray(RGB), "JPEG"),
    "progressive JPEG": saved(Image.fromarray(GREY), "JPEG", progressive=True),
    "WebP": saved(Image.fromarray(RGB), "WEBP"),
    "lossless WebP": saved(Image.fromarray(RGB), "WEBP", lossless=True),
    "BMP": saved(Image.fromarray(RGB), "BMP"),
    "BMP with a palette": saved(Image.fromarray(RGB).quantize(16), "BMP"),
    "TIFF": tiff(GREY.astype(np.uint16)),
    "TIFF of LZW": tiff(GREY, compression="lzw", predictor=2, photometric="minisblack"),
    "TIFF of Deflate in tiles": tiff(RGB, compression="zlib", tile=(16, 16), photometric="rgb"),
    "TIFF of Zstandard": tiff(RGB, compression="zstd", photometric="rgb", planarconfig="separate", byteorder=">"),
    "TIFF of PackBits": tiff(GREY > 99, compression="packbits", photometric="miniswhite"),
    "TIFF of JPEG": tiff(RGB, compression="jpeg", tile=(16, 16), photometric="rgb"),
    "TIFF of 12 bits": tiff(GREY.astype(np.uint16), bitspersample=12, photometric="minisblack"),
    "BigTIFF": tiff(RGB.astype(np.float32), bigtiff=True, photometric="rgb"),
    "ImageJ": tiff(np.stack([GREY] * 2), imagej=True, metadata={"axes": "CYX"}),
    "OME-TIFF": tiff(GREY, ome=True, metadata={"axes": "YX", "PhysicalSizeX": 0.5}),
}
ODD = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """A file with some bytes replaced, most of them in the header, and perhaps cut or with a part missing."""
    changed = bytearray(data)
    header = st.integers(0, min(len(data), 400) - 4)
    odd = st.sampled_from(ODD).map(lambda value: struct.pack("<I", value))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.one_of(header, header, st.integers(0, len(data) - 4)))
        new = draw(st.one_of(st.binary(min_size=1, max_size=4), odd))
        changed[place : place + len(new)] = new
    start = draw(st.integers(0, len(data)))
    missing = draw(st.sampled_from([0, 0, 9, len(data)]))
    return bytes(changed[:start] + changed[start + missing :])


def tried(data: bytes) -> tuple[int, int]:
    """Decode in the process of its own; return bytes of the decoded pixels (0 if refused), and the peak of memory."""
    size, began = 0, time.process_time()
    try:
        size = open_pixels(data, "x").size
        read_stored(data, "x")
    except ImageError:
        pass
    assert time.process_time() - began < SECONDS
    return size, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


Decoder = Callable[[bytes], tuple[int, int]]


def silenced(log: str) -> None:
    """Send what native code writes to stderr to a file."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    """Runs `tried` in a process that a crash or a hang ends without ending the test."""
    log = tmp_path_factory.mktemp("fuzz") / "stderr"
    with ProcessPoolExecutor(1, get_context("spawn"), silenced, (str(log),)) as pool:
        pool.submit(tried, SEEDS["PNG"]).result()  # its imports may take longer than any image
        yield lambda data: pool.submit(tried, data).result(timeout=HANGS)
    assert log.read_text() == ""


@pytest.mark.parametrize("kind", SEEDS)
def test_damage_ends_in_our_errors(kind: str, decoder: Decoder) -> None:
    size, before = decoder(SEEDS[kind])
    assert size > 0

    @settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(damaged(SEEDS[kind]))
    def check(data: bytes) -> None:
        declared, peak = decoder(data)
        assert peak <= before + ROOM + 10 * declared

    check()


def test_sizes_that_no_file_holds_are_refused_before_memory_is_taken(
    decoder: Decoder,
) -> None:
    """Headers of 60,000 x 60,000 pixels in small files."""
    wide = struct.pack("<HHI", 4, 1, 60_000)
    files = [
        SEEDS["PNG"][:16] + struct.pack(">II", 60_000, 60_000) + SEEDS["PNG"][24:],
        SEEDS["BMP"][:18] + struct.pack("<ii", 60_000, 60_000) + SEEDS["BMP"][26:],
        *(
            SEEDS[kind]
            .replace(struct.pack("<HHII", 256, 4, 1, 48), struct.pack("<H", 256) + wide)
            .replace(struct.pack("<HHII", 257, 4, 1, 40), struct.pack("<H", 257) + wide)
            for kind in SEEDS
            if "TIFF" in kind
        ),
    ]
    _, before = decoder(SEEDS["TIFF"])
    for data in files:
        assert decoder(data)[1] <= before + ROOM


@pytest.mark.parametrize("kind", SEEDS)
def test_cut_files_are_refused(kind: str) -> None:
    """A copy that broke off is not an image with an empty end."""
    data = SEEDS[kind]
    for length in range(len(data) // 4, len(data) - 16, max(1, len(data) // 40)):
        try:
            found = read_stored(data[:length], "x")
        except ImageError:
            continue
        assert kind == "OME-TIFF", length  # its XML is at the end
        assert np.array_equal(found.pixels, read_stored(data, "x").pixels)
