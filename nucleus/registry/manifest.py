"""The manifest of a model version: every file with its sum, and where the model comes from."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from nucleus.errors import IntegrityError, ModelError, ObjectNotFoundError
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import read_document

__all__ = [
    "MANIFEST_FILE",
    "MANIFEST_FORMAT",
    "MODELS",
    "EncoderWeightsOrigin",
    "ModelManifest",
    "Origin",
    "StoredFile",
    "model_key",
    "read_model_manifest",
    "read_version",
    "version_of_folder",
    "version_prefix",
    "versions_prefix",
]


MODELS = "models/"
"""Prefix of all models in the project's bucket: in `<name>/` their versions, aliases and decisions of the gate."""
MANIFEST_FORMAT = 1
MANIFEST_FILE = "manifest.json"
_VERSION_FOLDER = re.compile(r"\d{6,}", re.ASCII)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class StoredFile(_Frozen):
    """A file of the version."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class EncoderWeightsOrigin(_Frozen):
    """Which weights the encoder began with.

    Attributes:
        source: `imagenet`, `file`, `s3` or `none`.
        sha256: Of the file; None without one.
    """

    source: str
    sha256: str | None


class Origin(_Frozen):
    """Where a model comes from.

    Attributes:
        run: The training run.
        recipe: The whole recipe.
        dataset: `s3://.../NAME@VERSION`.
        encoder_weights: What the encoder began with.
        metrics: Split, then `all` or kind of image, then metric.
        code_version: Version of this package.
        wandb_run: W&B's path `[entity/]project/id`; None if tracking was disabled.
    """

    run: str
    recipe: dict[str, Any]
    dataset: str
    encoder_weights: EncoderWeightsOrigin
    metrics: dict[str, dict[str, dict[str, float]]]
    code_version: str
    wandb_run: str | None


class ModelManifest(_Frozen):
    """One version of a model. It exists once this file does, and never changes."""

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
        scores = ", ".join(f"{name} {test[name]:.4f}" for name in ("map", "iou") if name in test)
        return f"<ModelManifest {self}: run {self.origin.run} on {self.origin.dataset}; test {scores or 'not scored'}>"


def model_key(name: str, *names: str) -> str:
    """Key of something of a model, below the bucket's prefix."""
    return MODELS + "/".join((name, *names))


def versions_prefix(name: str) -> str:
    """What the keys of all versions of a model begin with."""
    return f"{model_key(name, 'versions')}/"


def version_prefix(name: str, version: int) -> str:
    """Key of a version's folder below the bucket's prefix."""
    return f"{versions_prefix(name)}{version:06d}"


def version_of_folder(folder: str) -> int | None:
    """The number that the name of a version's folder stands for; None for a folder that is no version's."""
    return int(folder) if _VERSION_FOLDER.fullmatch(folder) else None


def read_model_manifest(data: bytes, where: str) -> ModelManifest:
    """Parse and check a manifest. Raises `ModelError` if it is damaged or newer than this package."""
    return read_document(
        ModelManifest, data, what="a model manifest", where=where, newest=MANIFEST_FORMAT, error=ModelError
    )


def read_version(bucket: Bucket, name: str, version: int) -> ModelManifest:
    """The manifest of a version.

    Raises:
        ModelError: There is no such version, or its manifest cannot be read.
        IntegrityError: The manifest is another version's.
    """
    key = f"{version_prefix(name, version)}/{MANIFEST_FILE}"
    try:
        manifest = read_model_manifest(bucket.get(key), str(bucket.uri / key))
    except ObjectNotFoundError as error:
        raise ModelError(f"Expected version {version} of model {name!r}; it does not exist.") from error
    if (manifest.model, manifest.version) != (name, version):
        raise IntegrityError(
            f"Expected the manifest of {name}@{version} at {bucket.uri / key}; found that of "
            f"{manifest.model}@{manifest.version}. It was replaced: take another version."
        )
    return manifest
