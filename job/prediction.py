"""Predict the images of a bucket on a Ray cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from job.spread import spread
from nucleus.predict.stored import (
    ImageOutcome,
    PredictionSettings,
    StoredImage,
    batches_of,
    claim_output,
    find_images,
    join_tables,
    not_done,
)
from nucleus.progress import Advance, no_progress
from nucleus.registry.versions import pull_cached
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import parse_uri

__all__ = ["StoredResult", "predict_stored"]


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
    from nucleus.predict.batch import BatchPredictor
    from nucleus.predict.predictor import load_predictor

    folder = pull_cached(Bucket(parse_uri(settings.registry)), settings.reference)
    return BatchPredictor(settings, load_predictor(folder, settings.options)).predict
