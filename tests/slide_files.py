"""Whole slides as scanners write them: Aperio SVS, Hamamatsu NDPI, MIRAX and DICOM, each with a reduced level."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

__all__ = ["BACKGROUND", "FILL", "MPP", "reduced", "write_dicom", "write_mirax", "write_ndpi", "write_svs"]

Pixels = NDArray[np.uint8]
MPP = 0.25
FILL, BACKGROUND = 0xF0F0FF, (0xFF, 0xF0, 0xF0)
"""The colour of what was not scanned in MIRAX slides: as they store it (blue first), and as RGB."""
_APERIO = "Aperio Image Library v11.2.1 \r\n{width}x{height} [0,0 {width}x{height}] (256x256) JPEG/RGB Q=90"
_MIRAX_START = b"01.02" + b"ABCDEF0123456789ABCDEF0123456789"
_SLIDE_CLASS, _JPEG = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.840.10008.1.2.4.50"


def reduced(pixels: Pixels, step: int) -> Pixels:
    """Pixels with means of squares of `step` px."""
    height, width = pixels.shape[:2]
    return np.asarray(cv2.resize(pixels, (width // step, height // step), interpolation=cv2.INTER_AREA), np.uint8)


def write_svs(
    path: Path, pixels: Pixels, *, level: Pixels | None = None, compression: str | None = None, tiled: bool = True
) -> Path:
    """Write an Aperio slide with a thumbnail, a level (a fourth by default), a label and a macro image."""
    height, width = pixels.shape[:2]
    text = f"{_APERIO.format(width=width, height=height)}|AppMag = 40|MPP = {MPP:.4f}"
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None}
    shape = {"tile": (256, 256)} if tiled else {"rowsperstrip": 16}
    side = np.full((60, 90, 3), 200, np.uint8)
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, description=text, compression=compression, **shape, **options)
        file.write(side, description=f"{text} -> 90x60 - ", rowsperstrip=16, compression="jpeg", **options)
        small = reduced(pixels, 4) if level is None else level
        file.write(small, description=f"{text} -> level", compression=compression, **shape, **options)
        for kind, name in ((1, "label"), (9, "macro")):
            text = f"Aperio\r\n{name} 90x60"
            file.write(side, description=text, subfiletype=kind, rowsperstrip=16, compression="lzw", **options)
    return path


def write_ndpi(path: Path, pixels: Pixels) -> Path:
    """Write a Hamamatsu slide: levels of one JPEG each, and a macro image."""

    def tags(lens: float) -> list[tuple[Any, ...]]:
        numbers = [(tag, "i", 1, 0, False) for tag in (65422, 65423, 65424)]
        return [(65420, "H", 1, 1, False), (65421, "f", 1, lens, False), *numbers]

    per_cm = round(10_000 / MPP)
    with tifffile.TiffWriter(path) as file:
        for image, lens in ((pixels, 40.0), (reduced(pixels, 4), 10.0), (pixels[:64, :128], -1.0)):
            file.write(
                image,
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 95},
                rowsperstrip=image.shape[0],
                metadata=None,
                extratags=tags(lens),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
            )
    return path


def write_mirax(
    path: Path, pixels: Pixels, scanned: Callable[[int, int], bool] = lambda _row, _column: True, tile: int = 64
) -> Path:
    """Write a MIRAX slide of whole tiles, of which those are left out that were not scanned (row, column)."""
    folder = path.with_suffix("")
    folder.mkdir()
    path.write_bytes(imagecodecs.jpeg8_encode(pixels[:tile, :tile]))
    down, across = (side // tile for side in pixels.shape[:2])
    data, levels = bytearray(_MIRAX_START), []
    for step in (1, 2):
        image, records = reduced(pixels, step), []
        for row in range(0, down, step):
            for column in range(0, across, step):
                if scanned(row, column):
                    top, left = row // step * tile, column // step * tile
                    part = np.ascontiguousarray(image[top : top + tile, left : left + tile])
                    packed = imagecodecs.jpeg8_encode(part, level=95)
                    records.append((row * across + column, len(data), len(packed), 0))
                    data += packed
        levels.append(records)
    (folder / "Data0000.dat").write_bytes(data)
    (folder / "Index.dat").write_bytes(_mirax_index(levels))
    (folder / "Slidedat.ini").write_text(_mirax_text(down, across, tile))
    return path


def _mirax_index(levels: list[list[tuple[int, ...]]]) -> bytes:
    index = bytearray(_MIRAX_START)
    index += struct.pack("<ii", len(index) + 8, 0)
    table = len(index)
    index += bytes(4 * len(levels))
    for number, records in enumerate(levels):
        struct.pack_into("<i", index, table + 4 * number, len(index))
        index += struct.pack("<iiii", 0, len(index) + 8, len(records), 0)
        index += b"".join(struct.pack("<iiii", *record) for record in records)
    return bytes(index)


def _mirax_text(down: int, across: int, tile: int) -> str:
    general = (
        f"SLIDE_VERSION=01.02\nSLIDE_ID={_MIRAX_START[5:].decode()}\nIMAGENUMBER_X={across}\nIMAGENUMBER_Y={down}\n"
    )
    levels = "".join(f"HIER_0_VAL_{n}=ZoomLevel_{n}\nHIER_0_VAL_{n}_SECTION=LEVEL_{n}\n" for n in range(2))
    sections = "".join(
        f"[LEVEL_{n}]\nOVERLAP_X=0\nOVERLAP_Y=0\n"
        f"MICROMETER_PER_PIXEL_X={MPP * 2**n}\nMICROMETER_PER_PIXEL_Y={MPP * 2**n}\nIMAGE_FILL_COLOR_BGR={FILL}\n"
        f"DIGITIZER_WIDTH={tile}\nDIGITIZER_HEIGHT={tile}\nIMAGE_FORMAT=JPEG\n"
        f"IMAGE_CONCAT_FACTOR={n}\n"
        for n in range(2)
    )
    return (
        f"[GENERAL]\n{general}IMAGENUMBER_X={across}\nIMAGENUMBER_Y={down}\n[HIERARCHICAL]\nHIER_COUNT=1\nNONHIER_COUNT=0\n"
        f"INDEXFILE=Index.dat\nHIER_0_NAME=Slide zoom level\nHIER_0_COUNT=2\n{levels}"
        f"[DATAFILE]\nFILE_COUNT=1\nFILE_0=Data0000.dat\n{sections}"
    )


def write_dicom(folder: Path, pixels: Pixels, series: str = "1.2.3", *, levels: tuple[int, ...] = (1, 4)) -> Path:
    """Write a DICOM slide, a file a level; return the first file."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{series}-{number}.dcm" for number, _ in enumerate(levels)]
    for number, (file, step) in enumerate(zip(files, levels, strict=True), 1):
        file.write_bytes(_dicom(reduced(pixels, step), MPP * step, series, number, "RESAMPLED" if step > 1 else "NONE"))
    return files[0]


