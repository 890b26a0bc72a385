"""Outlines hold exactly the pixels of their nuclei, in any arrangement, and are valid polygons."""

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from nucleus.data.synthetic import generated_image
from nucleus.predict.outlines import Outline, outlines_of

SMALL = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)


def polygon(outline: Outline) -> shapely.MultiPolygon:
    return shapely.MultiPolygon([shapely.Polygon(part[0], part[1:]) for part in outline.parts])


def pixels_inside(outline: Outline, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose centres are inside, by shapely."""
    rows, columns = np.indices(shape) + 0.5
    return np.asarray(shapely.contains_xy(polygon(outline), columns, rows))


def check(labels: NDArray[np.integer]) -> None:
    found = list(outlines_of(labels))
    assert [outline.label for outline in found] == [label for label in np.unique(labels) if label]
    for outline in found:
        assert shapely.is_valid_reason(polygon(outline)) == "Valid Geometry"
        assert (pixels_inside(outline, labels.shape) == (labels == outline.label)).all()


@settings(deadline=None, max_examples=300)
@given(arrays(np.int32, SMALL, elements=st.integers(0, 3)))
def test_every_arrangement_of_pixels_comes_back(labels: NDArray[np.int32]) -> None:
    check(labels)


def test_generated_nuclei_come_back() -> None:
    check(generated_image(5, 200, 260)[1].astype(np.int32))


@pytest.mark.parametrize("radius", [1, 3, 12, 60])
def test_outlines_are_short_and_have_the_area_of_their_pixels(radius: int) -> None:
    side = 2 * radius + 5
    labels = np.zeros((side, side), np.int32)
    cv2.circle(labels, (radius + 2, radius + 2), radius, 7, cv2.FILLED)
    (exact,), (short,) = outlines_of(labels, simplified=False), outlines_of(labels)
    area = np.count_nonzero(labels)
    assert polygon(exact).area == area
    assert polygon(short).area == pytest.approx(area, rel=0.01, abs=0.6)
    assert len(short.rings[0]) < len(exact.rings[0]) or radius == 1
    assert shapely.hausdorff_distance(polygon(exact).boundary, polygon(short).boundary) <= 0.5


def test_outlines_of_a_part_are_those_of_the_image() -> None:
    labels = generated_image(3, 64, 80)[1].astype(np.int32)
    moved = [ring for outline in outlines_of(labels, top=100, left=30) for ring in outline.rings]
    here = [ring for outline in outlines_of(labels) for ring in outline.rings]
    assert all((a - b == [30, 100]).all() for a, b in zip(moved, here, strict=True))
    assert not list(outlines_of(np.zeros((4, 5), np.int32)))


def test_a_nucleus_in_pieces_with_a_hole_has_parts() -> None:
    labels = np.zeros((12, 20), np.int32)
    labels[1:10, 1:10] = labels[2:6, 14:18] = 4
    labels[3:7, 3:7] = 9
    whole, inner = outlines_of(labels)
    assert [len(part) for part in whole.parts] == [2, 1]
    assert [len(part) for part in inner.parts] == [1]
    assert polygon(whole).area == pytest.approx(81 - 16 + 16, abs=1.5)
