"""How labels are best made from a network's maps: thresholds chosen on the validation split, over all workers."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product, tee

import numpy as np
from numpy.typing import NDArray

from nucleus.data.reader import LabelledImage
from nucleus.metrics.nuclei import match_nuclei
from nucleus.metrics.scores import count_pixels
from nucleus.model.architecture import InstanceSettings, ModelConfig
from nucleus.model.heads import maps_of
from nucleus.model.instances import label_nuclei
from nucleus.model.tiling import TiledNetwork
from nucleus.training.distributed import Workers

__all__ = ["tune_instances"]

_ROUNDS: tuple[dict[str, tuple[float, ...]], ...] = (
    {"mask_threshold": (0.5, 0.4, 0.45, 0.55, 0.6, 0.65), "seed_threshold": (0.5, 0.4, 0.6, 0.7, 0.8)},
    {"min_score": (0.8, 0.0, 0.7, 0.75, 0.85, 0.875, 0.9), "min_area": (20, 10, 15, 30, 45, 60)},
)
"""What is chosen together, and the values tried; the first ones win ties."""
_AS_GOOD = 0.005
"""Differences of mAP that training the same recipe again makes too: of such settings the mask's IoU chooses."""
_MOST_IMAGES = 256
_MOST_PIXELS = 1024
"""Of a nucleus's diameter."""


def tune_instances(
    network: TiledNetwork, images: Callable[[], Iterator[LabelledImage]], config: ModelConfig, workers: Workers
) -> tuple[InstanceSettings, float | None]:
    """Choose the settings by mAP, mean over images: first the thresholds, then what is dropped.

    Of all within 0.005 of the highest mAP those with the highest IoU of the mask are taken: dropping ever more of the
    uncertain nuclei may still raise the mAP a little when it costs many true pixels.
    Of a large split the first 256 images in stored order, which is a random one, are used. Each worker must call it.

    Args:
        network: The network.
        images: This worker's validation images.
        config: What the network is; its settings are where the search begins.
        workers: All workers; each gets the same result.

    Returns:
        The settings, and the median diameter of the true nuclei, px (None if there are none).
    """
    share = -(-_MOST_IMAGES // workers.count)

    def best(candidates: Sequence[InstanceSettings]) -> InstanceSettings:
        sums, scored = np.zeros((len(candidates), 2)), 0
        samples, again = tee(islice(images(), share))
        for sample, values in zip(samples, network.images(sample.image for sample in again), strict=True):
            maps = maps_of(values, config.heads)
            sums += [_quality(sample.labels, label_nuclei(maps, each)) for each in candidates]
            scored += 1
        *total, count = workers.sum(np.append(sums, scored))
        mean_ap, iou = np.reshape(total, sums.shape).T / max(count, 1)
        return candidates[int(np.argmax(np.where(mean_ap >= mean_ap.max() - _AS_GOOD, iou, -1)))]

    settings = config.instances
    for choices in _ROUNDS:
        combinations = product(*choices.values())
        settings = best([settings.model_copy(update=dict(zip(choices, each, strict=True))) for each in combinations])
    diameters = sum((_diameters(sample.labels) for sample in islice(images(), share)), np.zeros(_MOST_PIXELS))
    return settings, _median(workers.sum(diameters))


def _quality(truth: NDArray[np.integer], labels: NDArray[np.int32]) -> tuple[float, float]:
    """The mAP of the nuclei and the IoU of the mask."""
    return match_nuclei(truth, labels).mean_ap, count_pixels(truth > 0, labels > 0).iou


def _diameters(labels: NDArray[np.integer]) -> NDArray[np.float64]:
    """How many labels have which diameter (that of the circle of the same area), in whole pixels."""
    areas = np.bincount(labels.ravel())[1:]
    diameters = np.rint(np.sqrt(4 * areas[areas > 0] / np.pi)).astype(np.int64)
    return np.bincount(np.minimum(diameters, _MOST_PIXELS - 1), minlength=_MOST_PIXELS).astype(np.float64)


def _median(counts: NDArray[np.float64]) -> float | None:
    if not counts.any():
        return None
    return float(max(1, np.searchsorted(np.cumsum(counts), counts.sum() / 2)))
