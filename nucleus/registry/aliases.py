"""Aliases of model versions, such as `production`; they move by compare-and-swap, so no move is lost."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nucleus.config.names import check_alias
from nucleus.errors import DataError, IntegrityError, ModelError, ObjectExistsError, ObjectNotFoundError
from nucleus.registry.manifest import ModelManifest, model_key, read_version
from nucleus.storage.bucket import Bucket, check_conditional_writes

__all__ = [
    "Alias",
    "GateDecision",
    "list_aliases",
    "move_alias",
    "pass_gate",
    "read_alias",
    "read_decision",
    "replace_alias",
    "rollback_alias",
]


_ATTEMPTS = 50
_ALIASES, _GATES = "aliases", "gates"


class Alias(BaseModel):
    """The version that an alias points to.

    Attributes:
        version: Number of the version.
        previous: Number of the version that it pointed to before; None at first.
        moved: When it was moved, UTC, ISO 8601.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[int, Field(ge=1)]
    previous: Annotated[int, Field(ge=1)] | None
    moved: str


def list_aliases(bucket: Bucket, name: str) -> dict[str, Alias]:
    """Every alias of a model."""
    prefix = f"{model_key(name, _ALIASES)}/"
    names = [item.key.removeprefix(prefix).removesuffix(".json") for item in bucket.objects(prefix)]
    found = {alias: read_alias(bucket, name, alias) for alias in names}
    return {alias: value for alias, value in found.items() if value is not None}


def read_alias(bucket: Bucket, name: str, alias: str) -> Alias | None:
    """What an alias points to, or None if there is no such alias."""
    return _read(bucket, _alias_key(name, alias))[0]


def move_alias(bucket: Bucket, name: str, alias: str, version: int) -> Alias:
    """Point an alias to a version that exists."""
    key = _alias_key(name, check_alias(alias))
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
    key = _alias_key(name, check_alias(alias))
    current, etag = _read(bucket, key)
    if (current.version if current else None) != expected:
        return False
    return _swap(bucket, key, Alias(version=version, previous=expected, moved=_now()), etag)


def rollback_alias(bucket: Bucket, name: str, alias: str) -> Alias:
    """Point an alias back to the older version that it pointed to before.

    Only the last move is recorded, so an alias can be rolled back once; a second rollback would lead to the version
    that the first one left.

    Raises:
        ModelError: There is no such alias, it was never moved, or its last move was to an older version.
    """
    key = _alias_key(name, check_alias(alias))
    for _ in range(_ATTEMPTS):
        current, etag = _read(bucket, key)
        if current is None or current.previous is None:
            what = "has no earlier version" if current else "does not exist"
            raise ModelError(
                f"Expected an alias {alias!r} of {name!r} that was moved; it {what}. Run: nucleus models list {name}"
            )
        if current.previous > current.version:
            raise ModelError(
                f"Expected {alias!r} of {name!r} to come from an older version; it was moved back from version "
                f"{current.previous} to {current.version} already. Run: nucleus models alias {name}@VERSION {alias}"
            )
        moved = Alias(version=current.previous, previous=current.version, moved=_now())
        if _swap(bucket, key, moved, etag):
            return moved
    raise _busy(name, alias)


def _alias_key(name: str, alias: str) -> str:
    return model_key(name, _ALIASES, f"{alias}.json")


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


