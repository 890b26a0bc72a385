"""Model versions: listed, found by the text that a user gives for one, and pulled; and the model that comes along.

A version exists once its manifest does, which its publisher writes last. `find_model` is the one way from what a user
names (nothing, a name, a folder) to verified files.
"""

import difflib
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nucleus.config.names import Reference, check_name, parse_reference
from nucleus.errors import IntegrityError, ModelError, ObjectNotFoundError, UriError, UsageError
from nucleus.progress import Advance, no_progress, split_progress
from nucleus.registry.aliases import read_alias
from nucleus.registry.manifest import (
    MANIFEST_FILE,
    MODELS,
    ModelManifest,
    is_whole,
    list_versions,
    read_model_manifest,
    read_version,
    version_prefix,
)
from nucleus.registry.publish import run_of_claim
from nucleus.storage.bucket import Bucket
from nucleus.storage.claims import file_lock
from nucleus.storage.files import put_in_place, sha256_of, write_atomic, writing
from nucleus.storage.uri import S3Uri, bucket_from_environment, is_uri, local_path, parse_uri
from nucleus.surroundings import cache_folder

__all__ = [
    "INCLUDED",
    "ModelLocation",
    "PulledModel",
    "check_model_path",
    "fill_folder",
    "find_model",
    "is_included",
    "is_pulled",
    "locate_model",
    "pull",
    "pull_cached",
    "pull_uri",
    "read_included",
    "read_pulled",
    "resolve_version",
    "version_of_run",
]


_PULLED = re.compile(r"(?:^|[/\\])([a-z0-9][a-z0-9._-]*)(?:-|/versions/)(\d+)[/\\]?$", re.ASCII)
"""End of a path that looks like a version: the folder of a pulled one, or its prefix in the bucket."""
_IN_BUCKET = re.compile(
    r"(?P<above>.*?)models/(?P<name>[^/@]+)(?:@(?P<ref>[^/@]+)|/versions/(?P<version>\d+))?", re.ASCII
)
"""Key of `s3://bucket[/prefix]/models/NAME[@REF]`, or of the folder of a version."""

INCLUDED = "nuclei"
"""Name of the model that comes along. A model of this name in a bucket is asked for with a version, as `nuclei@1`."""
_INCLUDED_FOLDER = Path(__file__).parent / "included" / INCLUDED
_INCLUDED_NAME = re.compile(rf"{INCLUDED}(@[0-9a-f]{{12}})?")
_OR_INCLUDED = f"Or use the model that comes along: {INCLUDED}."


