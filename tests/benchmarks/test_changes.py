"""What the changes of the curves do to images."""

import cv2
import numpy as np
import pytest

from nucleus.data.synthetic import generated_image
from tests.benchmarks.changes import AXES, busiest_crop, depth, median_diameter, resampled, stain


@pytest.mark.parametrize("name", AXES)
def test_changes_depend_on_strength_and_seed_alone(name: str) -> None:
    image = generated_image(3, 96, 80)[0]
    before = image.copy()
    axis = AXES[name]
    first = [axis.change(image, strength, 5) for strength in axis.strengths]
    again = [axis.change(image, strength, 5) for strength in axis.strengths]
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(first, again, strict=True))
    assert (image == before).all()
    assert all(found.shape == image.shape for found in first)
    if name != "depth":
        far = [float(np.abs(found.astype(float) - image).mean()) for found in first]
        assert min(far) > 0
    if name in {"noise", "blur", "gradient", "vignette", "stain"}:
        assert far == sorted(far)
    if name in {"noise", "gradient", "stain"}:
        assert (axis.change(image, axis.strengths[-1], 6) != first[-1]).any()


def test_depths_hold_the_same_image() -> None:
    image = generated_image(3, 64, 64)[0]
    for bits, kind, most in ((8, np.uint8, 255), (10, np.uint16, 1023), (16, np.uint16, 65535), (32, np.float32, 1)):
        found = depth(image, bits, 0)
        assert found.dtype == kind
        assert np.allclose(found / most, image / 255, atol=0.5 / most)


def test_stains_of_no_strength_are_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    assert np.abs(stain(image, 0.0, 1).astype(int) - image).max() <= 1


def test_white_stays_light_and_stain_changes_colour() -> None:
    image = np.full((16, 16, 3), (150, 90, 160), np.uint8)
    assert len({tuple(stain(image, 0.4, seed)[0, 0]) for seed in range(5)}) == 5


@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0, 3.7])
def test_nuclei_keep_their_shape_at_another_scale(factor: float) -> None:
    labels = np.zeros((120, 120), np.uint16)
    cv2.circle(labels, (40, 40), 18, 1, -1)  # type: ignore[call-overload]
    cv2.circle(labels, (77, 40), 18, 2, -1)  # type: ignore[call-overload]
    image = np.repeat((labels > 0).astype(np.uint8)[..., None] * 200, 3, axis=2)
    found_image, found = resampled(image, labels, factor)
    assert found.shape == found_image.shape[:2] == (round(120 * factor), round(120 * factor))
    assert set(np.unique(found)) == {0, 1, 2}
    assert median_diameter(found) == pytest.approx(factor * median_diameter(labels), rel=0.06)
    ys, xs = np.nonzero(found == 2)
    assert (ys.mean() / factor, xs.mean() / factor) == pytest.approx((40, 77), abs=1.5)


def test_diameter_without_nuclei() -> None:
    assert median_diameter(np.zeros((9, 9), np.uint16)) == 0


def test_the_window_is_where_most_nuclei_are() -> None:
    labels = np.zeros((100, 140), np.uint16)
    for number, (y, x) in enumerate([(10, 10), (70, 110), (80, 120), (90, 130)], start=1):
        labels[y - 3 : y + 3, x - 3 : x + 3] = number
    rows, columns = busiest_crop(labels, 50)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (50, 50)
    assert set(np.unique(labels[rows, columns])) >= {2, 3, 4}
    assert busiest_crop(labels, 200) == (slice(0, 100), slice(0, 140))
    assert busiest_crop(labels, 120)[0] == slice(0, 100)
