"""Model versions in the bucket: publish, list, resolve, pull.

Publishing claims the next number by creating `model.json` under it (`If-None-Match: *`), so two publishers never
write into one version; the manifest comes last, and only with it does the version exist.
"""

import re
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from nucleus.config.names import Reference, check_name, clean_name
from nucleus.errors import ModelError, ObjectExistsError, ObjectNotFoundError, UsageError
from nucleus.registry.aliases import read_alias
from nucleus.registry.manifest import (
    MANIFEST_FILE,
    MANIFEST_FORMAT,
    ModelManifest,
    Origin,
    StoredFile,
    read_model_manifest,
)
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import sha256_of, write_atomic

__all__ = [
    "is_whole",
    "list_models",
    "list_versions",
    "publish",
    "pull",
    "read_version",
    "resolve_version",
    "version_of_run",
    "version_prefix",
]

_CLAIM_FILE = "model.json"
_VERSION = re.compile(r"\d{6,}")


def version_prefix(name: str, version: int) -> str:
    """Key of a version's folder below the bucket's prefix."""
    return f"models/{name}/versions/{version:06d}"


def list_models(bucket: Bucket) -> list[str]:
    """Names of the models that have at least one version."""
    names = [name for name in bucket.folders("models") if clean_name(name) == name]  # what else lies there is not ours
    return [name for name in names if list_versions(bucket, name)]


def list_versions(bucket: Bucket, name: str) -> list[int]:
    """Numbers of the versions that exist (have a manifest), in order."""
    check_name(name, "model")
    prefix = f"models/{name}/versions/"
    found = (item.key.removeprefix(prefix).split("/") for item in bucket.objects(prefix))
    return sorted(
        int(parts[0])
        for parts in found
        if len(parts) == 2 and parts[1] == MANIFEST_FILE and _VERSION.fullmatch(parts[0])
    )


def resolve_version(bucket: Bucket, reference: Reference) -> int:
    """The number that a reference means: itself, the newest whole version for `latest`, or an alias's.

    Raises:
        ModelError: No such model, version or alias.
    """
    versions = list_versions(bucket, reference.name)
    if not versions:
        raise ModelError(
            f"Expected a model {reference.name!r} in {bucket.uri}; it has no version. Run: nucleus models list"
        )
    if reference.ref == "latest":
        return versions[-1]
    if reference.ref.isdecimal():
        version = int(reference.ref)
    else:
        alias = read_alias(bucket, reference.name, reference.ref)
        if alias is None:
            raise ModelError(
                f"Expected a version number, latest or an alias in {str(reference)!r}; {reference.ref!r} is none. "
                f"Run: nucleus models list {reference.name}"
            )
        version = alias.version
    if version not in versions:
        raise ModelError(
            f"Expected version {version} of {reference.name!r} in {bucket.uri}; found "
            f"{', '.join(map(str, versions[-10:]))}. Run: nucleus models list {reference.name}"
        )
    return version


def read_version(bucket: Bucket, name: str, version: int) -> ModelManifest:
    """The manifest of a version. Raises `ModelError`."""
    key = f"{version_prefix(name, version)}/{MANIFEST_FILE}"
    try:
        return read_model_manifest(bucket.get(key), str(bucket.uri / key))
    except ObjectNotFoundError as error:
        raise ModelError(f"Expected version {version} of model {name!r}; it does not exist.") from error


def version_of_run(bucket: Bucket, name: str, run: str) -> ModelManifest | None:
    """The version that a run has published, if any: a run publishes once."""
    for version in reversed(list_versions(bucket, name)):
        manifest = read_version(bucket, name, version)
        if manifest.origin.run == run:
            return manifest
    return None


def publish(bucket: Bucket, name: str, folder: Path, origin: Origin) -> ModelManifest:
    """Publish the files of a folder as the next version of a model.

    Args:
        bucket: Where to.
        name: The model.
        folder: Flat folder with `model.json`, `model.weights.h5` and what goes with them.
        origin: Where the model comes from.
    """
    check_name(name, "model")
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    files = {path.name: StoredFile(size=path.stat().st_size, sha256=sha256_of(path)) for path in paths}
    version = _claim(bucket, name, folder / _CLAIM_FILE)
    prefix = version_prefix(name, version)
    for path in paths:
        if path.name != _CLAIM_FILE:
            bucket.put(f"{prefix}/{path.name}", path, if_absent=True)
    manifest = ModelManifest(
        format=MANIFEST_FORMAT,
        model=name,
        version=version,
        created=datetime.now(UTC).isoformat(),
        files=files,
        origin=origin,
    )
    bucket.put(f"{prefix}/{MANIFEST_FILE}", manifest.model_dump_json(indent=1).encode(), if_absent=True)
    return manifest


def _claim(bucket: Bucket, name: str, claim: Path) -> int:
    """Take the next free number for good; numbers that an interrupted publisher took stay unused."""
    prefix = f"models/{name}/versions"
    taken = [int(folder) for folder in bucket.folders(prefix) if _VERSION.fullmatch(folder)]
    version = max(taken, default=0) + 1
    while True:
        try:
            bucket.put(f"{version_prefix(name, version)}/{_CLAIM_FILE}", claim, if_absent=True)
        except ObjectExistsError:
            version += 1
        else:
            return version


def pull(bucket: Bucket, reference: Reference, folder: Path) -> ModelManifest:
    """Bring a version into `folder`, which afterwards holds the whole model or is as it was.

    A folder that already holds this version whole is left alone; a damaged copy of it is replaced.

    Raises:
        ModelError: No such version.
        IntegrityError: A stored file does not have its sum.
        UsageError: The folder holds something else.
    """
    version = resolve_version(bucket, reference)
    manifest = read_version(bucket, reference.name, version)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not is_whole(folder, manifest):
            _check_replaceable(folder, manifest)
            _replace(bucket, manifest, folder)
    return manifest


def _replace(bucket: Bucket, manifest: ModelManifest, folder: Path) -> None:
    """Download a version beside `folder`, then put it in its place."""
    token = secrets.token_hex(4)
    beside, old = (folder.with_name(f".{folder.name}-{token}{end}") for end in ("", "-old"))
    prefix = version_prefix(manifest.model, manifest.version)
    try:
        for name, file in manifest.files.items():
            bucket.download(f"{prefix}/{name}", beside / name, sha256=file.sha256)
        write_atomic(beside / MANIFEST_FILE, manifest.model_dump_json(indent=1))
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def is_whole(folder: Path, manifest: ModelManifest) -> bool:
    """Whether a folder holds every file of a version with the right sum."""
    try:
        return read_model_manifest((folder / MANIFEST_FILE).read_bytes(), str(folder)) == manifest and all(
            sha256_of(folder / name) == file.sha256 for name, file in manifest.files.items()
        )
    except (OSError, ModelError):
        return False


def _check_replaceable(folder: Path, manifest: ModelManifest) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    expected = {*manifest.files, MANIFEST_FILE}
    if not folder.is_dir() or any(path.name not in expected for path in folder.iterdir()):
        raise UsageError(
            f"Expected {folder} to be absent, empty or a copy of {manifest.model}; it holds other files. "
            "Name another folder."
        )
