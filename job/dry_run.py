"""What a submitted run would be and do, found out without starting anything."""

from dataclasses import dataclass

from job.placement import Room, missing, needed
from job.submission import Submission
from nucleus.config.recipe import Recipe
from nucleus.data.datasets import locate_dataset, open_dataset
from nucleus.storage.uri import bucket_from_environment
from nucleus.versions import installed_versions

__all__ = ["DryRun", "dry_run"]


@dataclass(frozen=True)
class DryRun:
    """What would be submitted.

    Attributes:
        job: Its id.
        entrypoint: The driver's command.
        environment: Its variables.
        bucket: Where the run would write.
        dataset: The dataset with its version.
        versions: Of Python and of the packages here; Ray's is the cluster's too.
        workers: As the recipe has them.
        needed: CPUs and GPUs that the fewest workers take.
        free: CPUs and GPUs of the cluster that nobody holds.
        total: CPUs and GPUs of the cluster.
        waits_for: What the run would have to wait for; None if it can begin at once.
        images: In the training split.
        epochs: At most; it may stop earlier.
        steps: Of all these epochs.
    """

    job: str
    entrypoint: str
    environment: dict[str, str]
    bucket: str
    dataset: str
    versions: dict[str, str]
    workers: str
    needed: dict[str, int]
    free: dict[str, float]
    total: dict[str, float]
    waits_for: str | None
    images: int
    epochs: int
    steps: int


def dry_run(recipe: Recipe, dataset: str, submission: Submission, rooms: dict[str, Room]) -> DryRun:
    """Look at the dataset in the bucket and at the cluster's room.

    Args:
        recipe: The run's.
        dataset: Its dataset, as the recipe or the run to be resumed names it.
        submission: What would be submitted.
        rooms: The cluster's room by `CPU` and `GPU`.

    Raises:
        NucleusError: The dataset cannot be had.
    """
    data = open_dataset(locate_dataset(dataset, recipe.bucket))
    images = len(data.manifest.split_samples("train"))
    return DryRun(
        job=submission.job,
        entrypoint=submission.entrypoint,
        environment=submission.environment,
        bucket=str(bucket_from_environment(recipe.bucket)),
        dataset=str(data),
        versions=installed_versions(),
        workers=str(recipe.workers),
        needed=needed(recipe),
        free={name: room.free for name, room in rooms.items()},
        total={name: room.total for name, room in rooms.items()},
        waits_for=missing(needed(recipe), rooms),
        images=images,
        epochs=recipe.optimizer.epochs,
        steps=images // recipe.input.batch_size * recipe.optimizer.epochs,
    )
