"""Score a model on a split of a dataset on a Ray cluster."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from job.spread import spread
from nucleus.config.names import Reference
from nucleus.config.recipe import LossOptions
from nucleus.data.cache import ShardCache, default_cache_dir
from nucleus.data.datasets import Dataset
from nucleus.predict.options import PredictionOptions
from nucleus.progress import Advance, no_progress
from nucleus.registry.versions import pull_cached
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri

if TYPE_CHECKING:
    from nucleus.predict.evaluation import Evaluation

__all__ = ["EvaluationPlan", "evaluate_spread"]

_IMAGES_AT_ONCE = 16

_Item = tuple[str, tuple[int, int]]
"""A split, and which part of how many."""


@dataclass(frozen=True)
class EvaluationPlan:
    """What is scored.

    Attributes:
        registry: The bucket that holds the model.
        model: Its version.
        loss: The training loss.
        dataset: On which.
        splits: Of `train`, `val` and `test`.
        options: How images are segmented.
        worst: How many of the worst images to keep.
    """

    registry: S3Uri
    model: Reference
    loss: LossOptions
    dataset: Dataset
    splits: tuple[str, ...]
    options: PredictionOptions
    worst: int


def evaluate_spread(
    plan: EvaluationPlan,
    *,
    workers: int | None,
    verbose: bool = False,
    advance: Advance = no_progress,
    waiting: Callable[[str], None] = lambda _: None,
) -> "Evaluation":
    """What `nucleus.predict.evaluation.evaluate` gives, computed by actors that each take parts of the split.

    Raises:
        NucleusError: The dataset, the model or the cluster cannot be used.
    """
    from nucleus.predict.evaluation import check_split, joined

    items: list[_Item] = []
    images = 0
    for split in plan.splits:
        check_split(plan.dataset, split)
        here = len(plan.dataset.manifest.split_samples(split))
        count = -(-here // _IMAGES_AT_ONCE)
        items += [(split, (number, count)) for number in range(count)]
        images += here
    parts = []
    done = 0
    for part in spread(items, partial(_part_evaluator, plan), workers=workers, waiting=waiting, verbose=verbose):
        parts.append(part)
        done += len(part.images)
        advance(done, images)
    return joined(parts, plan.worst)


def _part_evaluator(plan: EvaluationPlan) -> Callable[[_Item], "Evaluation"]:
    """In an actor: the model and the dataset, and what scores a part with them."""
    from nucleus.predict.evaluation import evaluate_part
    from nucleus.predict.predictor import load_predictor

    predictor = load_predictor(pull_cached(Bucket(plan.registry), plan.model), plan.options)
    cache = ShardCache(default_cache_dir())
    return lambda item: evaluate_part(predictor, plan.loss, plan.dataset, item[0], cache, item[1], worst=plan.worst)
