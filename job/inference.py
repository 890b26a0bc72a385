"""Prediction of a bucket's images, and evaluation on a dataset's splits, on a Ray cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

from job.actor_pool import map_on_cluster
from nucleus.config.names import Reference
from nucleus.data.cache import ShardCache, default_cache_dir
from nucleus.data.dataset import Dataset
from nucleus.model.engines import EngineChoice
from nucleus.predict.batches import BatchPredictor, ImageOutcome, batches_of
from nucleus.predict.bucket_images import (
    BucketImage,
    PredictionSettings,
    claim_output,
    find_images,
    join_tables,
    not_done,
)
from nucleus.predict.evaluation import (
    Evaluation,
    EvaluationPart,
    PartScores,
    combined_scores,
    evaluate_part,
    parts_of,
)
from nucleus.predict.model import PredictionOptions, load_pulled
from nucleus.predict.plates import Wells
from nucleus.progress import Advance, no_progress
from nucleus.registry.versions import PulledModel, pull_cached, read_included
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri, parse_uri

__all__ = ["BucketPrediction", "EvaluationPlan", "evaluate_on_cluster", "predict_bucket"]


@dataclass(frozen=True)
class BucketPrediction:
    """The outcome of a prediction in a bucket.

    Attributes:
        counts: Number of nuclei per image that was predicted now, by key; planes of a stack are `KEY z=0` and so on.
        failures: Error message per image that could not be read or whose key cannot be used, by key.
        warnings: Why the result of an image that was predicted now may be wrong, by key.
        done_before: Number of objects that were predicted earlier.
        notes: What plates list, but do not have, and what else the user should know: one sentence for each.
        plates: Mean number of nuclei per image of each well, by row and column, of each plate, by its name; of what was
            predicted earlier too.
    """

    counts: dict[str, int]
    failures: dict[str, str]
    warnings: dict[str, str]
    done_before: int
    notes: list[str] = field(default_factory=list)
    plates: dict[str, Wells] = field(default_factory=dict)


def predict_bucket(
    settings: PredictionSettings,
    *,
    engine: EngineChoice = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    single_writer: bool = False,
    anonymous: bool = False,
    verbose: bool = False,
    advance: Advance = no_progress,
    waiting: Callable[[str], None] = lambda _: None,
) -> BucketPrediction:
    """Predict the images that have no result yet, then join the tables of all predicted images.

    Args:
        settings: Images, model, prediction options and location of the results.
        engine: What computes the network; see `PredictionOptions`. The results do not depend on it.
        workers: Number of actors; by default, one per GPU of the cluster, or one per CPU if it has no GPU.
        overwrite: Whether to predict all images again, and to replace results with other settings.
        single_writer: Whether nobody else writes at the same time, so that a server may lack conditional writes.
        anonymous: Whether requests for the images are not signed, as public buckets allow; those for results are.
        verbose: Whether to show Ray's logs.
        advance: Called after each image.
        waiting: Called with a text that says what the actors wait for.

    Raises:
        UsageError: There are no images, or there are results with other settings.
        OutputError: Another prediction with the same output is running.
        NucleusError: The bucket, the model or the cluster cannot be used.
    """
    found = find_images(settings, anonymous=anonymous)
    counts: dict[str, int] = {}
    warnings: dict[str, str] = {}
    failures = dict(found.unread)
    seen: set[str] = set()
    with claim_output(settings, overwrite=overwrite, single_writer=single_writer) as claim:
        wanted = found.images if overwrite else not_done(settings, found.images)
        batches, make = batches_of(wanted), partial(_batch_predictor, settings, engine, anonymous)
        answers = map_on_cluster(batches, make, workers=workers, waiting=waiting, verbose=verbose) if batches else ()
        for outcome in chain.from_iterable(answers):
            claim.check()
            if outcome.nuclei is None:
                failures[outcome.title] = str(outcome.failure)
            else:
                counts[outcome.title] = outcome.nuclei
            if outcome.warning is not None:
                warnings[outcome.title] = outcome.warning
            seen.add(outcome.key)
            advance(len(seen) + len(found.unread), len(wanted) + len(found.unread))
        done = [image for image in found.images if image.key not in failures]
        plates = join_tables(settings, done) if done else {}
    return BucketPrediction(
        dict(sorted(counts.items())),
        dict(sorted(failures.items())),
        dict(sorted(warnings.items())),
        len(found.images) - len(wanted),
        found.notes,
        plates,
    )


def _batch_predictor(
    settings: PredictionSettings, engine: EngineChoice, anonymous: bool
) -> Callable[[Sequence[BucketImage]], list[ImageOutcome]]:
    """Load the model, in an actor, and return the function that predicts a batch."""
    pulled = _pulled(parse_uri(settings.registry) if settings.registry else None, settings.reference)
    return BatchPredictor(
        settings, load_pulled(pulled, replace(settings.options, engine=engine)), anonymous=anonymous
    ).predict


def _pulled(registry: S3Uri | None, reference: Reference) -> PulledModel:
    """Return the model in an actor: a version of a bucket, or the one that comes along with the actor's package."""
    return read_included(reference) if registry is None else pull_cached(Bucket(registry), reference)


@dataclass(frozen=True)
class EvaluationPlan:
    """A model, and the images to score it on.

    Attributes:
        registry: Address of the project's bucket with the model; None for the model that comes along.
        model: The model version.
        dataset: The dataset.
        splits: Some of `train`, `val` and `test`.
        options: Prediction options.
        worst: Number of worst images to keep.
    """

    registry: S3Uri | None
    model: Reference
    dataset: Dataset
    splits: tuple[str, ...]
    options: PredictionOptions
    worst: int


def evaluate_on_cluster(
    plan: EvaluationPlan,
    *,
    workers: int | None,
    verbose: bool = False,
    advance: Advance = no_progress,
    waiting: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Evaluate a model as `nucleus.predict.evaluation.evaluate` does, with actors that each score parts of the splits.

    The images are predicted in the same batches, and their scores are added in the same order. All numbers are
    therefore bit-identical to those of a single process with as many threads as an actor (TF_NUM_INTRAOP_THREADS=1) and
    the same engine on the same kind of machine. Another number of threads, another engine, another CPU or a GPU changes
    the last bits of a convolution: the loss changes by rounding, and a pixel whose probability is that close to a
    threshold may change its label. All other numbers are counted from labels (nuclei, matches, pixels), and are equal
    if the labels are.

    Raises:
        NucleusError: The dataset, the model or the cluster cannot be used.
    """
    parts = [part for split in plan.splits for part in parts_of(plan.dataset, split)]
    images = sum(len(part.positions) for part in parts)
    found: list[PartScores] = []
    make = partial(_part_evaluator, plan)
    for scores in map_on_cluster(parts, make, workers=workers, waiting=waiting, verbose=verbose):
        found.append(scores)
        advance(sum(len(each.scores) for each in found), images)
    return combined_scores(found, plan.worst)


def _part_evaluator(plan: EvaluationPlan) -> Callable[[EvaluationPart], PartScores]:
    """Load the model, in an actor, and return the function that scores a part."""
    model = load_pulled(_pulled(plan.registry, plan.model), plan.options)
    cache = ShardCache(default_cache_dir())
    return lambda part: evaluate_part(model, plan.dataset, part, cache, model.loss, worst=plan.worst)
