"""Where a model fails, as a picture: images with their mistakes coloured."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

from nucleus.data.images import RgbImage
from nucleus.metrics.mistakes import Mistakes, find_mistakes
from nucleus.predict.colours import MISTAKE_COLOURS
from nucleus.predict.overlay import brightened, fitted

__all__ = ["GalleryImage", "draw_gallery", "draw_mistakes"]

_SIDE = 320
_GAP = 8
_LINE = 22
_SWATCH = 24
_ACROSS = 2


@dataclass(frozen=True)
class GalleryImage:
    """An image of the gallery.

    Attributes:
        title: What stands over it, before its mistakes.
        score: Its mAP.
        image: H x W x 3, uint8.
        truth: H x W, labels.
        predicted: H x W, labels.
    """

    title: str
    score: float
    image: RgbImage
    truth: NDArray[np.integer]
    predicted: NDArray[np.integer]


def draw_mistakes(
    image: RgbImage, truth: NDArray[np.integer], predicted: NDArray[np.integer], mistakes: Mistakes
) -> RgbImage:
    """A copy of the image with outlines.

    Of the predicted nuclei those that were found, the extra and the merged; of the true ones, the missed and the split:
    in `MISTAKE_COLOURS`.
    """
    drawn = image.copy()
    for labels, chosen, name in (
        (predicted, None, "found"),
        (predicted, mistakes.extra, "extra"),
        (predicted, mistakes.merged, "merged"),
        (truth, mistakes.missed, "missed"),
        (truth, mistakes.split, "split"),
    ):
        shown = labels if chosen is None else np.where(np.isin(labels, list(chosen)), labels, 0)
        drawn[find_boundaries(shown, mode="inner")] = MISTAKE_COLOURS[name]
    return drawn


def draw_gallery(images: Sequence[GalleryImage]) -> RgbImage:
    """Pairs of image and mistakes, two pairs a row, with a line of text over each and a legend at the top."""
    cell_width, cell_height = 2 * _SIDE + _GAP, _SIDE + _LINE
    rows = -(-len(images) // _ACROSS)
    sheet = np.full((_LINE + rows * (cell_height + _GAP), _ACROSS * (cell_width + 2 * _GAP), 3), 255, np.uint8)
    left = _GAP
    for name, colour in MISTAKE_COLOURS.items():
        cv2.rectangle(sheet, (left, 4), (left + _SWATCH, _LINE - 4), colour, cv2.FILLED)
        cv2.rectangle(sheet, (left, 4), (left + _SWATCH, _LINE - 4), (0, 0, 0))
        left += _SWATCH + _GAP
        left += _write(sheet, name, (left, _LINE - 6), (0, 0, 0)) + 2 * _GAP
    for number, item in enumerate(images):
        top = _LINE + number // _ACROSS * (cell_height + _GAP)
        left = _GAP + number % _ACROSS * (cell_width + 2 * _GAP)
        mistakes = find_mistakes(item.truth, item.predicted)
        title = f"{item.title}; {mistakes}"
        _write(sheet, title, (left, top + _LINE - 6), (0, 0, 0))
        bright = brightened(item.image)
        for i, picture in enumerate((bright, draw_mistakes(bright, item.truth, item.predicted, mistakes))):
            small = fitted(picture, _SIDE)
            place = (top + _LINE, left + i * (_SIDE + _GAP))
            sheet[place[0] : place[0] + small.shape[0], place[1] : place[1] + small.shape[1]] = small
    return sheet


def _write(sheet: RgbImage, text: str, place: tuple[int, int], colour: tuple[int, int, int]) -> int:
    """Write a line; return its width, px."""
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.45
    cv2.putText(sheet, text, place, font, size, colour, 1, cv2.LINE_AA)
    return int(cv2.getTextSize(text, font, size, 1)[0][0])
