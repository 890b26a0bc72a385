"""Pictures of images and their nuclei: outlines, mistakes, sheets and galleries; resizing to a longest side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.names import Kind
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset
from nucleus.data.images import RgbImage
from nucleus.data.reader import images_of_split
from nucleus.metrics.nuclei import Mistakes, find_mistakes

__all__ = [
    "CYAN",
    "MISTAKE_COLOURS",
    "YELLOW",
    "GalleryImage",
    "brightened",
    "contact_sheet",
    "draw_gallery",
    "draw_mistakes",
    "draw_outlines",
    "draw_overlay",
    "example_sheet",
    "resize_to_side",
    "write_text",
]

MISTAKE_COLOURS = {
    "found": (64, 255, 190),
    "missed": (255, 0, 0),
    "extra": (255, 255, 0),
    "merged": (255, 0, 190),
    "split": (0, 64, 255),
}
"""RGB colours of outlines by the result for a nucleus; see `nucleus.metrics.nuclei.Mistakes`.

Any two differ by at least 41 in CIELAB, also for people who confuse red with green or blue with yellow (simulated
after Machado et al. 2009, https://doi.org/10.1109/TVCG.2009.113).
"""
YELLOW = (255, 220, 0)
CYAN = (0, 220, 255)
_SHEET_GAP = 4
_GALLERY_SIDE = 320
_GALLERY_GAP = 8
_TEXT_LINE = 22
_SWATCH = 24
_ACROSS = 2
_CORNER_GAP = 4
_FONT, _FONT_SIZE = cv2.FONT_HERSHEY_SIMPLEX, 0.45


def draw_outlines(image: RgbImage, labels: NDArray[np.integer], colour: tuple[int, int, int] = YELLOW) -> RgbImage:
    """Return a copy of an image (H x W x 3) with the inner outline of each label (H x W) in `colour`, RGB."""
    drawn = image.copy()
    drawn[_inner_boundaries(labels)] = colour
    return drawn


def _inner_boundaries(labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return the pixels of labels that touch another label or the background with a side."""
    found = np.zeros(labels.shape, np.bool_)
    for first, second in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = labels[first] != labels[second]
        found[first] |= differs
        found[second] |= differs
    found &= labels != 0
    return found


def draw_overlay(image: RgbImage, labels: NDArray[np.integer], diameter: float | None, every: int = 1) -> RgbImage:
    """Return a copy of an image with its nuclei outlined; a circle in the lower left corner shows their diameter.

    Args:
        image: Image, H x W x 3, reduced by the factor `every`.
        labels: Its labels, H x W, 0 background.
        diameter: Median diameter of the nuclei before the reduction, px; None for no circle. The circle is left out
            too if it does not fit.
        every: Factor by which the image was reduced.
    """
    drawn = draw_outlines(image, labels)
    if diameter is not None:
        _draw_diameter(drawn, diameter / every, f"{diameter:.1f} px")
    return drawn


def _draw_diameter(image: RgbImage, diameter: float, text: str) -> None:
    """Draw, in place, a circle of a diameter, with a text beside it if there is room."""
    radius = max(1, round(diameter / 2))
    height, width = image.shape[:2]
    centre = (_CORNER_GAP + radius, height - 1 - _CORNER_GAP - radius)
    if 2 * (radius + _CORNER_GAP) > min(height, width):
        return
    cv2.circle(image, centre, radius, CYAN, 1, cv2.LINE_AA)
    left = centre[0] + radius + _CORNER_GAP
    if left + _CORNER_GAP + _text_width(text) <= width and height >= 2 * _TEXT_LINE:
        write_text(image, text, (left, height - 1 - _CORNER_GAP), CYAN)


def contact_sheet(rows: list[list[RgbImage]], side: int = 256) -> RgbImage:
    """Return pictures arranged in rows on white, each resized to a longest side of `side` pixels."""
    columns = max(len(row) for row in rows)
    step = side + _SHEET_GAP
    sheet = np.full((len(rows) * step + _SHEET_GAP, columns * step + _SHEET_GAP, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            small = resize_to_side(picture, side, enlarge=True)
            top, left = _SHEET_GAP + r * step, _SHEET_GAP + c * step
            sheet[top : top + small.shape[0], left : left + small.shape[1]] = small
    return sheet


def brightened(image: RgbImage) -> RgbImage:
    """Return the image for display, stretched to the full range if it is dark."""
    high = max(1.0, float(np.percentile(image, 99.8)))
    return np.asarray(np.clip(image * max(1.0, 255 / high), 0, 255), np.uint8)


def resize_to_side(pixels: NDArray[Any], side: int, *, enlarge: bool = False, nearest: bool = False) -> NDArray[Any]:
    """Return a picture (H x W x 3) or labels (H x W), resized so that the longer side has `side` pixels.

    Args:
        pixels: Picture or labels of any depth; returned itself if its size is right.
        side: Longer side of the result, px.
        enlarge: Whether to enlarge smaller pictures; pixels then become squares with sharp edges.
        nearest: Whether to take the nearest pixel, as labels need, instead of the mean over an area.
    """
    height, width = pixels.shape[:2]
    longest = max(height, width)
    if longest == side or (longest < side and not enlarge):
        return pixels
    rows, columns = (max(1, round(length * side / longest)) for length in (height, width))
    if nearest or longest < side:
        return pixels[np.ix_(np.arange(rows) * height // rows, np.arange(columns) * width // columns)]
    return np.asarray(cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_AREA))


def example_sheet(dataset: Dataset, cache: ShardCache, per_kind: int = 2) -> RgbImage:
    """Return a sheet of up to `per_kind` training images of each kind, each beside a copy with its labels outlined."""
    found: dict[Kind, int] = {}
    rows = []
    for sample in images_of_split(dataset, "train", cache):
        found[sample.kind] = found.get(sample.kind, 0) + 1
        if found[sample.kind] <= per_kind:
            rows.append([sample.image, draw_outlines(sample.image, sample.labels, CYAN)])
        if len(rows) == per_kind * len(Kind):
            break
    return contact_sheet(rows)


@dataclass(frozen=True)
class GalleryImage:
    """An image of the gallery.

    Attributes:
        title: Text above the image, followed by its mistakes.
        score: mAP of the prediction.
        image: Image, H x W x 3, uint8.
        truth: True labels, H x W, 0 background.
        predicted: Predicted labels, H x W, 0 background.
    """

    title: str
    score: float
    image: RgbImage
    truth: NDArray[np.integer]
    predicted: NDArray[np.integer]


def draw_mistakes(
    image: RgbImage, truth: NDArray[np.integer], predicted: NDArray[np.integer], mistakes: Mistakes
) -> RgbImage:
    """Return a copy of an image with outlines in `MISTAKE_COLOURS`.

    Predicted nuclei are outlined as found, extra or merged, true nuclei as missed or split.

    Args:
        image: Image, H x W x 3, uint8.
        truth: True labels, H x W, 0 background.
        predicted: Predicted labels, H x W, 0 background.
        mistakes: Mistakes of the prediction, from `find_mistakes`.
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
        drawn[_inner_boundaries(shown)] = MISTAKE_COLOURS[name]
    return drawn


def draw_gallery(images: Sequence[GalleryImage]) -> RgbImage:
    """Return a sheet of pairs of image and mistakes: two pairs per row, each below a title, with a legend on top."""
    cell_width, cell_height = 2 * _GALLERY_SIDE + _GALLERY_GAP, _GALLERY_SIDE + _TEXT_LINE
    rows = -(-len(images) // _ACROSS)
    sheet = np.full(
        (_TEXT_LINE + rows * (cell_height + _GALLERY_GAP), _ACROSS * (cell_width + 2 * _GALLERY_GAP), 3), 255, np.uint8
    )
    left = _GALLERY_GAP
    for name, colour in MISTAKE_COLOURS.items():
        cv2.rectangle(sheet, (left, 4), (left + _SWATCH, _TEXT_LINE - 4), colour, cv2.FILLED)
        cv2.rectangle(sheet, (left, 4), (left + _SWATCH, _TEXT_LINE - 4), (0, 0, 0))
        left += _SWATCH + _GALLERY_GAP
        left += write_text(sheet, name, (left, _TEXT_LINE - 6), (0, 0, 0)) + 2 * _GALLERY_GAP
    for number, item in enumerate(images):
        top = _TEXT_LINE + number // _ACROSS * (cell_height + _GALLERY_GAP)
        left = _GALLERY_GAP + number % _ACROSS * (cell_width + 2 * _GALLERY_GAP)
        mistakes = find_mistakes(item.truth, item.predicted)
        title = f"{item.title}; {mistakes}"
        write_text(sheet, title, (left, top + _TEXT_LINE - 6), (0, 0, 0))
        bright = brightened(item.image)
        for i, picture in enumerate((bright, draw_mistakes(bright, item.truth, item.predicted, mistakes))):
            small = resize_to_side(picture, _GALLERY_SIDE, enlarge=True)
            place = (top + _TEXT_LINE, left + i * (_GALLERY_SIDE + _GALLERY_GAP))
            sheet[place[0] : place[0] + small.shape[0], place[1] : place[1] + small.shape[1]] = small
    return sheet


def write_text(sheet: RgbImage, text: str, place: tuple[int, int], colour: tuple[int, int, int]) -> int:
    """Write a line of text; return its width in pixels."""
    cv2.putText(sheet, text, place, _FONT, _FONT_SIZE, colour, 1, cv2.LINE_AA)
    return _text_width(text)


def _text_width(text: str) -> int:
    return int(cv2.getTextSize(text, _FONT, _FONT_SIZE, 1)[0][0])
