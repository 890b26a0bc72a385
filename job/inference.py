"""Prediction of a bucket's images, and evaluation on a dataset's splits, on a Ray cluster."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from job.actor_pool import map_on_cluster
from nucleus.config.names import EngineChoice, Reference
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset
from nucleus.predict.bucket_images import ImageListing, Messages, PredictionSettings, claim_output
from nucleus.predict.evaluation import (
    Evaluation,
    EvaluationPart,
    PartScores,
    combined_scores,
    evaluate_part,
    parts_of,
)
from nucleus.predict.image_parts import ImagePart, PartName, done_parts, parts_of_listing
from nucleus.predict.model import PredictionOptions, load_pulled
from nucleus.predict.part_prediction import PartOutcome, PartPredictor
from nucleus.predict.part_tables import (
    IMAGES_OF_A_TABLE,
    TableShare,
    clear_tables,
    finish_dataset,
    join_share,
    table_shares,
    write_plates,
)
from nucleus.predict.plates import PlateSums, Wells, join_plates
from nucleus.progress import Advance, no_progress
from nucleus.registry.versions import PulledModel, pull_cached, read_included
from nucleus.storage.bucket import Bucket
from nucleus.storage.claims import PrefixClaim
from nucleus.storage.uri import S3Uri, parse_uri

__all__ = ["BucketPrediction", "EvaluationPlan", "evaluate_on_cluster", "predict_bucket"]


@dataclass(frozen=True)
class BucketPrediction:
    """The outcome of a prediction in a bucket.

    Attributes:
        counts: Number of nuclei per image that was predicted now, by key; planes of a stack are `KEY z=0` and so on.
            None if there are more than 10,000, whose numbers are in the tables alone.
        images: Number of images that were predicted now.
        nuclei: Number of their nuclei.
        failures: Error message per image that could not be read or whose key cannot be used, by key; the first 1,000.
        failed: Number of all these images.
        warnings: Why the result of an image that was predicted now may be wrong, by key; the first 1,000.
        warned: Number of all these images.
        done_before: Number of objects that were predicted earlier.
        tables: Number of tables of nuclei, and of images: more than one lie in the folders `nuclei/` and `images/`.
        notes: What plates list, but do not have, and what else the user should know: one sentence for each.
        plates: Mean number of nuclei per image of each well, by row and column, of each plate, by its name; of what was
            predicted earlier too.
    """

    counts: dict[str, int] | None
    images: int
    nuclei: int
    failures: dict[str, str]
    failed: int
    warnings: dict[str, str]
    warned: int
    done_before: int
    tables: int
    notes: list[str] = field(default_factory=list)
    plates: dict[str, Wells] = field(default_factory=dict)


@dataclass
class _Told:
    """What the workers told so far; its size is limited."""

    counts: dict[str, int] | None = field(default_factory=dict)
    images: int = 0
    nuclei: int = 0
    failures: Messages = field(default_factory=Messages)
    warnings: Messages = field(default_factory=Messages)
    objects: int = 0
    done_before: int = 0

    def add(self, outcome: PartOutcome) -> None:
        """Add the outcome of a part."""
        self.objects += outcome.objects
        self.done_before += outcome.done_before
        for image in outcome.images:
            if image.nuclei is None:
                self.failures.add(image.title, str(image.failure))
                continue
            self.images += 1
            self.nuclei += image.nuclei
            if self.counts is not None:
                self.counts[image.title] = image.nuclei
            if image.warning is not None:
                self.warnings.add(image.title, image.warning)
        if self.images > IMAGES_OF_A_TABLE:
            self.counts = None


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

    The images are listed as a stream, and parts of it dealt to the workers. Of each part, this process keeps a hash.

    Args:
        settings: Images, model, prediction options and location of the results.
        engine: What computes the network; see `PredictionOptions`. The results do not depend on it.
        workers: Number of actors; by default, one per GPU of the cluster, or one per CPU if it has no GPU.
        overwrite: Whether to predict all images again, and to replace results with other settings.
        single_writer: Whether nobody else writes at the same time, so that a server may lack conditional writes.
        anonymous: Whether requests for the images are not signed, as public buckets allow; those for results are.
        verbose: Whether to show Ray's logs.
        advance: Called after each part, with the number of objects so far and of those that are listed.
        waiting: Called with a text that says what the actors wait for.

    Raises:
        UsageError: There are no images, two of them would have the same output, or there are results with other
            settings. Of the first 10,000 images, this is known before any is predicted.
        OutputError: Another prediction with the same output is running.
        NucleusError: The bucket, the model or the cluster cannot be used.
    """
    listing, told = ImageListing(settings, anonymous=anonymous), _Told()
    ahead = _Ahead(parts_of_listing(listing))
    on_cluster = partial(map_on_cluster, workers=workers, waiting=waiting, verbose=verbose)
    with claim_output(settings, overwrite=overwrite, single_writer=single_writer) as claim:
        parts = _Parts(settings, ahead, told, overwrite=overwrite)
        make = partial(_part_predictor, settings, engine, anonymous, overwrite)
        for number, outcome in on_cluster(parts, make):
            claim.check()
            told.add(outcome)
            parts.tables[number] = outcome.table, outcome.objects
            advance(told.objects + listing.unread.count, ahead.objects + listing.unread.count)
        shares = table_shares(parts.finished())
        plates = _join(settings, shares, on_cluster, claim)
    for name, text in told.failures.kept.items():
        listing.unread.add(name, text)
    failed = listing.unread.count + told.failures.count - len(told.failures.kept)
    return BucketPrediction(
        counts=None if told.counts is None else dict(sorted(told.counts.items())),
        images=told.images,
        nuclei=told.nuclei,
        failures=dict(sorted(listing.unread.kept.items())),
        failed=failed,
        warnings=dict(sorted(told.warnings.kept.items())),
        warned=told.warnings.count,
        done_before=told.done_before,
        tables=len(shares),
        notes=listing.notes,
        plates=plates,
    )


