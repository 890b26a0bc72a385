"""Publishing of model versions: claims on version numbers, uploads, and leftovers of publishers that died.

A publisher takes a number by creating its `claim.json` (`If-None-Match: *`). Every claim is unique, so a publisher that
repeats a request recognises its own claim by the bytes. The number of a publisher that died stays taken until
`remove_leftover`.
"""

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from nucleus.config.names import check_name
from nucleus.errors import ModelError, ObjectExistsError, ObjectNotFoundError
from nucleus.progress import Advance, no_progress, split_progress
from nucleus.registry.manifest import (
    MANIFEST_FILE,
    MANIFEST_FORMAT,
    ModelManifest,
    Origin,
    stored_files,
    version_of_folder,
    version_prefix,
    versions_prefix,
)
from nucleus.storage.bucket import Bucket, StoredObject, check_conditional_writes

__all__ = ["Claim", "Leftover", "claim_version", "leftovers", "publish", "remove_leftover", "run_of_claim"]

_CLAIM_FILE = "claim.json"


class Claim(BaseModel):
    """Claim of a publisher on a version number.

    Attributes:
        version: The version number.
        run: Name of the run that publishes; empty for a claim of `remove_leftover`.
        token: Random token that makes the claim unique.
        claimed: Time of the claim, UTC, ISO 8601.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    run: str
    token: str
    claimed: str

    def check_held(self, bucket: Bucket, name: str) -> None:
        """Raise `ModelError` if the claim was removed or replaced."""
        try:
            held = bucket.get(_claim_key(name, self.version)) == self.model_dump_json().encode()
        except ObjectNotFoundError:
            held = False
        if not held:
            raise ModelError(
                f"Expected to publish version {self.version} of {name!r}; its claim was removed, as `nucleus models "
                f"clean` does if a publisher seems to be dead. Run: nucleus train --resume {self.run}"
            )


@dataclass(frozen=True)
class Leftover:
    """An incomplete version.

    Attributes:
        version: Number of the version.
        objects: Number of objects.
        size: Total size of the objects, bytes.
        modified: Time of the last write.
    """

    version: int
    objects: int
    size: int
    modified: datetime


def claim_version(bucket: Bucket, name: str, run: str) -> Claim:
    """Claim the next free version number of a model."""
    version = max((version_of_folder(folder) or 0 for folder in bucket.folders(versions_prefix(name))), default=0) + 1
    while True:
        claim = Claim(version=version, run=run, token=secrets.token_hex(8), claimed=datetime.now(UTC).isoformat())
        try:
            bucket.put(_claim_key(name, version), claim.model_dump_json().encode(), if_absent=True)
        except ObjectExistsError:
            version += 1
        else:
            return claim


def run_of_claim(bucket: Bucket, name: str, version: int) -> str | None:
    """Return the name of the run that claimed a version number; None if it is unknown."""
    try:
        return Claim.model_validate_json(bucket.get(_claim_key(name, version))).run
    except (ObjectNotFoundError, ValidationError):
        return None


def leftovers(bucket: Bucket, name: str) -> list[Leftover]:
    """Return the versions of a model without a manifest, in order; some may still be in publication."""
    prefix = versions_prefix(name)
    begun: dict[int, list[StoredObject]] = {}
    for item in bucket.objects(prefix):
        version = version_of_folder(item.key.removeprefix(prefix).partition("/")[0])
        if version is not None:
            begun.setdefault(version, []).append(item)
    return [
        Leftover(version, len(items), sum(item.size for item in items), max(item.modified for item in items))
        for version, items in sorted(begun.items())
        if not any(item.key.endswith(f"/{MANIFEST_FILE}") for item in items)
    ]


def remove_leftover(bucket: Bucket, name: str, version: int) -> bool:
    """Remove the objects of a version without a manifest.

    This takes over the claim first, so a publisher that is alive after all stops before it writes a manifest of files
    that are gone. (A short gap remains between the publisher's last check of the claim and its write of the manifest.)

    Returns:
        Whether the objects were removed; False if the claim or a manifest was written in the meantime.
    """
    taken = Claim(version=version, run="", token=secrets.token_hex(8), claimed=datetime.now(UTC).isoformat())
    key = _claim_key(name, version)
    try:
        _, tag = bucket.get_tagged(key)
    except ObjectNotFoundError:
        tag = None
    try:
        bucket.put(key, taken.model_dump_json().encode(), if_absent=tag is None, if_match=tag)
    except (ObjectExistsError, ObjectNotFoundError):
        return False  # another process is at work on this version
    prefix = f"{version_prefix(name, version)}/"
    keys = [item.key for item in bucket.objects(prefix)]
    if prefix + MANIFEST_FILE in keys:
        return False
    for each in sorted(keys, key=lambda each: each == key):  # the claim last, so that nobody takes the number before
        bucket.delete(each)
    return True


def _claim_key(name: str, version: int) -> str:
    return f"{version_prefix(name, version)}/{_CLAIM_FILE}"


def publish(bucket: Bucket, name: str, folder: Path, origin: Origin, advance: Advance = no_progress) -> ModelManifest:
    """Publish the files of a folder as the next version of a model.

    Args:
        bucket: The project's bucket.
        name: Name of the model.
        folder: Folder with `model.json`, `model.weights.h5` and further files; subfolders are not published.
        origin: Origin of the model.
        advance: Called with the bytes uploaded and their total.

    Returns:
        Manifest of the new version.

    Raises:
        ModelError: The claim on the version number was removed during the upload.
    """
    check_name(name, "model")
    files = stored_files(folder)
    check_conditional_writes(bucket)
    claim = claim_version(bucket, name, origin.run)
    prefix = version_prefix(name, claim.version)
    shares = split_progress({file: stored.size for file, stored in files.items()}, advance)
    for file, share in shares.items():
        bucket.put(f"{prefix}/{file}", folder / file, if_absent=True, advance=share)
    manifest = ModelManifest(
        format=MANIFEST_FORMAT,
        model=name,
        version=claim.version,
        created=datetime.now(UTC).isoformat(),
        files=files,
        origin=origin,
    )
    claim.check_held(bucket, name)
    bucket.put(f"{prefix}/{MANIFEST_FILE}", manifest.model_dump_json(indent=1).encode(), if_absent=True)
    return manifest
