"""Validation over all workers: sums of scores, the best and worst images, and the choice of thresholds for labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nucleus.metrics.scores import ScoreSums
from nucleus.predict.evaluation import PredictedImage

if TYPE_CHECKING:
    from nucleus.training.distributed import Workers
from collections.abc import Callable, Sequence
from itertools import chain, islice, product, tee
from typing import TYPE_CHECKING

from numpy.typing import NDArray

from nucleus.data.reader import LabelledImage
from nucleus.errors import JobError
from nucleus.metrics.nuclei import match_nuclei
from nucleus.metrics.scores import count_pixels
from nucleus.model.architecture import InstanceSettings, maps_of
from nucleus.predict.model import Model
from nucleus.predict.source import array_source

__all__ = [
    "RANKED_IMAGES",
    "ImageRanking",
    "RankedImage",
    "check_finite",
    "score_images",
    "tune_instances",
    "usual_images",
]


RANKED_IMAGES = 12
"""Number of best images, and of worst images, that a run keeps."""
_IOU_WEIGHT = 1e-3
"""Weight of the mask's IoU in the ranking, which decides between images of equal mAP, such as 0 or 1."""
_ROUNDS: tuple[dict[str, tuple[float, ...]], ...] = (
    {"mask_threshold": (0.5, 0.4, 0.45, 0.55, 0.6, 0.65), "seed_threshold": (0.5, 0.4, 0.6, 0.7, 0.8)},
    {"min_score": (0.8, 0.0, 0.7, 0.75, 0.85, 0.875, 0.9), "min_area": (20, 10, 15, 30, 45, 60)},
)
"""Settings that are tuned together, and their candidate values; on a tie, earlier values win."""
_AS_GOOD = 0.005
"""Largest difference of mAP between equally good settings, among which the IoU of the mask decides. Training the same
recipe twice gives such differences too."""
_MOST_IMAGES, _MOST_MIXED = 256, 32
"""Number of images to tune on, at most, over all workers: of the run's dataset, and of each that is mixed in."""
_Images = Callable[[], Iterator[LabelledImage]]
_LARGEST_DIAMETER = 1024
"""Number of bins for diameters, px; larger diameters count in the last bin."""
_SCORE_BINS = 1000


def score_images(predicted: Iterable[PredictedImage], workers: Workers) -> ScoreSums:
    """Return the sums of the scores over the images of all workers, in float64; the same on each worker."""
    sums = ScoreSums()
    for image in predicted:
        sums.add(image.sample.kind, image.scores)
    return ScoreSums(workers.sum(sums.array))


def check_finite(metrics: dict[str, float]) -> None:
    """Raise `JobError` if training has diverged; all workers have the same metrics, so all of them stop."""
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise JobError(
                f"Expected finite metrics; {name} is {value} in epoch {metrics['epoch']:.0f}: training has "
                "diverged. Set optimizer.learning_rate lower or optimizer.warmup_steps higher."
            )


@dataclass(frozen=True)
class RankedImage:
    """One of the best or worst images of a split.

    Attributes:
        group: `best` or `worst`.
        predicted: The image, with its prediction and scores.
    """

    group: Literal["best", "worst"]
    predicted: PredictedImage


