"""Pictures of plates: the mean number of nuclei of each well's fields, as a heat map."""

import re
from collections import defaultdict
from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import RgbImage
from nucleus.data.zarr_plates import PlateField
from nucleus.pictures import write_text

__all__ = ["PLATE_ENDING", "draw_plate", "wells_of"]

PLATE_ENDING = ".plate.png"
_SIZES = ((8, 12), (16, 24), (32, 48))
"""Rows and columns of plates with 96, 384 and 1,536 wells."""
_CELL = {8: 56, 16: 40, 32: 26}
_MARGIN, _SCALE_WIDTH, _FOOT = 44, 110, 40
_BACKGROUND, _EMPTY, _TEXT = (255, 255, 255), (225, 225, 225), (40, 40, 40)
_LETTERS = 26

Wells = dict[tuple[str, str], float]
"""Mean number of nuclei by row and column of a well."""


def wells_of(fields: Iterable[tuple[PlateField, int]]) -> Wells:
    """Return the wells of one plate, from the numbers of nuclei of its fields (or of their planes)."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, nuclei in fields:
        found[place.row, place.column].append(nuclei)
    return {well: float(np.mean(counts)) for well, counts in found.items()}


def draw_plate(title: str, wells: Wells) -> RgbImage:
    """Draw a plate of 96, 384 or 1,536 wells, the smallest that has room, with a scale; grey wells have no number.

    Rows that are not letters, or columns that are not numbers, are drawn in their order, without empty wells between.

    Args:
        title: Name of the plate.
        wells: At least one well.
    """
    rows, columns = _axes(wells)
    side = _CELL.get(len(rows), _CELL[32] if len(rows) > 16 else _CELL[8])
    height, width = _MARGIN + side * len(rows) + _FOOT, _MARGIN + side * len(columns) + _SCALE_WIDTH
    picture = np.full((height, width, 3), _BACKGROUND, np.uint8)
    low, high = min(wells.values()), max(wells.values())
    for y, row in enumerate(rows):
        _write(picture, row, (10, _MARGIN + side * y + side // 2 + 5))
        for x, column in enumerate(columns):
            centre = (_MARGIN + side * x + side // 2, _MARGIN + side * y + side // 2)
            value = wells.get((row, column))
            colour = _EMPTY if value is None else _colour((value - low) / (high - low) if high > low else 0.5)
            cv2.circle(picture, centre, side // 2 - 2, colour, cv2.FILLED, cv2.LINE_AA)
    for x, column in enumerate(columns):
        if side > _CELL[32] or x % 2 == 0:
            _write(picture, column, (_MARGIN + side * x + side // 2 - 5 * len(column), _MARGIN - 10))
    _draw_scale(picture, (width - _SCALE_WIDTH + 20, _MARGIN), side * len(rows), (low, high))
    _write(picture, f"{title}: nuclei per image, {len(wells)} wells", (10, height - 14))
    return picture


def _axes(wells: Wells) -> tuple[list[str], list[str]]:
    """Return the names of the rows and of the columns of a whole plate."""
    rows, columns = {row for row, _ in wells}, {column for _, column in wells}
    letters, numbers = re.compile("[A-Z]{1,2}"), re.compile("[0-9]{1,2}")
    if all(map(letters.fullmatch, rows)) and all(map(numbers.fullmatch, columns)):
        digits = 2 if any(column.startswith("0") for column in columns) else 1
        for height, width in _SIZES:
            named = [_row_name(number) for number in range(height)], [f"{1 + n:0{digits}d}" for n in range(width)]
            if rows <= set(named[0]) and columns <= set(named[1]):
                return named
    return sorted(rows, key=_natural), sorted(columns, key=_natural)


def _row_name(number: int) -> str:
    first, last = divmod(number, _LETTERS)
    return (chr(ord("A") + first - 1) if first else "") + chr(ord("A") + last)


def _natural(name: str) -> tuple[int, str]:
    """Return a key that sorts numbers by their value, and `B` before `AA`."""
    return (int(name), name) if name.isascii() and name.isdigit() else (len(name), name)


def _colour(part: float) -> tuple[int, int, int]:
    """Return the RGB colour of a part, 0 to 1, of the scale."""
    value = np.array([[round(255 * part)]], np.uint8)
    blue, green, red = (int(each) for each in cv2.applyColorMap(value, cv2.COLORMAP_VIRIDIS)[0, 0])
    return red, green, blue


def _draw_scale(picture: NDArray[np.uint8], corner: tuple[int, int], length: int, ends: tuple[float, float]) -> None:
    left, top = corner
    for line in range(length):
        picture[top + line, left : left + 16] = _colour(1 - line / max(1, length - 1))
    low, high = ends
    for value, place in ((high, top + 10), (low, top + length)):
        _write(picture, f"{value:.4g}", (left + 22, place))


def _write(picture: NDArray[np.uint8], text: str, place: tuple[int, int]) -> None:
    write_text(picture, text.encode("ascii", "replace").decode(), place, _TEXT)  # OpenCV has no other letters
