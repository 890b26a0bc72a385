"""The metrics of a pulled model on a split of a dataset, per image and overall."""

from dataclasses import dataclass

from nucleus.config.recipe import LossOptions
from nucleus.data.cache import ShardCache
from nucleus.data.datasets import Dataset
from nucleus.errors import DataError
from nucleus.model.metrics import ScoreSums
from nucleus.predict.predictor import Predictor
from nucleus.progress import Advance, no_progress
from nucleus.training.validation import image_loss, images_of_split, mask_counts

__all__ = ["Evaluation", "ImageRow", "evaluate"]


@dataclass(frozen=True)
class ImageRow:
    """Scores of one image, with its true and predicted number of nuclei."""

    name: str
    kind: str
    iou: float
    dice: float
    accuracy: float
    nuclei_true: int
    nuclei_predicted: int


@dataclass(frozen=True)
class Evaluation:
    """Scores of each image, and overall by kind of image."""

    images: list[ImageRow]
    overall: dict[str, dict[str, float]]


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    split: str,
    cache: ShardCache,
    advance: Advance = no_progress,
) -> Evaluation:
    """Predict every image of a split and compare it with its labels.

    Raises:
        DataError: The split has no images.
    """
    if not dataset.manifest.split_shards(split):
        raise DataError(f"Expected images in the split {split!r} of {dataset}; it has none.")
    loss_options = LossOptions.model_validate(predictor.manifest.origin.recipe.get("loss", {}))
    sums = ScoreSums()
    rows = []
    for sample in images_of_split(dataset, split, cache):
        found = predictor(sample.image)
        counts = mask_counts(found.probabilities, sample.labels, predictor.config.instances.mask_threshold)
        sums.add(sample.kind, counts, image_loss(found.probabilities, sample.labels, loss_options))
        rows.append(
            ImageRow(
                name=sample.name,
                kind=sample.kind.value,
                iou=counts.iou,
                dice=counts.dice,
                accuracy=counts.accuracy,
                nuclei_true=int(sample.labels.max()),
                nuclei_predicted=int(found.labels.max()),
            )
        )
        advance(len(rows), len(dataset.manifest.split_samples(split)))
    return Evaluation(sorted(rows, key=lambda row: row.name), sums.report())
