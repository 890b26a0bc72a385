"""Publishing of model versions: claims of numbers, uploads, and leftovers of publishers that died.

A publisher takes a number by creating `claim.json` under it (`If-None-Match: *`); no two claims are alike, so one that
had to be asked for again is known by its bytes. A number whose publisher died stays unused until `remove_leftover`.
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
    StoredFile,
    version_of_folder,
    version_prefix,
    versions_prefix,
)
from nucleus.storage.bucket import Bucket, StoredObject, check_conditional_writes
from nucleus.storage.files import sha256_of

__all__ = ["Claim", "Leftover", "claim_version", "leftovers", "publish", "remove_leftover", "run_of_claim"]


_CLAIM_FILE = "claim.json"


class Claim(BaseModel):
    """A number that a publisher has taken.

    Attributes:
        version: The number.
        run: The run that publishes.
        token: Distinguishes this claim from every other.
        claimed: When it was claimed, UTC, ISO 8601.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    run: str
    token: str
    claimed: str

    def check_held(self, bucket: Bucket, name: str) -> None:
        """Raise `ModelError` if the claim was removed meanwhile."""
        try:
            held = bucket.get(_claim_key(name, self.version)) == self.model_dump_json().encode()
        except ObjectNotFoundError:
            held = False
        if not held:
            raise ModelError(
                f"Expected to publish version {self.version} of {name!r}; its claim was removed meanwhile, as `nucleus "
                f"models clean` does with those of dead publishers. Run: nucleus train --resume {self.run}"
            )


@dataclass(frozen=True)
class Leftover:
    """A version that was begun and is not whole.

    Attributes:
        version: Its number.
        objects: How many objects it has.
        size: Bytes in them.
        modified: When the last of them was written.
    """

    version: int
    objects: int
    size: int
    modified: datetime


def claim_version(bucket: Bucket, name: str, run: str) -> Claim:
    """Take the next free number of a model."""
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
    """The run that claimed a number; None if that is not known."""
    try:
        return Claim.model_validate_json(bucket.get(_claim_key(name, version))).run
    except (ObjectNotFoundError, ValidationError):
        return None


def leftovers(bucket: Bucket, name: str) -> list[Leftover]:
    """The versions of a model that were begun and have no manifest, in order; they may still be being published."""
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
    """Remove what lies under a number without a manifest; say whether it was done, or a manifest came meanwhile.

    The claim is taken over first, so that its publisher, should it be alive after all, does not go on to the manifest
    over files that are gone (but for the moment between its own last look at the claim and the manifest).
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
        return False  # somebody is at work there
    prefix = f"{version_prefix(name, version)}/"
    keys = [item.key for item in bucket.objects(prefix)]
    if prefix + MANIFEST_FILE in keys:
        return False
    for each in sorted(keys, key=lambda each: each == key):  # the claim last: nobody takes the number before
        bucket.delete(each)
    return True


def _claim_key(name: str, version: int) -> str:
    return f"{version_prefix(name, version)}/{_CLAIM_FILE}"


def publish(bucket: Bucket, name: str, folder: Path, origin: Origin, advance: Advance = no_progress) -> ModelManifest:
    """Publish the files of a folder as the next version of a model.

    Args:
        bucket: Where to.
        name: The model.
        folder: Flat folder with `model.json`, `model.weights.h5` and what goes with them.
        origin: Where the model comes from.
        advance: Called with the bytes uploaded and their total.
    """
    check_name(name, "model")
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    files = {path.name: StoredFile(size=path.stat().st_size, sha256=sha256_of(path)) for path in paths}
    check_conditional_writes(bucket)
    claim = claim_version(bucket, name, origin.run)
    prefix = version_prefix(name, claim.version)
    shares = split_progress({path.name: files[path.name].size for path in paths}, advance)
    for path in paths:
        bucket.put(f"{prefix}/{path.name}", path, if_absent=True, advance=shares[path.name])
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
