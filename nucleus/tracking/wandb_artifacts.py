"""What W&B is told once a run's model is published: the version as a reference, and the worst test images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nucleus.config.recipe import TrackingOptions
from nucleus.lazy import wandb
from nucleus.registry.manifest import MANIFEST_FILE, ModelManifest
from nucleus.storage.s3_errors import explained
from nucleus.storage.uri import S3Uri
from nucleus.tracking.offline_runs import logged_artifacts, wait_until_written
from nucleus.tracking.wandb_run import open_run, staged_in

__all__ = ["REGISTRY", "TABLE", "WorstImage", "note_published", "summary_of"]


REGISTRY = "wandb-registry-model"
"""W&B's registry of models; each model is a collection there."""
TABLE = "worst_images"
"""The table's key in the run's summary."""

_NUMBERS = ("nuclei", "found", "missed", "extra", "merged", "split")
_COLUMNS = ["name", "kind", "mAP", "AP.5", "IoU", *_NUMBERS, "image", "mistakes"]


class WorstImage(Protocol):
    """A test image as the run's record has it; see `nucleus.runs.record.TestImage`."""

    @property
    def name(self) -> str:
        """In the dataset."""

    @property
    def kind(self) -> Any:
        """Its kind."""

    @property
    def scores(self) -> dict[str, float]:
        """By name: `map`, `ap_50`, `iou`."""

    @property
    def nuclei(self) -> int:
        """How many there are."""

    @property
    def predicted(self) -> int:
        """How many were found."""

    @property
    def missed(self) -> int:
        """As `nucleus.metrics.nuclei` has them, like the next three."""

    @property
    def extra(self) -> int:
        """Predicted nuclei that match none."""

    @property
    def merged(self) -> int:
        """True nuclei that lie in one predicted nucleus with others."""

    @property
    def split(self) -> int:
        """True nuclei that were cut in two or more."""


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
    pictures: Path,
    alias: str | None = None,
    commit: str | None = None,
) -> list[str]:
    """Go on with a run under its id: log the table of its worst images, and the version as an artifact of references.

    The artifact `<model>` of the type `model` names each file of the version's folder, which never changes, by address,
    size and ETag; our SHA-256 sums are in its metadata. Its aliases in W&B are `version-<number>` (`v<number>` is W&B's
    own counting) and `alias`. Online it is linked to the registry. W&B itself never reads the bucket.

    Called again for the same version, it adds nothing. Offline, what is to be sent lies in `folder`; see `kept_files`.

    Args:
        run: The run's name and id.
        options: Project and entity.
        mode: `online`, `offline` or `disabled`.
        folder: W&B's files go to its folder `wandb`.
        group: What the run belongs to, such as a sweep.
        manifest: The version.
        uri: Of its folder.
        history: The metrics of each epoch: to send this part of an offline run replaces the summary that was sent
            before, so it is written again.
        worst: The worst test images, worst first.
        pictures: Local folder with `<name>/image.png` and `<name>/mistakes.png` of each of them.
        alias: That of the recipe, if the gate moved it to this version.
        commit: Of this package's code.

    Returns:
        What could not be done, in words: the model is published all the same.
    """
    if mode == "disabled":
        return []
    aliases = [f"version-{manifest.version}", *([alias] if alias else [])]
    if mode == "offline" and _is_noted(folder, run, manifest, aliases):
        return []
    try:
        opened = open_run(run, options, mode, folder, group=group, commit=commit, system=False)
    except Exception as error:  # W&B has no one class for all that it raises, and the model is published
        return [_not_told(manifest, run, error)]
    problems = []
    with staged_in(Path(opened.settings.sync_dir)):
        try:
            opened.summary.update({**_last_values(history), **summary_of(manifest.origin.metrics)})
            opened.summary[TABLE] = _table(worst, pictures)
            artifact = opened.log_artifact(_artifact(manifest, uri), aliases=aliases)
            if not opened.offline:
                artifact.wait()
                problems = _linked(opened, artifact, manifest.model, aliases)
        except Exception as error:  # as above
            problems = [_not_told(manifest, run, error)]
        finally:
            opened.finish()
    if mode == "offline":
        wait_until_written(folder, run)
    return problems


def summary_of(metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """The summary of a run that has finished, `<split>_<metric>`, from split, then `all` or kind, then metric."""
    return {f"{split}_{name}": value for split, kinds in metrics.items() for name, value in kinds["all"].items()}


def _last_values(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: value for metrics in history for name, value in metrics.items()}


def _is_noted(folder: Path, run: str, manifest: ModelManifest, aliases: list[str]) -> bool:
    return any(
        artifact.type == "model"
        and artifact.metadata.get("version") == manifest.version
        and {*aliases} <= artifact.aliases
        for artifact in logged_artifacts(folder, run)
    )


def _table(worst: Sequence[WorstImage], pictures: Path) -> Any:

    rows = [
        [
            image.name,
            str(image.kind),
            *(image.scores[score] for score in ("map", "ap_50", "iou")),
            *(image.nuclei, image.predicted, image.missed, image.extra, image.merged, image.split),
            *(wandb.Image(str(pictures / image.name / f"{name}.png")) for name in ("image", "mistakes")),
        ]
        for image in worst
    ]
    return wandb.Table(columns=_COLUMNS, data=rows)


def _artifact(manifest: ModelManifest, uri: S3Uri) -> Any:
    """Raises `StorageError` if the version's files cannot be looked at."""

    origin = manifest.origin
    metadata = {
        "version": manifest.version,
        "uri": str(uri),
        "run": origin.run,
        "dataset": origin.dataset,
        "encoder_weights": origin.encoder_weights.model_dump(),
        "code_version": origin.code_version,
        "metrics": origin.metrics,
        "files": {name: file.model_dump() for name, file in manifest.files.items()},
    }
    artifact = wandb.Artifact(manifest.model, "model", description=str(uri), metadata=metadata)
    for name in (*manifest.files, MANIFEST_FILE):  # not the folder: to list it is a right that a job may lack
        with explained(uri / name):
            artifact.add_reference(str(uri / name), name=name)
    return artifact


def _linked(opened: Any, artifact: Any, model: str, aliases: list[str]) -> list[str]:
    """Link the artifact to the registry; return why not, in W&B's words."""
    target = f"{REGISTRY}/{model}"
    try:
        opened.link_artifact(artifact, target, aliases=aliases)
    except Exception as error:  # W&B has no one class for what an account may not do
        return [f"Expected to link {artifact.name} to W&B's registry as {target}; W&B says: {error}"]
    return []


def _not_told(manifest: ModelManifest, run: str, error: Exception) -> str:
    return (
        f"Expected to tell W&B of {manifest.model}@{manifest.version}, which is published; {error} "
        f"To tell it again: nucleus train RECIPE --resume {run}"
    )
