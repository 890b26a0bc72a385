"""Predict the images of a bucket on a Ray cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import nucleus
from job.actor_pool import spread
from nucleus.config.names import Reference
from nucleus.config.recipe import LossOptions
from nucleus.data.cache import ShardCache, default_cache_dir
from nucleus.data.dataset import Dataset
from nucleus.predict.bucket_images import (
    ImageOutcome,
    PredictionSettings,
    StoredImage,
    batches_of,
    claim_output,
    find_images,
    join_tables,
    not_done,
)
from nucleus.predict.model import PredictionOptions
from nucleus.progress import Advance, no_progress
from nucleus.registry.versions import pull_cached
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri, parse_uri

if TYPE_CHECKING:
    from nucleus.predict.evaluation import Evaluation

__all__ = ["EvaluationPlan", "StoredResult", "evaluate_spread", "predict_stored"]


@dataclass(frozen=True)
class StoredResult:
    """What a prediction left in the bucket.

    Attributes:
        counts: Nuclei in each image that was predicted now, by key.
        failures: Message for each image that could not be read, by key.
        done_before: How many images were done already.
    """

    counts: dict[str, int]
    failures: dict[str, str]
    done_before: int


def predict_stored(
    settings: PredictionSettings,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    verbose: bool = False,
    advance: Advance = no_progress,
    waiting: Callable[[str], None] = lambda _: None,
) -> StoredResult:
    """Predict what is not done yet, then join the tables of all that is.

    Args:
        settings: What and where to.
        workers: How many actors; without it as many as the cluster has GPUs, or else CPUs.
        overwrite: Whether to do all again, in place of results with other settings too.
        verbose: Whether to show Ray's logs.
        advance: Told of each image.
        waiting: Told what has to be waited for.

    Raises:
        UsageError: There are no images, or results with other settings.
        NucleusError: The bucket, the model or the cluster cannot be used.
    """
    images = find_images(parse_uri(settings.images))
    claim_output(settings, overwrite=overwrite)
    wanted = images if overwrite else not_done(settings, images)
    counts: dict[str, int] = {}
    failures: dict[str, str] = {}
    batches = batches_of(wanted)
    if batches:
        make = partial(_batch_predictor, settings)
        for outcomes in spread(batches, make, workers=workers, waiting=waiting, verbose=verbose):
            for outcome in outcomes:
                if outcome.nuclei is None:
                    failures[outcome.key] = str(outcome.failure)
                else:
                    counts[outcome.key] = outcome.nuclei
                advance(len(counts) + len(failures), len(wanted))
    done = [image for image in images if image.key not in failures]
    if done:
        join_tables(settings, done)
    return StoredResult(dict(sorted(counts.items())), dict(sorted(failures.items())), len(images) - len(wanted))


def _batch_predictor(settings: PredictionSettings) -> Callable[[Sequence[StoredImage]], list[ImageOutcome]]:
    """In an actor: the model, and what predicts batches with it."""

    folder = pull_cached(Bucket(parse_uri(settings.registry)), settings.reference)
    return nucleus.predict.BatchPredictor(settings, nucleus.predict.load_predictor(folder, settings.options)).predict


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

    items: list[_Item] = []
    images = 0
    for split in plan.splits:
        nucleus.predict.check_split(plan.dataset, split)
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
    return nucleus.predict.joined(parts, plan.worst)


def _part_evaluator(plan: EvaluationPlan) -> Callable[[_Item], "Evaluation"]:
    """In an actor: the model and the dataset, and what scores a part with them."""

    predictor = nucleus.predict.load_predictor(pull_cached(Bucket(plan.registry), plan.model), plan.options)
    cache = ShardCache(default_cache_dir())
    return lambda item: nucleus.predict.evaluate_part(
        predictor, plan.loss, plan.dataset, item[0], cache, item[1], worst=plan.worst
    )