class ImageRanking:
    """Ranking of a split's images over all workers. Keeps only images that may be among the best or worst.

    Args:
        names: Names of all images of the split, in the same order on each worker.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self._quality = np.zeros(len(self._numbers))
        self._kept: dict[int, PredictedImage] = {}

    def observe(self, images: Iterable[PredictedImage]) -> Iterator[PredictedImage]:
        """Rank this worker's images; yield them unchanged."""
        for image in images:
            number = self._numbers[image.sample.name]
            self._quality[number] = image.scores.nuclei.mean_ap + _IOU_WEIGHT * image.scores.pixels.iou
            self._kept[number] = image
            in_order = sorted(self._kept, key=lambda number: self._quality[number])
            for middle in in_order[RANKED_IMAGES:-RANKED_IMAGES]:
                del self._kept[middle]
            yield image

    def ranked(self, workers: Workers) -> list[RankedImage]:
        """Return this worker's part of the best (best first) and worst (worst first) images over all workers.

        Every worker must call it.
        """
        quality = workers.sum(self._quality)
        in_order = np.argsort(quality, kind="stable")
        worst = in_order[: min(RANKED_IMAGES, -(-len(in_order) // 2))]
        best = in_order[len(worst) :][-RANKED_IMAGES:]
        groups: dict[Literal["best", "worst"], Any] = {"best": best[::-1], "worst": worst}
        return [
            RankedImage(group, self._kept[int(number)])
            for group, numbers in groups.items()
            for number in numbers
            if int(number) in self._kept
        ]


def tune_instances(
    model: Model, sources: Sequence[tuple[float, _Images]], workers: Workers, *, prefer_current: bool = False
) -> tuple[InstanceSettings, float | None]:
    """Choose the settings by mAP, mean over images: first the thresholds, then the limits for dropped nuclei.

    Among the settings within 0.005 of the highest mAP, the one with the highest IoU of the mask is chosen, because
    dropping more uncertain nuclei can raise the mAP slightly at the cost of many true pixels. With `prefer_current`
    the model's own settings stay instead if they are among these.
    Of a large split, the first 256 images in stored order, which is random, are used, or 32 of one that is mixed in.
    Every worker must call this.

    Args:
        model: The model; the search starts from its settings.
        sources: Share of each dataset, by which its mean counts, and function that returns this worker's images of its
            validation split.
        workers: All workers; each receives the same result.
        prefer_current: Whether the model's settings were chosen on more images than there are now: those of the version
            that training started with.

    Returns:
        The settings, and the median diameter of the true nuclei of the first dataset, px (None if it has no nuclei).
    """
    settings = model.config.instances
    for choices in _ROUNDS:
        combinations = product(*choices.values())
        others = (settings.model_copy(update=dict(zip(choices, each, strict=True))) for each in combinations)
        candidates = [settings, *(each for each in others if each != settings)]
        parts = [
            share * _mean_quality(model, candidates, images, _MOST_MIXED if number else _MOST_IMAGES, workers)
            for number, (share, images) in enumerate(sources)
        ]
        mean_ap, iou = np.sum(parts, axis=0).T
        as_good = mean_ap >= mean_ap.max() - _AS_GOOD
        if not (prefer_current and as_good[0]):
            settings = candidates[int(np.argmax(np.where(as_good, iou, -1)))]
    images = islice(sources[0][1](), -(-_MOST_IMAGES // workers.count))
    diameters = sum((_diameters(sample.labels) for sample in images), np.zeros(_LARGEST_DIAMETER))
    counts = workers.sum(diameters)
    return settings, _percentile(counts, 50) if counts.any() else None


def usual_images(
    model: Model, sources: Sequence[tuple[float, _Images]], workers: Workers
) -> tuple[tuple[float, float] | None, float | None]:
    """Return what the validation images are like, so that prediction can tell others from them.

    Every worker must call this.

    Args:
        model: The model with its final thresholds.
        sources: Share of each dataset, and a function that returns this worker's validation images of it, as for
            `tune_instances`.
        workers: All workers; each receives the same result.

    Returns:
        The 5th and 95th percentile of the images' median diameters of the true nuclei, px, and the mean score of the
        found nuclei (the mean of the mask map over a nucleus) that 98 % of the images reach; None without nuclei.
    """
    images = chain.from_iterable(
        islice(images(), -(-(_MOST_MIXED if number else _MOST_IMAGES) // workers.count))
        for number, (_, images) in enumerate(sources)
    )
    samples, again = tee(images)
    found = model.values(array_source(sample.image, sample.name) for sample in again)
    medians, scores = np.zeros(_LARGEST_DIAMETER), np.zeros(_SCORE_BINS)
    for sample, values in zip(samples, found, strict=True):
        diameters = _diameters(sample.labels)
        if diameters.any():
            medians[round(_percentile(diameters, 50))] += 1
        score = _mean_score(model.label(values), maps_of(values.values, model.config.heads).mask)
        if score is not None:
            scores[min(int(score * _SCORE_BINS), _SCORE_BINS - 1)] += 1
    medians, scores = np.split(workers.sum(np.concatenate([medians, scores])), [_LARGEST_DIAMETER])
    return (
        (_percentile(medians, 5), _percentile(medians, 95)) if medians.any() else None,
        _percentile(scores, 2) / _SCORE_BINS if scores.any() else None,
    )


def _mean_score(labels: NDArray[np.int32], mask: NDArray[np.float32]) -> float | None:
    """Return the mean score of the nuclei of an image; None without nuclei."""
    areas = np.bincount(labels.ravel())[1:]
    return float(np.mean(np.bincount(labels.ravel(), mask.ravel())[1:] / areas)) if len(areas) else None


def _percentile(counts: NDArray[np.float64], percent: float) -> float:
    """Return the lowest bin, at least 1, up to which a histogram has at least a part of its counts."""
    return float(max(1, np.searchsorted(np.cumsum(counts), counts.sum() * percent / 100)))


def _mean_quality(
    model: Model, candidates: Sequence[InstanceSettings], images: _Images, most: int, workers: Workers
) -> NDArray[np.float64]:
    """Return mAP and IoU of the mask (columns) with each of the settings (rows), means over all workers' images."""
    sums, scored = np.zeros((len(candidates), 2)), 0
    samples, again = tee(islice(images(), -(-most // workers.count)))
    found = model.values(array_source(sample.image, sample.name) for sample in again)
    for sample, values in zip(samples, found, strict=True):
        sums += [_quality(sample.labels, model.label(values, each)) for each in candidates]
        scored += 1
    *total, count = workers.sum(np.append(sums, scored))
    return np.asarray(np.reshape(total, sums.shape) / max(count, 1))


def _quality(truth: NDArray[np.integer], labels: NDArray[np.int32]) -> tuple[float, float]:
    """Return the mAP of the nuclei and the IoU of the mask."""
    return match_nuclei(truth, labels).mean_ap, count_pixels(truth > 0, labels > 0).iou


def _diameters(labels: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the histogram of the labels' diameters (of circles of the same area), with bins of 1 px."""
    areas = np.bincount(labels.ravel())[1:]
    diameters = np.rint(np.sqrt(4 * areas[areas > 0] / np.pi)).astype(np.int64)
    return np.bincount(np.minimum(diameters, _LARGEST_DIAMETER - 1), minlength=_LARGEST_DIAMETER).astype(np.float64)
