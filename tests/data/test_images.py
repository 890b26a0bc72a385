import cv2
import numpy as np
import pytest

from nucleus.data.images import (
    decode_image,
    encode_png,
    labels_from_binary,
    labels_from_label_image,
    labels_from_masks,
    read_stored,
)
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
    [(b"", "empty"), (b"hello", "something else, or of a damaged image"), (b"\x89PNG\r\n", "damaged")],
)
def test_files_that_are_no_image(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_stored(data, "x.png")


def test_masks_merge_and_the_first_keeps_the_overlap() -> None:
    a, b, empty = (np.zeros((4, 4), np.uint8) for _ in range(3))
    a[:2], b[1:3] = 255, 1  # 0/255 and 0/1 masks
    labels = labels_from_masks([("a", png(a)), ("empty", png(empty)), ("b", png(b))], (4, 4))
    assert labels.dtype == np.uint16
    assert labels[:, 0].tolist() == [1, 1, 2, 0]


def test_binary_masks_become_components() -> None:
    mask = np.zeros((5, 5), np.uint8)
    mask[0, 0] = mask[1, 1] = mask[4, 4] = 255  # the first two touch by a corner
    labels = labels_from_binary(png(mask), "m", (5, 5))
    assert labels[0, 0] == labels[1, 1] != labels[4, 4]
    assert labels.max() == 2


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_label_images_are_numbered(suffix: str) -> None:
    stored = np.array([[0, 700], [30, 700]], np.uint16)
    assert labels_from_label_image(png(stored, suffix), "l", (2, 2)).tolist() == [[0, 2], [1, 2]]


def test_masks_that_do_not_fit() -> None:
    mask = png(np.zeros((4, 6), np.uint8))
    for read in (labels_from_binary, labels_from_label_image):
        with pytest.raises(ImageError, match=r"5 x 4 px .* found 6 x 4"):
            read(mask, "m.png", (4, 5))
    with pytest.raises(ImageError, match="one channel"):
        labels_from_label_image(png(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)), "m", (2, 2))
    with pytest.raises(ImageError, match="integers"):
        labels_from_label_image(png(np.array([[0.5, 1]], np.float32), ".tiff"), "m", (1, 2))


def test_png_round_trip() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    assert (decode_image(encode_png(rgb), "r") == rgb).all()
    labels = np.array([[0, 60000]], np.uint16)
    assert (read_stored(encode_png(labels), "l").pixels[..., 0] == labels).all()
