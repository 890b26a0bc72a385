"""The gate of an alias: it moves to a new version only if that one beats the version it means.

The decision is kept as `models/<name>/gates/<version>.json`, written once; the version itself never changes.
"""

from collections.abc import Callable
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from nucleus.errors import DataError, IntegrityError, ModelError, ObjectExistsError, ObjectNotFoundError
from nucleus.registry.aliases import Alias, read_alias, replace_alias
from nucleus.registry.manifest import ModelManifest
from nucleus.registry.versions import read_version
from nucleus.storage.bucket import Bucket

__all__ = ["GateDecision", "pass_gate", "read_decision"]

_ATTEMPTS = 50


class GateDecision(BaseModel):
    """What the gate decided about a version.

    Attributes:
        version: The version.
        alias: The alias that it wanted.
        metric: What was compared, mean over the images of the test split.
        dataset: Whose test split: `s3://.../NAME@VERSION`.
        score: The version's.
        incumbent: The version that the alias meant; None if it meant none.
        incumbent_score: Its score on the same test split; None if there is none.
        passed: Whether the alias was moved.
        reason: Why, in words.
        decided: When.
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
    """What the gate decided about a version; None if it was not asked."""
    key = _key(name, version)
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
        bucket.put(_key(name, decision.version), decision.model_dump_json(indent=1).encode(), if_absent=True)
    except ObjectExistsError:
        return read_decision(bucket, name, decision.version) or decision
    return decision


def _key(name: str, version: int) -> str:
    return f"models/{name}/gates/{version:06d}.json"