def _dicom(pixels: Pixels, mpp: float, series: str, number: int, kind: str, tile: int = 128) -> bytes:
    height, width = pixels.shape[:2]
    wide = np.pad(pixels, [(0, -height % tile), (0, -width % tile), (0, 0)])
    corners = ((y, x) for y in range(0, height, tile) for x in range(0, width, tile))
    tiles = (np.ascontiguousarray(wide[y : y + tile, x : x + tile]) for y, x in corners)
    frames = [imagecodecs.jpeg8_encode(part, level=95, outcolorspace="YCBCR") for part in tiles]
    frames = [frame + bytes(len(frame) % 2) for frame in frames]
    instance, spacing = f"{series}.{number}", f"{mpp / 1000:.6f}\\{mpp / 1000:.6f}"
    meta = b"".join(
        [
            _element(2, 1, b"OB", b"\0\1"), _element(2, 2, b"UI", _SLIDE_CLASS), _element(2, 3, b"UI", instance),
            _element(2, 0x10, b"UI", _JPEG), _element(2, 0x12, b"UI", "1.2.3.4"),
        ]
    )  # fmt: skip
    measures = _element(0x28, 0x30, b"DS", spacing)
    body = [
        _element(8, 8, b"CS", f"ORIGINAL\\PRIMARY\\VOLUME\\{kind}"), _element(8, 0x16, b"UI", _SLIDE_CLASS),
        _element(8, 0x18, b"UI", instance), _element(0x20, 0xE, b"UI", series),
        _element(0x20, 0x9311, b"CS", "TILED_FULL"), _element(0x28, 2, b"US", 3),
        _element(0x28, 4, b"CS", "YBR_FULL_422"), _element(0x28, 6, b"US", 0),
        _element(0x28, 8, b"IS", str(len(frames))), _element(0x28, 0x10, b"US", tile),
        _element(0x28, 0x11, b"US", tile), _element(0x28, 0x100, b"US", 8), _element(0x28, 0x101, b"US", 8),
        _element(0x28, 0x102, b"US", 7), _element(0x28, 0x103, b"US", 0), _element(0x48, 6, b"UL", width),
        _element(0x48, 7, b"UL", height),
        _element(0x5200, 0x9229, b"SQ", _item(_element(0x28, 0x9110, b"SQ", _item(measures)))),
    ]  # fmt: skip
    starts = np.cumsum([0, *(8 + len(frame) for frame in frames[:-1])]).astype("<u4").tobytes()
    items = _item(starts) + b"".join(map(_item, frames)) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    packed = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF) + items
    return bytes(128) + b"DICM" + _element(2, 0, b"UL", len(meta)) + meta + b"".join(body) + packed


def _element(group: int, element: int, kind: bytes, value: str | int | bytes) -> bytes:
    numbers = {b"US": "<H", b"UL": "<I"}
    data = value.encode() if isinstance(value, str) else value
    data = struct.pack(numbers[kind], data) if isinstance(data, int) else data
    data += (b"\0" if kind == b"UI" else b" ") * (len(data) % 2)
    size = struct.pack("<HI", 0, len(data)) if kind in {b"OB", b"SQ"} else struct.pack("<H", len(data))
    return struct.pack("<HH2s", group, element, kind) + size + data


def _item(data: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(data)) + data
