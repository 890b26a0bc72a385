"""Heat maps of plates, as pictures and as text: the mean number of nuclei of each well's fields."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import RgbImage
from nucleus.data.zarr_plates import plate_field
from nucleus.data.zarr_store import is_zarr
from nucleus.pictures import write_text
from nucleus.text import plural

__all__ = [
    "PLATE_ENDING",
    "PlateSums",
    "Wells",
    "add_to_plates",
    "draw_plate",
    "join_plates",
    "means_of_plates",
    "plate_text",
    "plates_of",
]

PLATE_ENDING = ".plate.png"
_SIZES = ((8, 12), (16, 24), (32, 48))
"""Rows and columns of plates with 96, 384 and 1,536 wells."""
_CELL = {8: 56, 16: 40, 32: 26}
_MARGIN, _SCALE_WIDTH, _FOOT = 44, 110, 40
_BACKGROUND, _EMPTY, _TEXT = (255, 255, 255), (225, 225, 225), (40, 40, 40)
_LETTERS = 26
_NONE = "."
_TEXT_WIDTH = 100
"""Characters of a line of text; where the numbers do not fit, digits stand for them."""

Wells = dict[tuple[str, str], float]
"""Mean number of nuclei by row and column of a well."""


PlateSums = dict[str, dict[tuple[str, str], tuple[int, int]]]
"""Number of nuclei and of images, by row and column of a well, of each plate, by its name."""


def plates_of(counts: Iterable[tuple[str, int]]) -> dict[str, Wells]:
    """Return the plates among images, from the numbers of nuclei of images (or of planes) and their names.

    Images that are not of a plate are passed over. A plate is called as the folder of its results.

    >>> plates_of([("a/p.zarr/B/3/0", 10), ("a/p.zarr/B/3/1", 20), ("a/b.tif", 5)])
    {'a/p': {('B', '3'): 15.0}}
    """
    sums: PlateSums = {}
    add_to_plates(sums, counts)
    return means_of_plates(sums)


def add_to_plates(sums: PlateSums, counts: Iterable[tuple[str, int]]) -> None:
    """Add images to sums, from the numbers of nuclei of images (or of planes) and their names; as `plates_of`."""
    for name, nuclei in counts:
        place = plate_field(name)
        if place is not None:
            folders = PurePosixPath(name).parts[:-3]  # without row, column and field
            plate = PurePosixPath(*(PurePosixPath(part).stem if is_zarr(part) else part for part in folders))
            _add(sums, str(plate), (place.row, place.column), (nuclei, 1))


def join_plates(sums: PlateSums, others: PlateSums) -> None:
    """Add sums over other images to sums."""
    for plate, wells in others.items():
        for well, more in wells.items():
            _add(sums, plate, well, more)


def _add(sums: PlateSums, plate: str, well: tuple[str, str], more: tuple[int, int]) -> None:
    wells = sums.setdefault(plate, {})
    nuclei, images = wells.get(well, (0, 0))
    wells[well] = nuclei + more[0], images + more[1]


def means_of_plates(sums: PlateSums) -> dict[str, Wells]:
    """Return the mean number of nuclei per image of each well of each plate."""
    return {plate: {well: nuclei / images for well, (nuclei, images) in wells.items()} for plate, wells in sums.items()}


def plate_text(title: str, wells: Wells) -> str:
    """Return a plate as lines of text: the rounded numbers, or where they do not fit, digits from 0 (the least) to 9.

    Wells without a number are dots.

    Args:
        title: Name of the plate.
        wells: At least one well.
    """
    rows, columns = _axes(wells)
    low, high = min(wells.values()), max(wells.values())
    cells = {well: f"{value:.0f}" for well, value in wells.items()}
    width = 1 + max(map(len, [*cells.values(), *columns]))
    head = f"{title}: nuclei per image, {plural(len(wells), 'well')}"
    if width * len(columns) > _TEXT_WIDTH:
        cells = {well: str(int(9 * _part(value, low, high))) for well, value in wells.items()}
        width = 2
        head += f", from 0 = {low:.4g} to 9 = {high:.4g}"
    first = max(map(len, rows))
    lines = [("", names) for names in _titles(columns, width)]
    lines += [(row, [cells.get((row, column), _NONE) for column in columns]) for row in rows]
    text = (f"{name:>{first}}{''.join(f'{cell:>{width}}' for cell in line)}".rstrip() for name, line in lines)
    return "\n".join([head, *text])


def _titles(columns: list[str], width: int) -> list[list[str]]:
    """Return lines with the names of the columns: one, or where they are too long for it, one for each character."""
    longest = max(map(len, columns))
    if longest < width:
        return [columns]
    return [[column.rjust(longest)[place] for column in columns] for place in range(longest)]


def _part(value: float, low: float, high: float) -> float:
    """Return where a value is on the scale, 0 to 1."""
    return (value - low) / (high - low) if high > low else 0.5


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
            colour = _EMPTY if value is None else _colour(_part(value, low, high))
            cv2.circle(picture, centre, side // 2 - 2, colour, cv2.FILLED, cv2.LINE_AA)
    for x, column in enumerate(columns):
        if side > _CELL[32] or x % 2 == 0:
            _write(picture, column, (_MARGIN + side * x + side // 2 - 5 * len(column), _MARGIN - 10))
    _draw_scale(picture, (width - _SCALE_WIDTH + 20, _MARGIN), side * len(rows), (low, high))
    _write(picture, f"{title}: nuclei per image, {plural(len(wells), 'well')}", (10, height - 14))
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
