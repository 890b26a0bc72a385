"""Manifests of model versions: files with SHA-256, and origin. A version exists once its manifest does."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from nucleus.config.names import check_name, clean_name
from nucleus.data.origins import DataSource
from nucleus.errors import IntegrityError, ModelError, ObjectNotFoundError
from nucleus.metrics.scores import Scores, score_cell
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import read_document, sha256_of
from nucleus.text import MISSING

__all__ = [
    "MANIFEST_FILE",
    "MANIFEST_FORMAT",
    "MODELS",
    "EncoderWeightsOrigin",
    "MixOrigin",
    "ModelManifest",
    "Origin",
    "StartOrigin",
    "StoredFile",
    "before_and_after",
    "is_whole",
    "list_models",
    "list_versions",
    "model_key",
    "read_model_manifest",
    "read_version",
    "stored_files",
    "tracked_text",
    "version_of_folder",
    "version_prefix",
    "versions_prefix",
]

MODELS = "models/"
"""Prefix of all models in the project's bucket; `<name>/` contains versions, aliases and decisions of the gate."""
MANIFEST_FORMAT = 3
"""3: with `data`."""
MANIFEST_FILE = "manifest.json"
_DIGITS = 12
"""Digits of a checksum that are shown."""
_VERSION_FOLDER = re.compile(r"\d{6,}", re.ASCII)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class StoredFile(_Frozen):
    """Size (bytes) and SHA-256 of a file of a version."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class EncoderWeightsOrigin(_Frozen):
    """Initial weights of the encoder.

    Attributes:
        source: `imagenet`, `file`, `s3` or `none`.
        sha256: SHA-256 of the weights file; None for `none`.
    """

    source: str
    sha256: str | None


class StartOrigin(_Frozen):
    """The version whose weights a training started with.

    Attributes:
        version: `NAME@VERSION`.
        sha256: SHA-256 of its weights.
        scores: Its scores on the test split of the training's dataset: `all` or kind of image, then metric. Empty if
            there are no test images, or before they are known.
    """

    version: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scores: dict[str, dict[str, float | None]] = {}

    def __str__(self) -> str:
        return f"{self.version} (sha256 {self.sha256[:_DIGITS]})"


class MixOrigin(_Frozen):
    """A dataset that was mixed into a training.

    Attributes:
        dataset: Dataset version, `s3://.../NAME@VERSION`.
        share: Share of the training crops.
        scores: Scores on its test split: `all` or kind of image, then metric. Empty if there are no test images.
        before: The same of the version that training started with; empty without one.
        data: Its sources with their licences; empty in a version of format 2.
    """

    dataset: str
    share: float
    scores: dict[str, dict[str, float | None]] = {}
    before: dict[str, dict[str, float | None]] = {}
    data: list[DataSource] = []


class Origin(_Frozen):
    """Origin of a model.

    Attributes:
        run: Name of the training run.
        recipe: The whole recipe.
        dataset: Dataset version, `s3://.../NAME@VERSION`.
        encoder_weights: Initial weights of the encoder; with `start`, those that the training of that version had.
        start: The version that training started with; None if it started with encoder weights alone.
        mix: Datasets besides `dataset` that crops came from.
        data: Sources of `dataset` with their licences; empty in a version of format 2 or older.
        metrics: Scores by split, then by `all` or kind of image, then by metric; None is undefined.
        code_version: Version of this package.
        wandb_run: Path of the W&B run, `[entity/]project/id`; None if tracking was disabled.
        wandb_mode: How the run was tracked in the end: `online`, `offline` (also if W&B failed during the run) or
            `disabled`; None for a version of format 1.
    """

    run: str
    recipe: dict[str, Any]
    dataset: str
    encoder_weights: EncoderWeightsOrigin
    metrics: dict[str, dict[str, dict[str, float | None]]]
    code_version: str
    wandb_run: str | None
    wandb_mode: str | None = None
    start: StartOrigin | None = None
    mix: list[MixOrigin] = []
    data: list[DataSource] = []

    @property
    def all_data(self) -> list[DataSource]:
        """The sources of all datasets that it was trained on, as far as they are known."""
        card = self.recipe.get("card", {})
        if not self.data and (card.get("data_license") or card.get("data_source")):  # of format 2
            stated = {"license": card.get("data_license"), "origin": card.get("data_source")}
            return [DataSource(name=self.dataset, images=None, **stated)]
        return [*self.data, *(source for mixed in self.mix for source in mixed.data)]

    @property
    def tracked(self) -> str | None:
        """The path of the W&B run, and whether it was offline; None if tracking was disabled."""
        return tracked_text(self.wandb_run, self.wandb_mode)


class _Compared(Protocol):
    """What `before_and_after` needs: an `Origin`, or the record of a run."""

    @property
    def dataset(self) -> str: ...
    @property
    def metrics(self) -> Mapping[str, Mapping[str, Scores]]: ...
    @property
    def start(self) -> StartOrigin | None: ...
    @property
    def mix(self) -> Sequence[MixOrigin]: ...


def before_and_after(of: _Compared, metric: str) -> dict[str, str]:
    """Return, as text by title, the start and the mixed datasets with test scores before and after; maybe nothing."""
    found = {}
    if of.start is not None:
        found["start"] = f"{of.start}; {_change(metric, of.start.scores, of.metrics.get('test', {}))} on {of.dataset}"
    for number, mixed in enumerate(of.mix, start=1):
        title = f"mixed in {number}" if len(of.mix) > 1 else "mixed in"
        share = f"{100 * mixed.share:.0f} % of the crops"
        found[title] = f"{share}; {_change(metric, mixed.before, mixed.scores)} on {mixed.dataset}"
    return found


def _change(metric: str, before: Mapping[str, Scores], after: Mapping[str, Scores]) -> str:
    """Return a score on test images as text, before and after training; the first is left out if it is not known."""
    known = [score_cell(scores["all"], metric) for scores in (before, after) if "all" in scores]
    return f"test {metric} {' -> '.join(known) or MISSING}"


class ModelManifest(_Frozen):
    """Manifest of one version of a model. The version exists once its manifest does, and never changes.

    Attributes:
        format: Version of the format of this document.
        model: Name of the model.
        version: Number of the version.
        created: Time of publication, UTC, ISO 8601.
        files: Files of the version, by name.
        origin: Origin of the model.
    """

    format: int
    model: str
    version: Annotated[int, Field(ge=1)]
    created: str
    files: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")], StoredFile]
    origin: Origin

    def __str__(self) -> str:
        return f"{self.model}@{self.version}"

    def __repr__(self) -> str:
        test = self.origin.metrics.get("test", {}).get("all", {})
        scores = ", ".join(f"{name} {score_cell(test, name)}" for name in ("map", "iou") if name in test)
        return f"<ModelManifest {self}: run {self.origin.run} on {self.origin.dataset}; test {scores or 'not scored'}>"


def stored_files(folder: Path) -> dict[str, StoredFile]:
    """Return size and SHA-256 of the files in a folder, by name; those in its folders are not counted."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: StoredFile(size=path.stat().st_size, sha256=sha256_of(path)) for path in paths}


