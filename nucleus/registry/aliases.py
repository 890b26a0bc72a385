"""Aliases of model versions, such as `production`; they move by compare-and-swap, so no move is lost."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nucleus.config.names import check_alias
from nucleus.errors import ModelError, ObjectExistsError, ObjectNotFoundError
from nucleus.storage.bucket import Bucket
from nucleus.storage.conditions import check_conditional_writes

__all__ = ["Alias", "list_aliases", "move_alias", "read_alias", "replace_alias", "rollback_alias"]

_ATTEMPTS = 50


class Alias(BaseModel):
    """What an alias points to.

    Attributes:
        version: The version it means.
        previous: The version it meant before; None at first.
        moved: When it was moved.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[int, Field(ge=1)]
    previous: Annotated[int, Field(ge=1)] | None
    moved: str


def list_aliases(bucket: Bucket, name: str) -> dict[str, Alias]:
    """Every alias of a model."""
    prefix = f"models/{name}/aliases/"
    names = [item.key.removeprefix(prefix).removesuffix(".json") for item in bucket.objects(prefix)]
    found = {alias: read_alias(bucket, name, alias) for alias in names}
    return {alias: value for alias, value in found.items() if value is not None}


def read_alias(bucket: Bucket, name: str, alias: str) -> Alias | None:
    """What an alias points to, or None if there is no such alias."""
    return _read(bucket, _key(name, alias))[0]


def move_alias(bucket: Bucket, name: str, alias: str, version: int) -> Alias:
    """Point an alias to a version that exists."""
    key = _key(name, check_alias(alias))
    for _ in range(_ATTEMPTS):
        current, etag = _read(bucket, key)
        if current is not None and current.version == version:
            return current
        moved = Alias(version=version, previous=current.version if current else None, moved=_now())
        if _swap(bucket, key, moved, etag):
            return moved
    raise _busy(name, alias)


def replace_alias(bucket: Bucket, name: str, alias: str, version: int, expected: int | None) -> bool:
    """Point an alias to a version if it still means `expected` (None: if it does not exist); say whether it did."""
    key = _key(name, check_alias(alias))
    current, etag = _read(bucket, key)
    if (current.version if current else None) != expected:
        return False
    return _swap(bucket, key, Alias(version=version, previous=expected, moved=_now()), etag)


def rollback_alias(bucket: Bucket, name: str, alias: str) -> Alias:
    """Point an alias back to the version that it meant before.

    Raises:
        ModelError: There is no such alias, or it has no earlier version.
    """
    key = _key(name, check_alias(alias))
    for _ in range(_ATTEMPTS):
        current, etag = _read(bucket, key)
        if current is None or current.previous is None:
            what = "has no earlier version" if current else "does not exist"
            raise ModelError(
                f"Expected an alias {alias!r} of {name!r} that was moved; it {what}. Run: nucleus models list {name}"
            )
        moved = Alias(version=current.previous, previous=current.version, moved=_now())
        if _swap(bucket, key, moved, etag):
            return moved
    raise _busy(name, alias)


def _key(name: str, alias: str) -> str:
    return f"models/{name}/aliases/{alias}.json"


def _read(bucket: Bucket, key: str) -> tuple[Alias | None, str | None]:
    try:
        data, etag = bucket.get_tagged(key)
        return Alias.model_validate_json(data), etag
    except ObjectNotFoundError:
        return None, None
    except ValidationError as error:
        raise ModelError(f"Expected an alias at {bucket.uri / key}; it is damaged: {error}") from error


def _swap(bucket: Bucket, key: str, alias: Alias, etag: str | None) -> bool:
    check_conditional_writes(bucket)
    try:
        bucket.put(key, alias.model_dump_json().encode(), if_absent=etag is None, if_match=etag)
    except (ObjectExistsError, ObjectNotFoundError):
        return False
    return True


def _busy(name: str, alias: str) -> ModelError:
    return ModelError(
        f"Expected to move {alias!r} of {name!r}; others moved it {_ATTEMPTS} times meanwhile. Try again."
    )


def _now() -> str:
    return datetime.now(UTC).isoformat()
