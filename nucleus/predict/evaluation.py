"""Evaluation of a model on labelled images: image by image (`predict_images`), or on whole splits (`evaluate`).

The order is fixed: images are computed `IMAGES_AT_ONCE` at a time in the stored order of their split, and their scores
are added up in that order. Parts of a split start at multiples of that number. So an evaluation in parts gives the same
numbers, to the bit, as one in a single process with the same number of threads on the same kind of machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby, tee
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.config.names import Kind
from nucleus.config.recipe import LossOptions
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset
from nucleus.data.reader import LabelledImage, images_of_range
from nucleus.data.samples import SPLITS
from nucleus.errors import DataError, UsageError
from nucleus.lazy import pandas
from nucleus.metrics.scores import HEADLINES, ImageScores, ScoreSums, amount, score_cell, score_labels
from nucleus.model.losses import loss_of_values
from nucleus.pictures import GalleryImage
from nucleus.predict.model import IMAGES_AT_ONCE, Model
from nucleus.predict.source import array_source
from nucleus.progress import Advance, no_progress
from nucleus.text import aligned

__all__ = [
    "Evaluation",
    "EvaluationPart",
    "ImageRow",
    "PartScores",
    "PredictedImage",
    "combined_scores",
    "evaluate",
    "evaluate_part",
    "parts_of",
    "predict_images",
    "splits_named",
]

_IMAGES_PER_PART = 2 * IMAGES_AT_ONCE


@dataclass(frozen=True)
class PredictedImage:
    """A labelled image and its prediction.

    Attributes:
        sample: Image with its true labels.
        labels: Predicted labels, H x W, int32, 0 background.
        scores: Scores of the prediction.
    """

    sample: LabelledImage
    labels: NDArray[np.int32]
    scores: ImageScores


def predict_images(model: Model, images: Iterable[LabelledImage], loss: LossOptions) -> Iterator[PredictedImage]:
    """Predict labelled images that fit in memory, and score them against their labels, in order.

    Args:
        model: The model.
        images: The images.
        loss: Options of the training loss, which is computed over the whole image.
    """
    samples, again = tee(images)
    found = model.values(array_source(sample.image, sample.name) for sample in again)
    for sample, values in zip(samples, found, strict=True):
        labels = model.label(values)
        whole_loss = loss_of_values(values.values, sample.labels, model.config.heads, loss)
        yield PredictedImage(sample, labels, score_labels(sample.labels, labels, whole_loss))


@dataclass(frozen=True)
class ImageRow:
    """Scores of one image.

    Attributes:
        name: Name of the image.
        kind: Kind of the image.
        iou: IoU of the mask.
        dice: Dice coefficient of the mask.
        accuracy: Fraction of the mask's pixels that are right.
        ap: AP at IoU 0.50, 0.55, ..., 0.95.
        map: Mean of `ap`.
        f1_50: F1 of the nuclei at IoU 0.5.
        pq_50: Panoptic quality of the nuclei at IoU 0.5.
        nuclei_true: Number of true nuclei.
        nuclei_predicted: Number of predicted nuclei.
    """

    name: str
    kind: str
    iou: float
    dice: float
    accuracy: float
    ap: tuple[float, ...]
    map: float
    f1_50: float
    pq_50: float
    nuclei_true: int
    nuclei_predicted: int

    @property
    def ap_50(self) -> float:
        """AP at IoU 0.5."""
        return self.ap[0]

    def as_dict(self) -> dict[str, Any]:
        """Return all scores by name, `ap_50` included."""
        return {**asdict(self), "ap_50": self.ap_50}


class Evaluation(Mapping[str, dict[str, float | None]]):
    """Scores of a model: `scores["all"]["map"]` over all images, `scores["stain"]["iou"]` over those of a kind.

    A mapping from "all" and each kind of image to the scores by name: `map`, `ap_50`, `iou`, `dice`, `accuracy`,
    `nuclei_missed` and so on (means over images, or sums). Scores of images of which none has a nucleus are None.

    Attributes:
        images: Scores of each image, sorted by name.
        sums: Sums over all images.
        worst: Images with the lowest mAP, the worst first; as many as were requested.

    Examples:
        >>> scores = nucleus.evaluate(model, dataset, split="test")
        >>> 0 <= scores["all"]["map"] <= 1
        True
        >>> worst = scores.table.sort_values("map").head()
    """

    def __init__(self, images: list[ImageRow], sums: ScoreSums, worst: list[GalleryImage]) -> None:
        self.images = images
        self.sums = sums
        self.worst = worst
        self._report = sums.report()

    @property
    def overall(self) -> dict[str, dict[str, float | None]]:
        """Scores over all images ("all") and over those of each kind, by name."""
        return self._report

    @property
    def table(self) -> pandas.DataFrame:
        """Scores of each image: pandas DataFrame, one row per image. Raises `MissingPackageError` without pandas."""
        return pandas.DataFrame([row.as_dict() for row in self.images]).drop(columns="ap")

    def __getitem__(self, kind: str) -> dict[str, float | None]:
        return self._report[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._report)

    def __len__(self) -> int:
        return len(self._report)

    def __repr__(self) -> str:
        titles = ["", "images", *(title for _, title in HEADLINES)]
        rows = [
            [kind, f"{amount(scores, 'images'):.0f}", *(str(score_cell(scores, name)) for name, _ in HEADLINES)]
            for kind, scores in self.items()
        ]
        return aligned([titles, *rows])


@dataclass(frozen=True)
class EvaluationPart:
    """Consecutive images of a split.

    Attributes:
        split: `train`, `val` or `test`.
        positions: Positions of the images in the stored order of the split.
    """

    split: str
    positions: range


@dataclass(frozen=True)
class PartScores:
    """Scores of a part of a split.

    Attributes:
        part: The part.
        scores: Name, kind and scores of each image, in stored order.
        worst: Images of the part with the lowest mAP, the worst first.
    """

    part: EvaluationPart
    scores: list[tuple[str, Kind, ImageScores]]
    worst: list[GalleryImage]


def splits_named(split: str) -> tuple[str, ...]:
    """Return the splits of a name: the split itself, or every split for "all". Raises `UsageError` for other names."""
    if split not in {*SPLITS, "all"}:
        raise UsageError(f"Expected a split of {', '.join(SPLITS)} or all; found {split!r}.")
    return SPLITS if split == "all" else (split,)


def parts_of(dataset: Dataset, split: str) -> list[EvaluationPart]:
    """Divide a split into parts of 16 images. Raises `DataError` if it has no images."""
    count = len(dataset.manifest.split_samples(split))
    if not count:
        raise DataError(f"Expected images in the split {split!r} of {dataset}; it has none.")
    return [
        EvaluationPart(split, range(first, min(first + _IMAGES_PER_PART, count)))
        for first in range(0, count, _IMAGES_PER_PART)
    ]


def evaluate(
    model: Model,
    dataset: Dataset,
    splits: Sequence[str],
    cache: ShardCache,
    *,
    loss: LossOptions | None = None,
    progress: Callable[[str], AbstractContextManager[Advance]] = lambda _: nullcontext(no_progress),
    worst: int = 0,
) -> Evaluation:
    """Predict every image of the given splits and score it against its labels.

    Args:
        model: The model.
        dataset: The dataset.
        splits: Names of splits: `train`, `val`, `test`.
        cache: Cache of the shards of the dataset.
        loss: Options of the reported loss; by default, those of the training.
        progress: Shows the progress of a split; called with a title.
        worst: Number of images with the lowest mAP to keep for a gallery.

    Raises:
        DataError: A split has no images.
    """
    found = []
    for split in splits:
        whole = EvaluationPart(split, range(parts_of(dataset, split)[-1].positions.stop))
        with progress(f"evaluate {split}") as advance:
            found.append(evaluate_part(model, dataset, whole, cache, loss or model.loss, advance, worst))
    return combined_scores(found, worst)


def evaluate_part(
    model: Model,
    dataset: Dataset,
    part: EvaluationPart,
    cache: ShardCache,
    loss: LossOptions,
    advance: Advance = no_progress,
    worst: int = 0,
) -> PartScores:
    """Predict and score the images of a part; see `evaluate`."""
    scores: list[tuple[str, Kind, ImageScores]] = []
    kept: list[GalleryImage] = []
    for image in predict_images(model, images_of_range(dataset, part.split, cache, part.positions), loss):
        sample, mean_ap = image.sample, image.scores.nuclei.mean_ap
        scores.append((sample.name, sample.kind, image.scores))
        title = f"{sample.name[:12]} ({sample.kind.value}): mAP {mean_ap:.2f}"
        picture = GalleryImage(title, mean_ap, sample.image, sample.labels, image.labels)
        kept = _worst([*kept, picture], worst)
        advance(len(scores), len(part.positions))
    return PartScores(part, scores, kept)


def combined_scores(parts: Iterable[PartScores], worst: int = 0) -> Evaluation:
    """Combine the scores of parts, in any order, into the evaluation of all images."""
    in_order = sorted(parts, key=lambda found: (found.part.split, found.part.positions.start))
    splits = [list(group) for _, group in groupby(in_order, key=lambda found: found.part.split)]
    splits.sort(key=lambda split: min(name for found in split for name, _, _ in found.scores))
    rows = [_row(*score) for found in in_order for score in found.scores]
    sums = np.sum([_sums(found.scores for found in split).array for split in splits], axis=0)
    pictures = [picture for split in splits for found in split for picture in found.worst]
    return Evaluation(sorted(rows, key=lambda row: row.name), ScoreSums(sums), _worst(pictures, worst))


def _sums(parts: Iterable[list[tuple[str, Kind, ImageScores]]]) -> ScoreSums:
    """Add up the scores of a split's images in stored order."""
    sums = ScoreSums()
    for part in parts:
        for _, kind, scores in part:
            sums.add(kind, scores)
    return sums


def _worst(pictures: Iterable[GalleryImage], count: int) -> list[GalleryImage]:
    """Return the images with the lowest mAP, the worst first; ties keep their order."""
    return sorted(pictures, key=lambda picture: picture.score)[:count]


def _row(name: str, kind: Kind, scores: ImageScores) -> ImageRow:
    return ImageRow(
        name=name,
        kind=kind.value,
        iou=scores.pixels.iou,
        dice=scores.pixels.dice,
        accuracy=scores.pixels.accuracy,
        ap=tuple(float(value) for value in scores.nuclei.ap),
        map=scores.nuclei.mean_ap,
        f1_50=float(scores.nuclei.f1[0]),
        pq_50=float(scores.nuclei.pq[0]),
        nuclei_true=scores.nuclei.true_nuclei,
        nuclei_predicted=scores.nuclei.predicted_nuclei,
    )
