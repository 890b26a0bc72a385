"""Sheets of pictures for slides: rows of pictures with titles, on white."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from nucleus.data.images import RgbImage
from nucleus.predict.colours import MISTAKE_COLOURS
from nucleus.report.pictures import PictureFolder
from nucleus.report.shots import Scene
from nucleus.report.wording import plain
from nucleus.storage.files import atomic_path

__all__ = ["save_sheet"]

_DPI = 100
_WIDTH = 1920
_GAP = 10
_TITLE = 64
_CAPTION = 24
_LEGEND = 40
_SMALLEST_SIDE = 160


def save_sheet(
    path: Path, folder: PictureFolder, title: str, scenes: Sequence[Scene], across: int = 1, legend: bool = False
) -> None:
    """Write the pictures of scenes as one PNG, about 1,920 px wide.

    Args:
        path: The PNG.
        folder: Where the pictures are.
        title: Stands above all.
        scenes: Each becomes a part of a row; what was not kept stays white, and says so.
        across: Scenes a row.
        legend: Whether to explain the colours of mistakes.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = max((len(scene.shots) for scene in scenes), default=1)
    side = max(_SMALLEST_SIDE, (_WIDTH - _GAP) // (across * columns) - _GAP)
    top = _TITLE + (_LEGEND if legend else 0)
    head = (3 if columns > 2 else 2) * _CAPTION  # pairs of image and prediction need no captions
    row_height = side + head + 2 * _GAP
    width = across * columns * (side + _GAP) + _GAP
    height = top + -(-max(len(scenes), 1) // across) * row_height
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    writer = _Writer(figure, width, height)
    writer.write(_GAP, 20, plain(title), size=20, weight="bold")
    if legend:
        writer.legend(_TITLE)
    if not scenes:
        writer.write(_GAP, top, "no pictures were kept")
    for number, scene in enumerate(scenes):
        left = _GAP + number % across * columns * (side + _GAP)
        upper = top + number // across * row_height
        writer.write(left, upper, _fitting(scene.title, columns * side), weight="bold")
        writer.write(left, upper + _CAPTION, _fitting(scene.brief, columns * side))
        for place, shot in enumerate(scene.shots):
            x = left + place * (side + _GAP)
            if columns > 2:
                writer.write(x, upper + 2 * _CAPTION, _fitting(shot.caption, side))
            picture = folder.read(shot.key)
            if picture is None:
                writer.write(x, upper + head, "not kept")
            else:
                writer.paste(x, upper + head, _scaled(picture, side))
    with atomic_path(path) as beside:
        figure.savefig(beside, dpi=_DPI, facecolor="white")


class _Writer:
    """Puts text and pixels onto a figure at places counted from its upper left corner, px."""

    def __init__(self, figure: Any, width: int, height: int) -> None:
        self.figure = figure
        self.width = width
        self.height = height

    def write(self, x: int, y: int, text: str, size: float = 11, weight: str = "normal") -> None:
        """Write a line whose upper left corner is at (x, y)."""
        self.figure.text(
            x / self.width, 1 - y / self.height, text, fontsize=size, fontweight=weight, va="top", parse_math=False,
            fontfamily="DejaVu Sans",
        )  # fmt: skip

    def paste(self, x: int, y: int, picture: RgbImage) -> None:
        """Put a picture with its upper left corner at (x, y), pixel by pixel."""
        self.figure.figimage(picture, x, self.height - y - picture.shape[0], origin="upper")

    def legend(self, y: int) -> None:
        """The colours of mistakes, with their names."""
        for number, (name, colour) in enumerate(MISTAKE_COLOURS.items()):
            x = _GAP + 180 * number
            swatch = np.full((20, 36, 3), colour, np.uint8)
            swatch[[0, -1]] = swatch[:, [0, -1]] = 0
            self.paste(x, y, swatch)
            self.write(x + 46, y, name, size=13)


def _scaled(picture: RgbImage, side: int) -> RgbImage:
    """The picture, its longer side brought to `side` pixels; its own pixels stay squares with sharp edges."""
    times = -(-side // max(picture.shape[:2]))
    picture = np.repeat(np.repeat(picture, times, axis=0), times, axis=1)
    scale = side / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def _fitting(text: str, width: int) -> str:
    """As much of the text as fits into so many pixels, at 9 px a letter."""
    text, most = plain(text), max(8, width // 9)
    return text if len(text) <= most else f"{text[: most - 1]}…"
