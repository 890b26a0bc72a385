"""Layers of nuclei and changes of them: pixels, outlines, and what the server refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nucleus.errors import ImageError, UsageError
from nucleus.page.layers import (
    Changes,
    LayerWriter,
    NucleusShape,
    changed_labels,
    filled_shape,
    new_layer,
    packed_outlines,
    parts_of,
    simplified,
)
from nucleus.predict.measurement import Frame, MeasuredPart
from nucleus.predict.outlines import outlines_of

SIZE = (60, 80)
FRAME = Frame("a.png", SIZE)


def square(label: int, left: float, top: float, side: float = 10) -> NucleusShape:
    right, bottom = left + side, top + side
    return NucleusShape(label=label, rings=((left, top, right, top, right, bottom, left, bottom),))


def labels_with(*boxes: tuple[int, int, int]) -> NDArray[np.int32]:
    labels = np.zeros(SIZE, np.int32)
    for label, left, top in boxes:
        labels[top : top + 10, left : left + 10] = label
    return labels


def unpacked(data: bytes) -> dict[int, list[list[int]]]:
    """Read packed outlines as `server.js` does."""
    values, found, at = np.frombuffer(data, "<i4").tolist(), {}, 0
    while at < len(values):
        label, rings, at = values[at], [], at + 2
        for _ in range(values[at - 1]):
            points = values[at]
            rings.append(values[at + 1 : at + 1 + 2 * points])
            at += 1 + 2 * points
        found[label] = rings
    return found


def test_a_layer_has_what_was_found(tmp_path: Path) -> None:
    labels = labels_with((2, 5, 5), (9, 40, 30))
    numbered, rows = np.where(labels == 9, 2, labels > 0).astype(np.int32), [{"label": 2}, {"label": 9}]
    layer = new_layer(tmp_path / "0-found", FRAME, labels, [MeasuredPart(FRAME, numbered, rows)])
    assert np.array_equal(layer.labels, labels)
    assert layer.rows == rows
    outlines = unpacked(layer.outlines)
    assert sorted(outlines) == [2, 9]
    for label, rings in outlines.items():
        shape = NucleusShape(label=label, rings=tuple(tuple(value / 2 for value in ring) for ring in rings))
        region, pixels = filled_shape(shape, SIZE)
        assert np.array_equal(pixels, labels[region.rows, region.columns] == label)
    with pytest.raises(UsageError):
        new_layer(tmp_path / "x", Frame("a.png", (1, 1)), labels, [])


def test_changes_remove_reshape_and_add(tmp_path: Path) -> None:
    labels = labels_with((1, 0, 0), (2, 20, 0), (3, 40, 0))
    changes = Changes(removed=(1,), shapes=(square(2, 21, 5, 4), square(50, 0, 40)))
    result, shapes = changed_labels(labels, changes, tmp_path)
    assert {int(label): int((result.labels == label).sum()) for label in np.unique(result.labels)} == {
        0: 4800 - 100 - 16 - 100, 2: 16, 3: 100, 50: 100,
    }  # fmt: skip
    assert (result.count, result.pixels) == (50, 216)
    assert shapes == list(changes.shapes)
    assert int((labels > 0).sum()) == 300  # a layer is never altered


def test_pixels_of_other_nuclei_stay_theirs_and_what_is_measured_is_what_is_stored(tmp_path: Path) -> None:
    labels = labels_with((1, 0, 0))
    result, (shape,) = changed_labels(labels, Changes(shapes=(square(7, 5, 0),)), tmp_path)
    assert int((result.labels == 7).sum()) == 50
    region, pixels = filled_shape(shape, SIZE)
    assert np.array_equal(pixels, result.labels[region.rows, region.columns] == 7)
    with pytest.raises(UsageError, match="others cover it"):
        changed_labels(labels, Changes(shapes=(square(8, 2, 2, 3),)), tmp_path)
    with pytest.raises(UsageError, match="Open the image again"):
        changed_labels(labels, Changes(removed=(4,)), tmp_path)
    with pytest.raises(UsageError, match="numbers of nuclei up to"):  # a list of all numbers would fill the memory
        changed_labels(labels, Changes(shapes=(square(2**31 - 1, 20, 20),)), tmp_path)


@pytest.mark.parametrize(
    "rings",
    [
        ((0, 0, 1, 1),),
        ((0, 0, 1, 1, 2),),
        ((0.1, 0.1, 0.2, 0.1, 0.2, 0.2),),
        ((0, 0, 90, 0, 90, 10),),
        ((0, 0, float("nan"), 0, 5, 5),),
    ],
)
def test_shapes_that_are_none_are_refused(rings: Any) -> None:
    with pytest.raises((UsageError, ImageError)):
        filled_shape(NucleusShape(label=1, rings=rings), SIZE)


def test_large_images_come_in_parts_in_which_nuclei_are_whole() -> None:
    labels = np.zeros((2100, 4200), np.int32)
    labels[10:20, 2095:2105] = 4  # across two parts
    labels[2090:2100, 4190:4200] = 9
    found = {}
    for region, part, numbers in parts_of(Frame("a", (2100, 4200)), labels):
        for at, label in enumerate(numbers, 1):
            found[label] = int((part == at).sum())
            assert (labels[region.rows, region.columns] == label).sum() == 100
    assert found == {4: 100, 9: 100}


def test_simplified_outlines_are_around_the_same_pixels() -> None:
    shape = NucleusShape(label=3, rings=((4.2, 3.9, 20.3, 6.1, 17.7, 30.2, 6.6, 22.4),))
    region, pixels = filled_shape(shape, SIZE)
    again = NucleusShape(label=3, rings=tuple(tuple(ring) for ring in simplified(shape, SIZE)))
    place, same = filled_shape(again, SIZE)
    whole = np.zeros(SIZE, np.bool_), np.zeros(SIZE, np.bool_)
    whole[0][region.rows, region.columns], whole[1][place.rows, place.columns] = pixels, same
    assert np.array_equal(*whole)


def test_outlines_are_packed_in_half_pixels() -> None:
    labels = labels_with((1, 3, 4))
    (ring,) = unpacked(packed_outlines(outlines_of(labels, simplified=False)))[1]
    assert sorted(zip(ring[::2], ring[1::2], strict=True)) == [(6, 8), (6, 28), (26, 8), (26, 28)]


def test_a_writer_names_outlines_by_their_rows(tmp_path: Path) -> None:
    writer = LayerWriter()
    writer.add(MeasuredPart(Frame("a", SIZE, 10, 20), labels_with((1, 0, 0)), [{"label": 33}]))
    layer = writer.write(tmp_path / "layer", labels_with((33, 20, 10)))
    assert list(unpacked(layer.outlines)) == [33]
    assert min(unpacked(layer.outlines)[33][0]) >= 20