class GateDecision(BaseModel):
    """The gate's decision about a version.

    Attributes:
        version: Number of the version.
        alias: Alias that was to move.
        metric: Metric that was compared, mean over the images of the test split.
        dataset: Dataset of that test split: `s3://.../NAME@VERSION`.
        score: Score of the version.
        incumbent: Version that the alias pointed to; None if it did not exist.
        incumbent_score: Score of that version on the same test split; None if there is none.
        passed: Whether the alias was moved.
        reason: Why, in words.
        decided: When, UTC, ISO 8601.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    alias: str
    metric: str
    dataset: str
    score: float | None
    incumbent: int | None
    incumbent_score: float | None
    passed: bool
    reason: str
    decided: str


def pass_gate(
    bucket: Bucket,
    manifest: ModelManifest,
    alias: str,
    metric: str,
    rescore: Callable[[ModelManifest], float],
) -> GateDecision:
    """Move an alias to a version if it beats the one behind it on the same frozen test split; record why or why not.

    A version is judged once: asked again, the first decision is given. An alias that means the version already, because
    a person moved it there or this process's forerunner died before it could record its decision, stays as it is.

    Args:
        bucket: The project's.
        manifest: The new version.
        alias: Such as `production`.
        metric: A metric of the manifest; larger is better.
        rescore: Scores an incumbent that was tested on another dataset on the new version's test split. Raises
            `ModelError`, `IntegrityError` or `DataError` if it cannot be.

    Raises:
        ModelError: Others kept moving the alias meanwhile.
    """
    decided = read_decision(bucket, manifest.model, manifest.version)
    if decided is not None:
        return decided
    for _ in range(_ATTEMPTS):
        current = read_alias(bucket, manifest.model, alias)
        decision = _decide(bucket, manifest, alias, metric, current, rescore)
        expected = current.version if current else None
        if (
            not decision.passed
            or expected == manifest.version
            or replace_alias(bucket, manifest.model, alias, manifest.version, expected)
        ):
            return _record(bucket, manifest.model, decision)
    raise ModelError(
        f"Expected to judge {manifest.model}@{manifest.version}; others moved {alias!r} {_ATTEMPTS} times meanwhile. "
        f"Run: nucleus models alias {manifest.model}@{manifest.version} {alias}"
    )


def read_decision(bucket: Bucket, name: str, version: int) -> GateDecision | None:
    """The gate's decision about a version; None if it was not asked."""
    key = _decision_key(name, version)
    try:
        return GateDecision.model_validate_json(bucket.get(key))
    except ObjectNotFoundError:
        return None
    except ValidationError as error:
        raise ModelError(f"Expected a gate's decision at {bucket.uri / key}; it is damaged: {error}") from error


def _decide(
    bucket: Bucket,
    manifest: ModelManifest,
    alias: str,
    metric: str,
    current: Alias | None,
    rescore: Callable[[ModelManifest], float],
) -> GateDecision:
    score = _score(manifest, metric)
    there = current is not None and current.version == manifest.version
    incumbent = None if current is None else (current.previous if there else current.version)
    other = problem = None
    if incumbent is not None:
        try:
            other = _score_of_incumbent(read_version(bucket, manifest.model, incumbent), manifest, metric, rescore)
        except (ModelError, IntegrityError, DataError) as error:
            problem = str(error)
    if there:
        passed, reason = True, f"{alias} means it already"
    elif score is None:
        passed, reason = False, "there are no test images to judge it by"
    elif incumbent is None:
        passed, reason = True, f"no version was behind {alias} before"
    elif other is None:
        passed, reason = False, f"version {incumbent} behind {alias} could not be scored: {problem}"
    else:
        passed = score > other
        verb = "beats" if passed else "does not beat"
        reason = f"test {metric} {score:.4f} {verb} {other:.4f} of version {incumbent}"
    return GateDecision(
        version=manifest.version,
        alias=alias,
        metric=metric,
        dataset=manifest.origin.dataset,
        score=score,
        incumbent=incumbent,
        incumbent_score=other,
        passed=passed,
        reason=reason,
        decided=datetime.now(UTC).isoformat(),
    )


def _score_of_incumbent(
    incumbent: ModelManifest, manifest: ModelManifest, metric: str, rescore: Callable[[ModelManifest], float]
) -> float:
    """Its score on the test split of the new version: known if it was tested on that one too."""
    known = _score(incumbent, metric) if incumbent.origin.dataset == manifest.origin.dataset else None
    return rescore(incumbent) if known is None else known


def _score(manifest: ModelManifest, metric: str) -> float | None:
    """A version's own score on the test split of its dataset, if it has one."""
    return manifest.origin.metrics.get("test", {}).get("all", {}).get(metric)


def _record(bucket: Bucket, name: str, decision: GateDecision) -> GateDecision:
    try:
        bucket.put(_decision_key(name, decision.version), decision.model_dump_json(indent=1).encode(), if_absent=True)
    except ObjectExistsError:
        return read_decision(bucket, name, decision.version) or decision
    return decision


def _decision_key(name: str, version: int) -> str:
    return model_key(name, _GATES, f"{version:06d}.json")