class _Ahead:
    """Numbered parts of the images; the first 10,000 images are listed at once, and the largest parts come first.

    Attributes:
        objects: Number of objects that are listed so far.
    """

    def __init__(self, parts: Iterable[ImagePart]) -> None:
        self.objects = 0
        self._rest = self._counted(parts)
        self._first: list[tuple[int, ImagePart]] = []
        while self.objects < IMAGES_OF_A_TABLE and (following := next(self._rest, None)):
            self._first.append(following)
        self._first.sort(key=lambda numbered: -numbered[1].size)  # they take longest

    def _counted(self, parts: Iterable[ImagePart]) -> Iterator[tuple[int, ImagePart]]:
        for number, part in enumerate(parts):
            self.objects += len(part.images)
            yield number, part

    def __iter__(self) -> Iterator[tuple[int, ImagePart]]:
        while self._first:
            yield self._first.pop(0)
        yield from self._rest


class _Parts:
    """The parts that are still to be predicted, with their numbers in the order of the keys; iterated once.

    Attributes:
        tables: Table of each part so far (None: it has none), and the number of its objects, by number.
    """

    def __init__(
        self, settings: PredictionSettings, parts: Iterable[tuple[int, ImagePart]], told: _Told, *, overwrite: bool
    ) -> None:
        self.tables: dict[int, tuple[PartName | None, int]] = {}
        self._parts = parts
        self._told = told
        self._stored = done_parts(settings)
        self._overwrite = overwrite

    def __iter__(self) -> Iterator[tuple[int, ImagePart]]:
        for number, part in self._parts:
            known = replace(part, earlier=self._stored.get(part.place, ()))
            done = None if self._overwrite else known.done
            if done is None:
                yield number, known
            else:
                self.tables[number] = done, len(part.images)
                self._told.add(PartOutcome([], len(part.images), len(part.images), done))

    def finished(self) -> list[tuple[PartName, int]]:
        """Return the tables of all parts, and the number of objects of each, in order."""
        return [(name, objects) for _, (name, objects) in sorted(self.tables.items()) if name is not None]


def _part_predictor(
    settings: PredictionSettings, engine: EngineChoice, anonymous: bool, overwrite: bool
) -> Callable[[tuple[int, ImagePart]], tuple[int, PartOutcome]]:
    """Load the model, in an actor, and return the function that predicts a part."""
    pulled = _pulled(parse_uri(settings.registry) if settings.registry else None, settings.reference)
    model = load_pulled(pulled, replace(settings.options, engine=engine))
    predictor = PartPredictor(settings, model, anonymous=anonymous, overwrite=overwrite)
    return lambda numbered: (numbered[0], predictor.predict(numbered[1]))


def _join(
    settings: PredictionSettings, shares: list[TableShare], on_cluster: Callable[..., Any], claim: PrefixClaim
) -> dict[str, Wells]:
    """Write the tables of all images: one here, several on the cluster; and the pictures of plates."""
    if not shares:
        return {}
    clear_tables(settings, shares)
    sums: PlateSums = {}
    several = len(shares) > 1
    for joined in on_cluster(shares, partial(_joiner, settings)) if several else [join_share(settings, shares[0])]:
        claim.check()
        join_plates(sums, joined)
    if several:
        finish_dataset(settings)
    return write_plates(settings, sums)


def _joiner(settings: PredictionSettings) -> Callable[[TableShare], PlateSums]:
    return partial(join_share, settings)


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
    cache = ShardCache()
    return lambda part: evaluate_part(model, plan.dataset, part, cache, model.loss, worst=plan.worst)
