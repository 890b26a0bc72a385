import cv2
import numpy as np
import pytest

from nucleus.data.images import decode_image, encode_png, read_stored
from nucleus.errors import ImageError


def png(pixels: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, pixels)[1].tobytes()


def test_channels_become_rgb() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (decode_image(png(grey), "g") == grey[..., np.newaxis]).all()
    bgr = np.zeros((2, 2, 3), np.uint8)
    bgr[..., 0] = 9  # blue in OpenCV's order
    assert (decode_image(png(bgr), "c") == (0, 0, 9)).all()
    bgra = np.dstack([bgr, np.full((2, 2), 7, np.uint8)])
    assert (decode_image(png(bgra), "a") == (0, 0, 9)).all()


def test_sixteen_bits_are_stretched_with_one_scale_for_all_channels() -> None:
    raw = np.zeros((100, 100, 3), np.uint16)
    raw[..., 2] = np.linspace(0, 4000, 10000).reshape(100, 100)  # red; 12 bits of 16
    rgb = decode_image(png(raw), "deep")
    assert rgb.dtype == np.uint8
    assert rgb[0, 0, 0] == 0
    assert rgb[-1, -1, 0] == 255
    assert rgb[..., 1:].max() == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello", "something else, or of a damaged image"),
        (b"\x89PNG\r\n", "damaged"),
        (b"\xda\xce\xbe\x0a" + bytes(40), "found Nikon ND2. Convert"),
        (b"\x70\0\0\0\x2c\x01\0\0\x2a" + bytes(40), "found Leica LIF. Convert"),
        (b"\xd0\xcf\x11\xe0" + bytes(40), "found Olympus OIB or Zeiss ZVI. Convert"),
    ],
)
def test_files_that_are_no_image(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_stored(data, "x.png")


def test_png_round_trip() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    assert (decode_image(encode_png(rgb), "r") == rgb).all()
    labels = np.array([[0, 60000]], np.uint16)
    assert (read_stored(encode_png(labels), "l").pixels[..., 0] == labels).all()
