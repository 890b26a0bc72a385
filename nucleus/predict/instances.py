"""Labels from class probabilities: seeds inside nuclei, grown by watershed to the mask."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import label
from skimage.segmentation import relabel_sequential, watershed

from nucleus.model.architecture import InstanceSettings
from nucleus.model.targets import nucleus_mask

__all__ = ["label_nuclei"]


def label_nuclei(probabilities: NDArray[np.float32], settings: InstanceSettings) -> NDArray[np.int32]:
    """Label each nucleus.

    Seeds are the connected components of body above `seed_threshold`; the watershed (Beucher & Lantuéjoul 1979) of
    the falling probability of body divides the mask among them. Parts of the mask without a seed become nuclei of
    their own if they are large enough, so that small nuclei, which are all border, are not lost. Holes inside one
    nucleus are filled; ground that several nuclei enclose stays ground.

    Args:
        probabilities: H x W x 3: background, body, border.
        settings: Thresholds and smallest areas.

    Returns:
        H x W, 0 background, 1..K nuclei.
    """
    body = probabilities[..., 1]
    mask = nucleus_mask(probabilities, settings.mask_threshold)
    seeds = _without_small(label(body > settings.seed_threshold), settings.min_seed_area)
    seedless = label(mask)
    seedless[np.isin(seedless, np.unique(seedless[seeds > 0]))] = 0
    seeds = np.where(seedless > 0, seedless + seeds.max(), seeds)
    labels = watershed(-body, markers=seeds, mask=mask)
    labels = np.asarray(relabel_sequential(_without_small(labels, settings.min_area))[0], np.int32)
    _fill_holes(labels)
    return labels


def _without_small(labels: NDArray[np.integer], area: int) -> NDArray[np.integer]:
    """Labels with those of fewer than `area` pixels removed."""
    keep = np.bincount(labels.ravel()) >= area
    keep[0] = False
    return np.where(keep[labels], labels, 0)


def _fill_holes(labels: NDArray[np.int32]) -> None:
    """Fill the holes of each label, in place."""
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        part = labels[box]
        part[ndimage.binary_fill_holes(part == number) & (part == 0)] = number
