"""Heat maps of plates: wells are where their names say, with the mean of their fields."""

import numpy as np
import pytest

from nucleus.predict.plates import draw_plate, plate_text, plates_of


def test_wells_have_the_mean_of_their_fields() -> None:
    """Plates are told apart by their folders, and other images are passed over."""
    names = {"a/p.zarr/B/3/0": 10, "a/p.zarr/B/3/1": 20, "a/p.zarr/A/3/0": 7, "b/p.zarr/A/3/0": 1, "a.tif": 9}
    found = plates_of([*names.items(), ("a/p.zarr/A/3/0", 8)])  # two planes of one image
    assert found == {"a/p": {("B", "3"): 15.0, ("A", "3"): 7.5}, "b/p": {("A", "3"): 1.0}}


def test_a_plate_as_text_has_the_numbers() -> None:
    head, columns, *rows = plate_text("p", {("A", "1"): 12.4, ("H", "12"): 803.0}).splitlines()
    assert "2 wells" in head
    assert columns.split() == [str(number) for number in range(1, 13)]
    assert [row.split() for row in rows] == [
        ["A", "12", *"." * 11],
        *([row, *"." * 12] for row in "BCDEFG"),
        ["H", *"." * 11, "803"],
    ]
    assert {columns.index("12") + 2, rows[0].index("12") + 2 + 4 * 11} == {len(rows[-1])}  # each below its column


def test_where_numbers_do_not_fit_digits_stand_for_them() -> None:
    wells = {("A", "1"): 10.0, ("AF", "48"): 1010.0, ("B", "2"): 910.0}
    head, tens, ones, *rows = plate_text("p", wells).splitlines()
    assert "from 0 = 10 to 9 = 1010" in head
    assert (tens.split()[-1], ones.split()) == ("4", [str(number % 10) for number in range(1, 49)])
    assert len(rows) == 32
    assert (rows[0].split()[1], rows[1].split()[2], rows[-1].split()[48]) == ("0", "8", "9")
    assert len(rows[-1]) <= 100


def coloured(picture: np.ndarray) -> np.ndarray:
    """Pixels of colour, as wells with a number are; not grey, black or white."""
    return np.ptp(picture.astype(int), axis=2) > 30


@pytest.mark.parametrize(
    ("wells", "rows", "columns", "side", "last"),
    [
        ({("A", "1"): 1.0, ("H", "12"): 5.0}, 8, 12, 56, (7, 11)),
        ({("A", "01"): 1.0, ("H", "13"): 5.0}, 16, 24, 40, (7, 12)),
        ({("A", "1"): 1.0, ("AF", "48"): 5.0}, 32, 48, 26, (31, 47)),
        ({("one", "left"): 1.0, ("two", "right"): 5.0}, 2, 2, 56, (1, 1)),
    ],
)
def test_wells_are_where_they_are_on_the_plate(
    wells: dict[tuple[str, str], float], rows: int, columns: int, side: int, last: tuple[int, int]
) -> None:
    picture = draw_plate("p", wells)
    assert picture.shape == (44 + side * rows + 40, 44 + side * columns + 110, 3)
    here = coloured(picture)[44 : 44 + side * rows, 44 : 44 + side * columns]
    cells = here.reshape(rows, side, columns, side).mean(axis=(1, 3)) > 0.5
    expected = np.zeros((rows, columns), bool)
    expected[0, 0] = expected[last] = True
    assert (cells == expected).all()


def test_one_number_is_drawn_too() -> None:
    assert coloured(draw_plate("p", {("A", "1"): 3.0})).any()
