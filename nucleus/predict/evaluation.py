"""The metrics of a pulled model on a split of a dataset, per image and overall."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import tee

import numpy as np

from nucleus.config.recipe import LossOptions
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset
from nucleus.data.reader import LabelledImage, images_of_worker, split_reader
from nucleus.errors import DataError
from nucleus.metrics.scores import ImageScores, ScoreSums
from nucleus.pictures import GalleryImage
from nucleus.predict.model import Predictor
from nucleus.progress import Advance, no_progress
from nucleus.training.validation import score_image

__all__ = ["Evaluation", "ImageRow", "check_split", "evaluate", "evaluate_part", "joined"]


@dataclass(frozen=True)
class ImageRow:
    """Scores of one image, with its true and predicted number of nuclei.

    Attributes:
        name: The image's.
        kind: Its kind.
        iou: Of the mask.
        dice: Of the mask.
        accuracy: Of the mask's pixels.
        ap: AP at IoU 0.50, 0.55, ..., 0.95.
        map: Their mean.
        f1_50: F1 of the nuclei at IoU 0.5.
        pq_50: Their panoptic quality at IoU 0.5.
        nuclei_true: How many there are.
        nuclei_predicted: How many were found.
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


@dataclass(frozen=True)
class Evaluation:
    """Scores of images, and what they add up to.

    Attributes:
        images: Of each image, by name.
        sums: Of all images.
        worst: The images with the lowest mAP, the worst first.
    """

    images: list[ImageRow]
    sums: ScoreSums
    worst: list[GalleryImage]

    @property
    def overall(self) -> dict[str, dict[str, float]]:
        """Metrics over all images, and by kind of image."""
        return self.sums.report()


def joined(parts: Iterable[Evaluation], worst: int = 0) -> Evaluation:
    """The evaluation of all images, from those of parts of them; keeps the worst of the parts' worst."""
    parts = sorted(parts, key=lambda part: part.images[0].name)  # the same sums in whatever order they come
    rows = sorted((row for part in parts for row in part.images), key=lambda row: row.name)
    pictures = sorted((picture for part in parts for picture in part.worst), key=lambda picture: picture.score)
    return Evaluation(rows, ScoreSums(np.sum([part.sums.array for part in parts], axis=0)), pictures[:worst])


def evaluate(
    predictor: Predictor,
    loss: LossOptions,
    dataset: Dataset,
    split: str,
    cache: ShardCache,
    advance: Advance = no_progress,
    worst: int = 0,
) -> Evaluation:
    """Predict every image of a split and compare it with its labels.

    Args:
        predictor: The model.
        loss: The training loss.
        dataset: The dataset.
        split: `train`, `val` or `test`.
        cache: Where its shards are cached.
        advance: Told of each image.
        worst: How many of the images with the lowest mAP to keep for a gallery.

    Raises:
        DataError: The split has no images.
    """
    check_split(dataset, split)
    return evaluate_part(predictor, loss, dataset, split, cache, (0, 1), advance, worst)


def check_split(dataset: Dataset, split: str) -> None:
    """Raise `DataError` if a split has no images."""
    if not dataset.manifest.split_shards(split):
        raise DataError(f"Expected images in the split {split!r} of {dataset}; it has none.")


def evaluate_part(
    predictor: Predictor,
    loss: LossOptions,
    dataset: Dataset,
    split: str,
    cache: ShardCache,
    part: tuple[int, int],
    advance: Advance = no_progress,
    worst: int = 0,
) -> Evaluation:
    """The same for part `number` of `count` of a split; the parts together hold each image once."""
    sums = ScoreSums()
    rows: list[ImageRow] = []
    kept: list[GalleryImage] = []
    reader = split_reader(dataset, split, cache, *part)
    samples, again = tee(images_of_worker(dataset.manifest, split, reader))
    predictions = predictor.images(sample.image for sample in again)
    for sample, found in zip(samples, predictions, strict=True):
        scores = score_image(found.values, found.labels, sample.labels, predictor.config, loss)
        sums.add(sample.kind, scores)
        rows.append(_row(sample, scores))
        title = f"{sample.name[:12]} ({sample.kind.value}): mAP {rows[-1].map:.2f}"
        picture = GalleryImage(title, rows[-1].map, sample.image, sample.labels, found.labels)
        kept = sorted([*kept, picture], key=lambda picture: picture.score)[:worst]
        advance(len(rows), len(dataset.manifest.split_samples(split)))
    return Evaluation(sorted(rows, key=lambda row: row.name), sums, kept)


def _row(sample: LabelledImage, scores: ImageScores) -> ImageRow:
    return ImageRow(
        name=sample.name,
        kind=sample.kind.value,
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
