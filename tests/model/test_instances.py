import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from nucleus.data.synthetic import generated_image
from nucleus.model.architecture import InstanceSettings, Maps
from nucleus.model.instances import label_nuclei


def maps_from(labels: NDArray[np.integer]) -> Maps:
    """What a perfect network makes of labels: the mask, and in it the distance to the edge, 1 at its largest."""
    interior = np.zeros(labels.shape, np.float32)
    for label in range(1, labels.max() + 1):
        distance = ndimage.distance_transform_edt(np.pad(labels == label, 1))[1:-1, 1:-1]
        interior += (distance / max(distance.max(), 1)).astype(np.float32)
    return Maps((labels > 0).astype(np.float32), interior)


def discs(shape: tuple[int, int], *places: tuple[float, float, float]) -> NDArray[np.int32]:
    """Labels 1..K of discs (row, column, radius); a later one leaves earlier ones whole."""
    labels = np.zeros(shape, np.int32)
    y, x = np.mgrid[: shape[0], : shape[1]]
    for number, (row, column, radius) in enumerate(places, 1):
        labels[((y - row) ** 2 + (x - column) ** 2 <= radius**2) & (labels == 0)] = number
    return labels


def test_touching_nuclei_are_told_apart() -> None:
    labels = discs((40, 60), (20, 18, 12), (20, 41, 12))
    labels[2:7, 54:59] = 3
    found = label_nuclei(maps_from(labels), InstanceSettings(min_area=20))
    assert found.max() == 3
    assert ((found > 0) == (labels > 0)).all()
    for label in (1, 2):
        values, counts = np.unique(found[labels == label], return_counts=True)
        assert counts.max() / counts.sum() > 0.95, values
    assert label_nuclei(maps_from(labels), InstanceSettings(min_area=30)).max() == 2


@pytest.mark.parametrize("seed", range(3))
def test_perfect_maps_give_the_labels_back(seed: int) -> None:
    labels = generated_image(seed, 120, 150)[1].astype(np.int32)
    areas = np.bincount(labels.ravel())
    settings = InstanceSettings(seed_threshold=0.6, min_area=1, min_seed_area=1)
    found = label_nuclei(maps_from(labels), settings)
    assert ((found > 0) == (labels > 0)).all()
    kept = sum(
        np.count_nonzero((labels == label) & (found == np.bincount(found[labels == label]).argmax())) / areas[label]
        > 0.9
        for label in range(1, labels.max() + 1)
        if areas[label]
    )
    assert kept >= 0.9 * np.count_nonzero(areas[1:])


def test_ground_between_nuclei_stays_ground_and_holes_in_nuclei_do_not() -> None:
    ring = [(80 + 57 * np.sin(i * np.pi / 9), 80 + 57 * np.cos(i * np.pi / 9), 11) for i in range(18)]
    labels = discs((160, 160), *ring)
    maps = maps_from(labels)
    hole = (slice(79, 82), slice(136, 139))
    maps.mask[hole] = maps.interior[hole] = 0
    found = label_nuclei(maps, InstanceSettings())
    assert found.max() == 18
    assert found[80, 80] == 0
    assert (found[hole] > 0).all()
    assert len(np.unique(found[hole])) == 1
    assert ((found > 0) == (labels > 0)).all()


def test_nuclei_without_a_seed_are_kept_and_specks_are_not() -> None:
    labels = discs((40, 40), (10, 10, 6), (30, 30, 1))
    maps = Maps((labels > 0).astype(np.float32), np.zeros(labels.shape, np.float32))
    assert label_nuclei(maps, InstanceSettings(min_area=20)).max() == 1
    assert label_nuclei(maps, InstanceSettings(min_area=3)).max() == 2


def test_uncertain_nuclei_are_dropped() -> None:
    labels = discs((40, 60), (20, 15, 8), (20, 45, 8))
    maps = Maps(np.where(labels == 1, 0.95, 0.7 * (labels == 2)).astype(np.float32), (labels > 0).astype(np.float32))
    for score, kept in ((0.0, 2), (0.69, 2), (0.71, 1), (0.96, 0)):
        found = label_nuclei(maps, InstanceSettings(min_score=score))
        assert found.max() == kept
        assert not kept or (found[labels == 1] == 1).all()


def test_seeds_below_the_smallest_area_do_not_divide() -> None:
    labels = discs((40, 40), (20, 20, 12))
    interior = np.zeros(labels.shape, np.float32)
    interior[18:22, 14:18] = interior[20, 26] = 1
    maps = Maps((labels > 0).astype(np.float32), interior)
    assert label_nuclei(maps, InstanceSettings(min_seed_area=4)).max() == 1
    assert label_nuclei(maps, InstanceSettings(min_seed_area=1)).max() == 2


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_maps_of_one_value(value: float) -> None:
    for shape in ((1, 1), (1, 50), (50, 1), (30, 20)):
        maps = Maps(np.full(shape, value, np.float32), np.full(shape, value, np.float32))
        found = label_nuclei(maps, InstanceSettings(min_area=1))
        assert found.shape == shape
        assert (found == value).all()


def test_labels_are_consecutive() -> None:
    labels = discs((60, 90), (10, 10, 6), (10, 22, 6), (40, 40, 2), (40, 70, 9))
    found = label_nuclei(maps_from(labels), InstanceSettings(min_area=20))
    assert np.unique(found).tolist() == [0, 1, 2, 3]


def test_settings_follow_the_scale() -> None:
    scaled = InstanceSettings(min_area=20, min_seed_area=5).scaled(2.0)
    assert (scaled.min_area, scaled.min_seed_area, scaled.mask_threshold) == (80, 20, 0.5)
