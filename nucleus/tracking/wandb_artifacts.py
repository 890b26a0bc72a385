"""Published model versions in W&B: an artifact of references to the files, and the worst test images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nucleus.config.recipe import TrackingOptions
from nucleus.lazy import wandb
from nucleus.registry.manifest import MANIFEST_FILE, ModelManifest
from nucleus.storage.bucket import Bucket
from nucleus.storage.s3_errors import explained
from nucleus.storage.uri import S3Uri
from nucleus.text import first_line
from nucleus.tracking.failover import server_problem
from nucleus.tracking.wandb_run import WandbRun, WorstImage, is_noted

__all__ = ["REGISTRY", "note_published", "summary_of"]


REGISTRY = "wandb-registry-model"
"""W&B's registry of models, with one collection per model."""
_WAIT_SECONDS = 60
"""Longest wait until W&B's server has taken an artifact."""


def note_published(
    run: str,
    options: TrackingOptions,
    mode: str,
    folder: Path,
    group: str | None = None,
    *,
    manifest: ModelManifest,
    uri: S3Uri,
    history: Sequence[Mapping[str, float]],
    worst: Sequence[WorstImage],
    alias: str | None = None,
    commit: str | None = None,
    first_epoch: int = 1,
) -> list[str]:
    """Continue a run in W&B: log its worst test images, and the published version as an artifact of references.

    The artifact `<model>` of type `model` has one entry per file of the version's folder, which never changes: address,
    size and ETag. The SHA-256 sums are in its metadata. Its aliases in W&B are `version-<number>` (`v<number>` is W&B's
    own count) and `alias`. In online mode it is linked to the registry. W&B's server never reads the bucket.

    A second call for the same version adds nothing. If an offline run is killed between logging and writing its ledger,
    the next call logs the same artifact again, which W&B recognises by its digest.

    Args:
        run: Name and id of the run.
        options: Project and entity.
        mode: `online`, `offline` or `disabled`.
        folder: Folder in which W&B creates its folder `wandb`.
        group: Group of the run, such as a sweep.
        manifest: Manifest of the version.
        uri: Address of the version's folder.
        history: Metrics of each epoch, for the summary: `wandb sync` of an attempt replaces the previous summary.
        worst: The worst test images, worst first.
        alias: The recipe's alias if the gate moved it to this version, else None.
        commit: Commit of this package's code.
        first_epoch: Number in W&B of the run's first epoch.

    Returns:
        Messages of problems, which are not raised because the model is published.
    """
    if mode == "disabled":
        return []
    aliases = [f"version-{manifest.version}", *([alias] if alias else [])]
    if mode == "offline" and is_noted(folder, run, manifest.version, aliases):
        return []
    unusable = server_problem() if mode == "online" else None
    if unusable is not None:
        return [_not_noted(manifest, run, unusable)]
    try:
        opened = WandbRun(run, options, mode, folder, group=group, commit=commit, first_epoch=first_epoch, system=False)
    except Exception as error:  # W&B's errors have no common class, and the model is published
        return [_not_noted(manifest, run, first_line(error))]
    problems = []
    try:
        opened.worst_images(len(history), worst)
        artifact = opened.wandb_run.log_artifact(_artifact(manifest, uri), aliases=aliases)
        if not opened.wandb_run.offline:
            artifact.wait(timeout=_WAIT_SECONDS)
            problems = _link(opened.wandb_run, artifact, manifest.model, aliases)
    except Exception as error:  # as above
        problems = [_not_noted(manifest, run, first_line(error))]
    problems += _finished(opened, {**_last_values(history), **summary_of(manifest.origin.metrics)})
    if not problems:
        opened.note_version(manifest.version, aliases)
    return problems


def _finished(opened: WandbRun, summary: Mapping[str, float]) -> list[str]:
    """Close the run; return the message of a problem, or an empty list."""
    try:
        problem = opened.finish(summary)
    except Exception as error:  # as in `note_published`
        problem = f"W&B failed to close the run: {first_line(error)}"
    return [problem] if problem else []


def summary_of(metrics: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> dict[str, float]:
    """Return the summary of a finished run, `<split>_<metric>`.

    Args:
        metrics: Scores: split, then `all` or kind of image, then metric.
    """
    return {
        f"{split}_{name}": value
        for split, kinds in metrics.items()
        for name, value in kinds["all"].items()
        if value is not None
    }


def _last_values(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: value for metrics in history for name, value in metrics.items()}


def _artifact(manifest: ModelManifest, uri: S3Uri) -> Any:
    """Return the artifact of a version. Raises `StorageError` if the version's files cannot be read."""
    origin = manifest.origin
    metadata = {
        "version": manifest.version,
        "uri": str(uri),
        "run": origin.run,
        "dataset": origin.dataset,
        "encoder_weights": origin.encoder_weights.model_dump(),
        "start": origin.start and origin.start.model_dump(),
        "mix": [mixed.model_dump() for mixed in origin.mix],
        "code_version": origin.code_version,
        "metrics": origin.metrics,
        "files": {name: file.model_dump() for name, file in manifest.files.items()},
    }
    artifact = wandb.Artifact(manifest.model, "model", description=str(uri), metadata=metadata)
    endpoint = Bucket(uri).endpoint
    for name in (*manifest.files, MANIFEST_FILE):  # not the whole folder: a job may lack permission to list it
        with explained(uri / name, endpoint):
            artifact.add_reference(str(uri / name), name=name)
    return artifact


def _link(wandb_run: Any, artifact: Any, model: str, aliases: list[str]) -> list[str]:
    """Link the artifact to the registry; return the message of a problem, or an empty list."""
    target = f"{REGISTRY}/{model}"
    try:
        wandb_run.link_artifact(artifact, target, aliases=aliases)
    except Exception as error:  # W&B has no error class for missing permissions
        return [f"Expected to link {artifact.name} to W&B's registry as {target}; W&B says: {first_line(error)}"]
    return []


def _not_noted(manifest: ModelManifest, run: str, cause: str) -> str:
    return (
        f"Expected to log {manifest.model}@{manifest.version}, which is published, in W&B; {cause} "
        f"To log it again: nucleus train --resume {run}"
    )
