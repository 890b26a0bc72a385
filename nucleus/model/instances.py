"""Labels from the network's maps: seeds inside nuclei, grown by watershed to the mask."""

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.lazy import ndimage, skimage
from nucleus.model.architecture import InstanceSettings, Maps

__all__ = ["kept_labels", "label_nuclei", "nucleus_mask"]


def nucleus_mask(maps: Maps, settings: InstanceSettings) -> NDArray[np.bool_]:
    """Return the pixels (H x W) that belong to nuclei."""
    return np.asarray(maps.mask > settings.mask_threshold)


def label_nuclei(maps: Maps, settings: InstanceSettings) -> NDArray[np.int32]:
    """Label each nucleus.

    Seeds are the connected components (4 neighbours) of the interior map above `seed_threshold`. A component of the
    mask with one seed is a nucleus; one with several is divided among them by the watershed (Beucher & Lantuéjoul 1979)
    of the negative interior map; one without is a nucleus too, so that small ones are not lost. Holes inside a nucleus
    are filled; background that several nuclei enclose stays background. Nuclei smaller than `min_area`, and nuclei over
    which the mean of the mask is below `min_score`, are dropped.

    Args:
        maps: H x W each.
        settings: Thresholds and smallest areas.

    Returns:
        H x W, 0 background, 1..K nuclei.
    """
    mask = nucleus_mask(maps, settings)
    components = _components(mask, 4)
    seeds = _components(mask & (maps.interior > settings.seed_threshold), 4)
    seeds = kept_labels(seeds, _large(seeds, settings.min_seed_area))
    labels = _divided(components, seeds, maps.interior)
    _fill_holes(labels)
    return kept_labels(labels, _likely(labels, maps.mask, settings.min_score) & _large(labels, settings.min_area))


def kept_labels(labels: NDArray[np.int32], keep: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Drop labels and number the others 1..K in their order.

    Args:
        labels: Any shape, 0 background.
        keep: Whether each label, from 0, is kept. The entry of the background is ignored.

    Returns:
        The same shape.
    """
    keep = keep.copy()
    keep[0] = False
    numbers = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return np.asarray(numbers[labels])


def _components(mask: NDArray[np.bool_], neighbours: int) -> NDArray[np.int32]:
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=neighbours, ltype=cv2.CV_32S)
    return np.asarray(labels, np.int32)


def _divided(
    components: NDArray[np.int32], seeds: NDArray[np.int32], interior: NDArray[np.float32]
) -> NDArray[np.int32]:
    """Return the components; those with several seeds are divided among the seeds."""
    numbers, first = np.unique(seeds[seeds > 0], return_index=True)
    several = np.bincount(components[seeds > 0][first], minlength=int(components.max()) + 1) > 1
    if not several.any():
        return components
    crowded = several[components]
    divided = skimage.segmentation.watershed(-interior, markers=np.where(crowded, seeds, 0), mask=crowded)
    # Numbers of undivided components come after those of the seeds.
    return np.where(crowded, divided, np.where(components > 0, components + numbers[-1], 0)).astype(np.int32)


def _fill_holes(labels: NDArray[np.int32]) -> None:
    """Fill, in place, background that a single nucleus encloses."""
    count, ground, stats, _ = cv2.connectedComponentsWithStats((labels == 0).astype(np.uint8), connectivity=8)
    height, width = labels.shape
    for number in range(1, count):
        x, y, w, h = (int(value) for value in stats[number, :4])
        if x == 0 or y == 0 or x + w == width or y + h == height:
            continue  # may extend beyond the image
        around = np.s_[y - 1 : y + h + 1, x - 1 : x + w + 1]
        hole = ground[around] == number
        ring = ndimage.binary_dilation(hole) & ~hole
        neighbours = labels[around][ring]
        if (neighbours == neighbours[0]).all():
            labels[around][hole] = neighbours[0]


def _likely(labels: NDArray[np.int32], mask: NDArray[np.float32], score: float) -> NDArray[np.bool_]:
    """Return whether the mean of the mask over each label (from 0) is at least `score`."""
    areas = np.bincount(labels.ravel())
    sums = np.bincount(labels.ravel(), mask.ravel())
    return np.asarray(sums >= score * areas)


def _large(labels: NDArray[np.int32], area: int) -> NDArray[np.bool_]:
    """Return whether each label (from 0) has at least `area` pixels."""
    return np.asarray(np.bincount(labels.ravel()) >= max(area, 1))