@dataclass(frozen=True)
class PulledModel:
    """A model version on this machine, verified: its files match the SHA-256 in the manifest.

    Attributes:
        folder: Its folder.
        manifest: Its manifest.
        included: Whether it is the model that comes along with this package.
        uri: Its folder in a bucket; None if it is only on this machine.
    """

    folder: Path
    manifest: ModelManifest
    included: bool = False
    uri: S3Uri | None = None

    @property
    def reference(self) -> Reference:
        """Name and version; the version of the model that comes along is the start of its manifest's SHA-256."""
        version = sha256_of(self.folder / MANIFEST_FILE)[:12] if self.included else str(self.manifest.version)
        return Reference(self.manifest.model, version)

    def __str__(self) -> str:
        return str(self.reference)


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is: a bucket, and the name and version in it."""

    bucket: S3Uri
    reference: Reference


def find_model(
    model: str | None = None,
    bucket: str | None = None,
    progress: Callable[[str, Literal["bytes"]], AbstractContextManager[Advance]] = lambda *_: nullcontext(no_progress),
) -> PulledModel:
    """Return a verified model: the one that comes along, a pulled folder, or a version of a bucket, in the cache.

    Args:
        model: A folder that `nucleus models pull` made, or what `locate_model` takes, which is pulled into the cache;
            None and `nuclei` mean the model that comes along, which needs no bucket.
        bucket: URI of the bucket of names without one; None for that of NUCLEUS_BUCKET.
        progress: Shows the progress of a download; called with a title and its unit.

    Raises:
        ModelError: The model or version does not exist, or cannot be read.
        IntegrityError: A file does not match its SHA-256.
        UsageError: The name means two models, or is a path without a pulled model.
        UriError: No bucket is set, or the name is not a possible one.
    """
    if model is None:
        return read_included()
    if is_included(model):
        if is_pulled(model):
            raise UsageError(
                f"Expected one model of the name {model}; it is both the model that comes along and a folder here. "
                f"Name the folder as ./{model}, or rename it."
            )
        return read_included(parse_reference(model, "model") if "@" in model else None)
    if is_pulled(model):
        return read_pulled(Path(model))
    location = locate_model(model, bucket)
    registry = Bucket(location.bucket)
    registry.check(MODELS)
    with progress(f"download {model}", "bytes") as advance:
        return pull_cached(registry, location.reference, advance)


def is_included(model: str | None) -> bool:
    """Return whether a name means the model that comes along: none, `nuclei`, or `nuclei@` and the start of a sum."""
    return model is None or _INCLUDED_NAME.fullmatch(model) is not None


def is_pulled(model: str) -> bool:
    """Return whether a model is given as the folder that it was pulled to."""
    return (Path(model) / MANIFEST_FILE).is_file()


def read_included(reference: Reference | None = None) -> PulledModel:
    """Verify the model that comes along with this package.

    Args:
        reference: The one that it must be; by default, any.

    Raises:
        ModelError: This package brings another one.
        IntegrityError: A file is missing or damaged.
    """
    path = _INCLUDED_FOLDER / MANIFEST_FILE
    try:
        manifest = read_model_manifest(path.read_bytes(), str(path))
    except (OSError, ModelError):
        manifest = None
    if manifest is None or not is_whole(_INCLUDED_FOLDER, manifest):
        raise IntegrityError(
            f"Expected the model that comes along in {_INCLUDED_FOLDER}, with the SHA-256 of its manifest; a file is "
            "missing or damaged. Install the package again."
        )
    found = PulledModel(_INCLUDED_FOLDER, manifest, included=True)
    if reference not in {None, found.reference}:
        raise ModelError(
            f"Expected {reference}, which came along with another version of this package; this one brings {found}. "
            f"Use {INCLUDED}, or install that version (on a cluster: the same one on all machines)."
        )
    return found


def locate_model(model: str, bucket: str | None = None) -> ModelLocation:
    """Parse `NAME[@REF]`, in `bucket` or NUCLEUS_BUCKET; `s3://bucket[/prefix]/models/NAME[@REF]`; a version's folder.

    Raises:
        UsageError: None of these forms.
        UriError: An invalid name, or no bucket is set.
    """
    check_model_path(model)
    if not is_uri(model):
        reference = parse_reference(model, "model")
        try:
            return ModelLocation(bucket_from_environment(bucket), reference)
        except UriError as error:
            raise UriError(
                f"Expected the model that comes along, {INCLUDED}, or a bucket with others: {error}"
            ) from error
    uri = parse_uri(model)
    found = _IN_BUCKET.fullmatch(uri.key)
    if found is None or (found["above"] and not found["above"].endswith("/")):
        raise UsageError(
            f"Expected s3://bucket/models/NAME[@REF], or the folder of a version in it; found {model}. Run: nucleus "
            "models list"
        )
    name = check_name(found["name"], "model")
    ref = str(int(found["version"])) if found["version"] else found["ref"] or "latest"
    return ModelLocation(S3Uri(uri.bucket, found["above"].strip("/")), Reference(name, ref))


def resolve_version(bucket: Bucket, reference: Reference) -> int:
    """Return the version number of a reference, which names a number, `latest` (the newest version) or an alias.

    Raises:
        ModelError: The model, version or alias does not exist.
    """
    versions = list_versions(bucket, reference.name)
    if not versions:
        raise ModelError(
            f"Expected a model {reference.name!r} in {bucket.uri}; it has no version.{_meant(bucket, reference.name)} "
            f"Run: nucleus models list. {_OR_INCLUDED}"
        )
    if reference.ref == "latest":
        return versions[-1]
    if reference.ref.isdecimal():
        version = int(reference.ref)
    else:
        alias = read_alias(bucket, reference.name, reference.ref)
        if alias is None:
            raise ModelError(
                f"Expected a version number, latest or an alias in {str(reference)!r}; {reference.ref!r} is none of "
                f"them.{_number_meant(reference.ref)} Run: nucleus models list {reference.name}"
            )
        version = alias.version
    if version not in versions:
        raise ModelError(
            f"Expected version {version} of {reference.name!r} in {bucket.uri}; found "
            f"{', '.join(map(str, versions[-10:]))}. Run: nucleus models list {reference.name}"
        )
    return version


def _meant(bucket: Bucket, name: str) -> str:
    """Return a sentence, with a blank before it, with what the name of a missing model may mean; or nothing."""
    near = difflib.get_close_matches(name, bucket.folders(MODELS), n=3)
    return _number_meant(name) or (f" Did you mean {' or '.join(near)}?" if near else "")


def _number_meant(text: str) -> str:
    """Return a sentence, with a blank before it, if a name or path ends like a pulled folder's; or nothing.

    >>> _number_meant("runs/cells-000003")
    ' A version is written with @, such as cells@3.'
    """
    found = _PULLED.search(text)
    return f" A version is written with @, such as {found[1]}@{int(found[2])}." if found else ""


def version_of_run(bucket: Bucket, name: str, run: str) -> ModelManifest | None:
    """Return the version that a run has published, or None; a run publishes at most once.

    Raises:
        ModelError, IntegrityError: The manifest of a version that may be from this run cannot be read.
    """
    for version in reversed(list_versions(bucket, name)):
        try:
            manifest = read_version(bucket, name, version)
        except (ModelError, IntegrityError):
            if run_of_claim(bucket, name, version) in {None, run}:
                raise
            continue
        if manifest.origin.run == run:
            return manifest
    return None


def pull(bucket: Bucket, reference: Reference, folder: Path, advance: Advance = no_progress) -> ModelManifest:
    """Download a version into `folder`; if the download fails, the folder is unchanged.

    An intact copy of this version is left as it is; a damaged copy is replaced. `advance` is called with the bytes
    downloaded and their total.

    Returns:
        Manifest of the version.

    Raises:
        ModelError: The version does not exist.
        IntegrityError: A stored file does not match its SHA-256.
        UsageError: The folder contains other files.
    """
    manifest = read_version(bucket, reference.name, resolve_version(bucket, reference))
    _bring(_folder_of(bucket, manifest), manifest, folder, advance)
    return manifest


def pull_cached(bucket: Bucket, reference: Reference, advance: Advance = no_progress) -> PulledModel:
    """Return a version in the cache, downloaded if it is not there yet. Raises the errors of `pull`."""
    manifest = read_version(bucket, reference.name, resolve_version(bucket, reference))
    folder = cache_folder() / MODELS / local_path(bucket.uri / manifest.model / f"{manifest.version:06d}")
    source = _folder_of(bucket, manifest)
    _bring(source, manifest, folder, advance)
    return PulledModel(folder, manifest, uri=source.uri)


def pull_uri(uri: S3Uri, cache: Path, advance: Advance = no_progress) -> PulledModel:
    """Return a version in a cache by its folder in a bucket, or that of a copy; downloaded if it is not there yet.

    Raises:
        ModelError: The manifest is damaged or newer than this package.
        IntegrityError: The manifest or a file is missing, or a file does not match its SHA-256.
    """
    source = Bucket(uri)
    try:
        manifest = read_model_manifest(source.get(MANIFEST_FILE), str(uri / MANIFEST_FILE))
    except ObjectNotFoundError as error:
        raise IntegrityError(f"Expected a version of a model in {uri}; it has no {MANIFEST_FILE}.") from error
    folder = cache / MODELS / local_path(uri)
    _bring(source, manifest, folder, advance)
    return PulledModel(folder, manifest, uri=uri)


def _folder_of(bucket: Bucket, manifest: ModelManifest) -> Bucket:
    """Return the folder of a version as a bucket."""
    return Bucket(bucket.uri / version_prefix(manifest.model, manifest.version))


def read_pulled(folder: Path) -> PulledModel:
    """Verify a folder that `nucleus models pull` made. Raises `IntegrityError` or `ModelError`."""
    try:
        manifest = read_model_manifest((folder / MANIFEST_FILE).read_bytes(), str(folder / MANIFEST_FILE))
    except OSError as error:
        raise IntegrityError(
            f"Expected a pulled model in {folder}; it has no {MANIFEST_FILE}. Run: nucleus models pull NAME {folder}"
        ) from error
    if not is_whole(folder, manifest):
        raise IntegrityError(
            f"Expected the files in {folder} to match the SHA-256 in their manifest; some do not. "
            f"Remove the folder and run: nucleus models pull {manifest.model}@{manifest.version} {folder}"
        )
    return PulledModel(folder, manifest)


def check_model_path(model: str) -> None:
    """Raise `UsageError` if a model is given as a path, not as NAME[@REF] or URI, and no pulled model is there."""
    if is_uri(model):
        return
    path = Path(model)
    versions = sorted(file.parent for level in ("*", "*/*") for file in path.glob(f"{level}/{MANIFEST_FILE}"))
    if path.is_dir() and versions and "@" not in model:
        raise UsageError(
            f"Expected NAME[@REF] or the folder of one pulled version; found {path}, a folder with "
            f"{', '.join(map(str, versions[:10]))}. Name one of them (or NAME@latest, for a model in the bucket)."
        )
    if path.is_file():
        raise UsageError(f"Expected NAME[@REF] or the folder of a pulled version; {path} is a file. Name its folder.")
    if {"/", "\\"} & set(model):
        found = "a folder without " + MANIFEST_FILE if path.is_dir() else "nothing there"
        raise UsageError(
            f"Expected a pulled model at {path}; found {found}.{_number_meant(model)} Run: nucleus models pull "
            f"NAME@VERSION {path}"
        )


def fill_folder(folder: Path, manifest: ModelManifest, make: Callable[[Path], ModelManifest]) -> ModelManifest:
    """Put other files of a version into a folder; if that fails, the folder is unchanged.

    Args:
        folder: The folder.
        manifest: Manifest of the version.
        make: Writes the files into an empty folder, and returns their manifest.

    Returns:
        The manifest that `make` returned, which is written beside the files.

    Raises:
        UsageError: The folder contains other files.
    """
    with file_lock(folder.with_name(f".{folder.name}.lock")), writing(folder):
        _check_replaceable(folder, manifest)
        return _replace(folder, make)


def _bring(source: Bucket, manifest: ModelManifest, folder: Path, advance: Advance) -> None:
    """Download a version from its folder in a bucket, unless `folder` already contains it, intact."""
    with file_lock(folder.with_name(f".{folder.name}.lock")), writing(folder):
        if not is_whole(folder, manifest):
            _check_replaceable(folder, manifest)
            _replace(folder, lambda beside: _download(source, manifest, beside, advance))


def _download(source: Bucket, manifest: ModelManifest, folder: Path, advance: Advance) -> ModelManifest:
    """Download the files of a version into an empty folder."""
    shares = split_progress({name: file.size for name, file in manifest.files.items()}, advance)
    for name, file in manifest.files.items():
        try:
            source.download(name, folder / name, sha256=file.sha256, advance=shares[name])
        except ObjectNotFoundError as error:
            raise IntegrityError(
                f"Expected {name} of {manifest} in {source.uri}, as its manifest says; it is missing. Use another "
                "version."
            ) from error
    return manifest


def _replace(folder: Path, make: Callable[[Path], ModelManifest]) -> ModelManifest:
    """Make the files of a version in a folder beside `folder`, then replace `folder` by it."""
    token = secrets.token_hex(4)
    beside, old = (folder.with_name(f".{folder.name}-{token}{end}") for end in ("", "-old"))
    try:
        beside.mkdir(parents=True)
        manifest = make(beside)
        write_atomic(beside / MANIFEST_FILE, manifest.model_dump_json(indent=1))
        put_in_place(beside, folder, old)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return manifest


def _check_replaceable(folder: Path, manifest: ModelManifest) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    expected = {*manifest.files, MANIFEST_FILE}
    if not folder.is_dir() or any(path.name not in expected for path in folder.iterdir()):
        found = "other files"
    elif (other := _model_in(folder)) in {None, manifest.model}:
        return
    else:
        found = f"the model {other}"
    raise UsageError(
        f"Expected {folder} to be absent, empty or a copy of {manifest.model}; it contains {found}. "
        "Name another folder."
    )


def _model_in(folder: Path) -> str | None:
    """Return the name of the model that was pulled into a folder; None if its manifest is missing or damaged."""
    try:
        return read_model_manifest((folder / MANIFEST_FILE).read_bytes(), str(folder / MANIFEST_FILE)).model
    except (OSError, ModelError):
        return None
