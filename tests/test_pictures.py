"""Resizing to a longest side, sheets of pictures, and the gallery of mistakes."""

import cv2
import numpy as np
import pytest

from nucleus.metrics.nuclei import find_mistakes
from nucleus.pictures import (
    MISTAKE_COLOURS,
    GalleryImage,
    contact_sheet,
    draw_gallery,
    draw_mistakes,
    resize_to_side,
)


@pytest.mark.parametrize(
    ("height", "width", "side", "enlarge", "shape"),
    [
        (300, 600, 200, False, (100, 200)),
        (600, 300, 200, False, (200, 100)),
        (1, 900, 30, False, (1, 30)),
        (50, 100, 200, False, (50, 100)),
        (50, 100, 200, True, (100, 200)),
        (200, 100, 200, True, (200, 100)),
    ],
)
def test_the_longer_side_is_brought_to_the_side(
    height: int, width: int, side: int, enlarge: bool, shape: tuple[int, int]
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = resize_to_side(picture, side, enlarge=enlarge)
    assert (resized.shape, resized.dtype) == ((*shape, 3), picture.dtype)
    assert (resized is picture) == (shape == (height, width))


def test_reduced_pictures_are_means_and_labels_stay_labels() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[::2] = 200
    assert (resize_to_side(picture, 2) == 100).all()
    labels = np.arange(49, dtype=np.int64).reshape(7, 7) * 10**10  # what OpenCV cannot resize
    assert resize_to_side(labels, 3, nearest=True).tolist() == labels[np.ix_([0, 2, 4], [0, 2, 4])].tolist()
    small = labels.astype(np.int32)
    for side in (2, 3, 5, 6):
        expected = cv2.resize(small, (side, side), interpolation=cv2.INTER_NEAREST)
        assert (resize_to_side(small, side, nearest=True) == expected).all()


def test_enlarged_pixels_stay_squares() -> None:
    picture = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    enlarged = resize_to_side(picture, 6, enlarge=True)
    assert enlarged[..., 0].tolist() == [[0, 0, 0, 255, 255, 255]] * 3


def test_a_sheet_has_rows_and_columns_on_white() -> None:
    black = np.zeros((10, 20, 3), np.uint8)
    sheet = contact_sheet([[black, black], [black]], side=40)
    assert sheet.shape == (2 * 44 + 4, 2 * 44 + 4, 3)
    assert (sheet[4:24, 4:44] == 0).all()
    assert (sheet[48:, 48:] == 255).all()


def test_mistakes_have_their_colours() -> None:
    truth, predicted = np.zeros((2, 20, 60), int)
    truth[2:8, 2:8], predicted[2:8, 2:8] = 1, 1  # found
    truth[2:8, 12:18] = 2  # missed
    predicted[2:8, 22:28] = 2  # extra
    truth[2:8, 32:35], truth[2:8, 35:38], predicted[2:8, 32:38] = 3, 4, 3  # merged
    truth[2:8, 42:48], predicted[2:8, 42:45], predicted[2:8, 45:48] = 5, 4, 5  # split
    mistakes = find_mistakes(truth, predicted)
    assert mistakes.counts == {"missed": 1, "extra": 1, "merged": 2, "split": 1}
    image = np.zeros((20, 60, 3), np.uint8)
    drawn = draw_mistakes(image, truth, predicted, mistakes)
    for column, name in ((2, "found"), (12, "missed"), (22, "extra"), (32, "merged"), (42, "split")):
        assert tuple(drawn[5, column]) == MISTAKE_COLOURS[name], name
    gallery = draw_gallery([GalleryImage("one", 0.5, image, truth, predicted)])
    shown = {tuple(colour) for colour in gallery.reshape(-1, 3)}
    assert set(MISTAKE_COLOURS.values()) <= shown
