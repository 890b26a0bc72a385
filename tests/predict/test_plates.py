"""Heat maps of plates: wells are where their names say, with the mean of their fields."""

import numpy as np
import pytest

from nucleus.data.zarr_plates import PlateField
from nucleus.predict.plates import draw_plate, wells_of


def test_wells_have_the_mean_of_their_fields() -> None:
    fields = [("B", "3", "0", 10), ("B", "3", "1", 20), ("A", "3", "0", 7)]
    found = wells_of((PlateField("p", row, column, field), nuclei) for row, column, field, nuclei in fields)
    assert found == {("B", "3"): 15.0, ("A", "3"): 7.0}


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