def tracked_text(wandb_run: str | None, wandb_mode: str | None) -> str | None:
    """Return the path of a W&B run, and whether it was offline.

    >>> tracked_text("team/cells/r1", "online"), tracked_text("cells/r1", "offline")
    ('team/cells/r1', 'cells/r1 (offline)')
    """
    return f"{wandb_run} (offline)" if wandb_run and wandb_mode == "offline" else wandb_run


def model_key(name: str, *names: str) -> str:
    """Return a key in the folder of a model, below the prefix of the bucket."""
    return MODELS + "/".join((name, *names))


def versions_prefix(name: str) -> str:
    """Return the common prefix of the keys of all versions of a model."""
    return f"{model_key(name, 'versions')}/"


def version_prefix(name: str, version: int) -> str:
    """Return the key of the folder of a version, below the prefix of the bucket."""
    return f"{versions_prefix(name)}{version:06d}"


def version_of_folder(folder: str) -> int | None:
    """Return the version number of a folder name; None if it is not the folder of a version."""
    return int(folder) if _VERSION_FOLDER.fullmatch(folder) else None


def read_model_manifest(data: bytes, where: str) -> ModelManifest:
    """Parse and check a manifest. Raises `ModelError` if it is damaged or newer than this package."""
    return read_document(
        ModelManifest, data, what="a model manifest", where=where, newest=MANIFEST_FORMAT, error=ModelError
    )


def read_version(bucket: Bucket, name: str, version: int) -> ModelManifest:
    """Return the manifest of a version.

    Raises:
        ModelError: The version does not exist, or its manifest cannot be read.
        IntegrityError: The manifest belongs to another version.
    """
    key = f"{version_prefix(name, version)}/{MANIFEST_FILE}"
    try:
        manifest = read_model_manifest(bucket.get(key), str(bucket.uri / key))
    except ObjectNotFoundError as error:
        raise ModelError(f"Expected version {version} of model {name!r}; it does not exist.") from error
    if (manifest.model, manifest.version) != (name, version):
        raise IntegrityError(
            f"Expected the manifest of {name}@{version} at {bucket.uri / key}; found that of "
            f"{manifest.model}@{manifest.version}. It was replaced: use another version."
        )
    return manifest


def list_models(bucket: Bucket) -> list[str]:
    """Return the names of the models that have at least one version."""
    names = [name for name in bucket.folders(MODELS) if clean_name(name) == name]  # other folders are not models
    return [name for name in names if list_versions(bucket, name)]


def list_versions(bucket: Bucket, name: str) -> list[int]:
    """Return the numbers of the versions that exist (have a manifest), in order."""
    check_name(name, "model")
    prefix = versions_prefix(name)
    found = (item.key.removeprefix(prefix).partition("/") for item in bucket.objects(prefix))
    versions = (version_of_folder(folder) for folder, _, file in found if file == MANIFEST_FILE)
    return sorted(version for version in versions if version is not None)


def is_whole(folder: Path, manifest: ModelManifest) -> bool:
    """Return whether a folder contains every file of a version with the right SHA-256."""
    try:
        return read_model_manifest((folder / MANIFEST_FILE).read_bytes(), str(folder)) == manifest and all(
            sha256_of(folder / name) == file.sha256 for name, file in manifest.files.items()
        )
    except (OSError, ModelError):
        return False
