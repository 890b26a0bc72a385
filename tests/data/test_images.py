import cv2
import numpy as np
import pytest

from nucleus.data.images import decode_image, decode_raw, encode_png, to_rgb8
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


def test_depth_without_range() -> None:
    assert (to_rgb8(np.full((3, 3), 200, np.uint16)) == 200).all()  # fits into 8 bits: kept
    assert (to_rgb8(np.full((3, 3), 5000, np.uint16)) == 0).all()
    assert (to_rgb8(np.array([[True, False]])) == [[[255] * 3, [0] * 3]]).all()
    with pytest.raises(ImageError, match="NaN"):
        to_rgb8(np.array([[np.nan, 1]], np.float32))
    with pytest.raises(ImageError, match="channels"):
        to_rgb8(np.zeros((2, 2, 5), np.uint8))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "empty"), (b"hello", "something else, or of a damaged image"), (b"\x89PNG\r\n", "damaged")],
)
def test_files_that_are_no_image(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_raw(data, "x.png")


def test_png_round_trip() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    assert (decode_image(encode_png(rgb), "r") == rgb).all()
    labels = np.array([[0, 60000]], np.uint16)
    assert (decode_raw(encode_png(labels), "l") == labels).all()
