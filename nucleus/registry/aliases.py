"""Aliases of model versions, such as `production`, moved by compare-and-swap; and the gate that moves them."""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nucleus.config.names import check_alias
from nucleus.config.recipe import GateOptions
from nucleus.errors import DataError, IntegrityError, ModelError, ObjectExistsError, ObjectNotFoundError
from nucleus.registry.manifest import ModelManifest, StartOrigin, model_key, read_version
from nucleus.storage.bucket import Bucket, check_conditional_writes
from nucleus.text import first_line

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
        previous: Number of the version that the alias pointed to before; None at first.
        moved: Time of the last move, UTC, ISO 8601.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[int, Field(ge=1)]
    previous: Annotated[int, Field(ge=1)] | None
    moved: str


def list_aliases(bucket: Bucket, name: str, warn: Callable[[str], None] | None = None) -> dict[str, Alias]:
    """Return every alias of a model, by name.

    Args:
        bucket: The project's bucket.
        name: Name of the model.
        warn: Called with a message for each damaged alias, which is then left out.

    Raises:
        ModelError: An alias is damaged, and `warn` is not given.
    """
    prefix = f"{model_key(name, _ALIASES)}/"
    found = {}
    for alias in (item.key.removeprefix(prefix).removesuffix(".json") for item in bucket.objects(prefix)):
        try:
            found[alias] = read_alias(bucket, name, alias)
        except ModelError as error:
            if warn is None:
                raise
            warn(str(error))
    return {alias: value for alias, value in found.items() if value is not None}


def read_alias(bucket: Bucket, name: str, alias: str) -> Alias | None:
    """Return an alias, or None if it does not exist."""
    return _read(bucket, _alias_key(name, alias))[0]


def move_alias(bucket: Bucket, name: str, alias: str, version: int) -> Alias:
    """Point an alias to an existing version; return it. A damaged alias is replaced.

    Raises:
        ModelError: Other processes keep moving the alias.
    """
    key = _alias_key(name, check_alias(alias))
    for _ in range(_ATTEMPTS):
        current, etag = _read(bucket, key, replace=True)
        if current is not None and current.version == version:
            return current
        moved = Alias(version=version, previous=current.version if current else None, moved=_now())
        if _swap(bucket, key, moved, etag):
            return moved
    raise _busy(name, alias)


def replace_alias(bucket: Bucket, name: str, alias: str, version: int, expected: int | None) -> bool:
    """Point an alias to a version if it still points to `expected` (None: if it does not exist yet).

    Returns:
        Whether the alias was moved.
    """
    key = _alias_key(name, check_alias(alias))
    current, etag = _read(bucket, key)
    if (current.version if current else None) != expected:
        return False
    return _swap(bucket, key, Alias(version=version, previous=expected, moved=_now()), etag)


def rollback_alias(bucket: Bucket, name: str, alias: str) -> Alias:
    """Point an alias back to the older version that it pointed to before.

    Only the last move is recorded, so an alias can be rolled back once: a second rollback would undo the first, and
    point it to the version that was found wanting.

    Raises:
        ModelError: The alias does not exist, was never moved, or was last moved to an older version.
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
                f"Expected the last move of {alias!r} of {name!r} to be to a newer version; it was back from version "
                f"{current.previous} to version {current.version}, and what it pointed to before is not recorded. "
                f"To move it further, choose a version (nucleus models list {name}), and run: nucleus models alias "
                f"{name}@VERSION {alias}"
            )
        moved = Alias(version=current.previous, previous=current.version, moved=_now())
        if _swap(bucket, key, moved, etag):
            return moved
    raise _busy(name, alias)


def _alias_key(name: str, alias: str) -> str:
    return model_key(name, _ALIASES, f"{alias}.json")


def _read(bucket: Bucket, key: str, *, replace: bool = False) -> tuple[Alias | None, str | None]:
    """Return an alias and the ETag of its object; with `replace`, None for a damaged one, which will be replaced."""
    try:
        data, etag = bucket.get_tagged(key)
    except ObjectNotFoundError:
        return None, None
    try:
        return Alias.model_validate_json(data), etag
    except ValidationError as error:
        if replace:
            return None, etag
        raise ModelError(
            f"Expected an alias at {bucket.uri / key}; it is damaged ({first_line(error)}). To set it anew, run: "
            "nucleus models alias NAME@VERSION ALIAS"
        ) from error


def _swap(bucket: Bucket, key: str, alias: Alias, etag: str | None) -> bool:
    check_conditional_writes(bucket)
    try:
        bucket.put(key, alias.model_dump_json().encode(), if_absent=etag is None, if_match=etag)
    except (ObjectExistsError, ObjectNotFoundError):
        return False
    return True


def _busy(name: str, alias: str) -> ModelError:
    return ModelError(f"Expected to move {alias!r} of {name!r}; other processes moved it {_ATTEMPTS} times. Try again.")


def _now() -> str:
    return datetime.now(UTC).isoformat()


class GateDecision(BaseModel):
    """Decision of the gate about a version.

    Attributes:
        version: Number of the version.
        alias: Alias that the gate moves.
        metric: Metric that was compared, mean over the images of the test split.
        dataset: Dataset of the test split: `s3://.../NAME@VERSION`.
        score: Score of the version; None if it was not tested.
        incumbent: Version that the alias pointed to before; None if the alias did not exist.
        incumbent_score: Score of the incumbent on the same test split; None if it could not be scored.
        start: Version that training started with; None without one.
        start_score: Score of that version on the same test split; None if it is undefined.
        passed: Whether the alias points to the version.
        reason: Reason for the decision, as text.
        decided: Time of the decision, UTC, ISO 8601.
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
    start: str | None = None
    start_score: float | None = None

    @property
    def outcome(self) -> str:
        """Whether the alias moved to the version, and why; to be read after its name. It may have moved on since."""
        verb = "moved to" if self.passed else "did not move to"
        return f"{verb} version {self.version}: {self.reason}"

    def __str__(self) -> str:
        return f"{self.alias} {self.outcome}"


def pass_gate(
    bucket: Bucket,
    manifest: ModelManifest,
    options: GateOptions,
    rescore: Callable[[ModelManifest], float | None],
) -> GateDecision:
    """Move an alias to a version if it beats the incumbent on the same frozen test split; record the decision.

    It must also beat the version that its training started with. Without an incumbent, the version must reach
    `options.minimum`: a model that finds nothing is not published under the alias only because it is the first.

    A version is judged once: later calls return the first decision. An alias that points to the version already stays
    as it is: a person moved it there, or an earlier process died before it could record its decision.

    Args:
        bucket: The project's bucket.
        manifest: Manifest of the new version.
        options: The recipe's gate: the alias, the metric of the manifest (larger is better), and the minimum.
        rescore: Function that scores an incumbent, which was tested on another dataset, on the test split of the new
            version. It may raise `ModelError`, `IntegrityError` or `DataError`, which count as a lack of a score.

    Raises:
        ModelError: Other processes kept moving the alias.
    """
    decided = read_decision(bucket, manifest.model, manifest.version)
    if decided is not None:
        return decided
    alias = options.alias
    for _ in range(_ATTEMPTS):
        current = read_alias(bucket, manifest.model, alias)
        decision = _decide(bucket, manifest, options, current, rescore)
        expected = current.version if current else None
        if (
            not decision.passed
            or expected == manifest.version
            or replace_alias(bucket, manifest.model, alias, manifest.version, expected)
        ):
            return _record(bucket, manifest.model, decision)
    raise ModelError(
        f"Expected to judge {manifest.model}@{manifest.version}; other processes moved {alias!r} {_ATTEMPTS} times. "
        f"Run: nucleus models alias {manifest.model}@{manifest.version} {alias}"
    )


def read_decision(bucket: Bucket, name: str, version: int) -> GateDecision | None:
    """Return the decision of the gate about a version; None if there is none."""
    key = _decision_key(name, version)
    try:
        return GateDecision.model_validate_json(bucket.get(key))
    except ObjectNotFoundError:
        return None
    except ValidationError as error:
        raise ModelError(f"Expected a decision of the gate at {bucket.uri / key}; it is damaged: {error}") from error


def _decide(
    bucket: Bucket,
    manifest: ModelManifest,
    options: GateOptions,
    current: Alias | None,
    rescore: Callable[[ModelManifest], float | None],
) -> GateDecision:
    alias, metric = options.alias, options.metric
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
        passed, reason = True, f"{alias} pointed to it already"
    elif score is None:
        passed, reason = False, _why_unscored(manifest, metric)
    elif incumbent is None:
        passed, reason = _first(manifest, options, score)
    elif other is None:
        problem = problem or f"its test {metric} is undefined"
        passed, reason = False, f"version {incumbent} could not be scored: {problem}"
    else:
        passed = score > other
        verb = "beats" if passed else "does not beat"
        reason = f"test {metric} {score:.4f} {verb} {other:.4f} of version {incumbent}"
    start = manifest.origin.start
    if start is not None and score is not None and not there:
        passed, reason = _also_beats(start, metric, score, passed, reason)
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
        decided=_now(),
        start=start.version if start else None,
        start_score=_score_of_start(start, metric) if start else None,
    )


def _also_beats(start: StartOrigin, metric: str, score: float, passed: bool, reason: str) -> tuple[bool, str]:
    """Return a decision and its reason with the comparison with the version that training started with added."""
    theirs = _score_of_start(start, metric)
    if theirs is None:
        return False, f"{reason}; {start.version}, with which training started, has no test {metric}"
    verb = "beats" if score > theirs else "does not beat"
    return passed and score > theirs, f"{reason}; {score:.4f} {verb} {theirs:.4f} of {start.version}, its start"


def _score_of_start(start: StartOrigin, metric: str) -> float | None:
    return _defined(start.scores.get("all", {}).get(metric))


def _first(manifest: ModelManifest, options: GateOptions, score: float) -> tuple[bool, str]:
    """Return whether an alias that does not exist yet may point to a version with this score, and why."""
    scored = f"test {options.metric} {score:.4f}"
    if score >= options.minimum:
        return True, f"{options.alias} did not exist before, and {scored} reaches {options.minimum:g}"
    return False, (
        f"{options.alias} does not exist yet, and {scored} is below gate.minimum {options.minimum:g}. Train longer, or "
        f"look at its predictions and run: nucleus models alias {manifest.model}@{manifest.version} {options.alias}"
    )


def _score_of_incumbent(
    incumbent: ModelManifest, manifest: ModelManifest, metric: str, rescore: Callable[[ModelManifest], float | None]
) -> float | None:
    """Return the score of the incumbent on the test split of the new version; compute it if it is not recorded.

    None if it is undefined.
    """
    known = _score(incumbent, metric) if incumbent.origin.dataset == manifest.origin.dataset else None
    return _defined(rescore(incumbent)) if known is None else known


def _score(manifest: ModelManifest, metric: str) -> float | None:
    """Return the recorded score of a version on the test split of its dataset; None if it is missing or undefined."""
    scores = manifest.origin.metrics.get("test", {}).get("all", {})
    if scores.get("nuclei_true") == 0:  # earlier versions of this package recorded 1.0 where there was nothing to find
        return None
    return _defined(scores.get(metric))


def _defined(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


def _why_unscored(manifest: ModelManifest, metric: str) -> str:
    scores = manifest.origin.metrics.get("test", {}).get("all", {})
    if not scores or scores.get("images") == 0:
        return "there are no test images to judge it by"
    if scores.get("nuclei_true") == 0:
        return f"its test {metric} is undefined, because no test image has a nucleus"
    return f"its test {metric} is missing or undefined"


def _record(bucket: Bucket, name: str, decision: GateDecision) -> GateDecision:
    try:
        bucket.put(_decision_key(name, decision.version), decision.model_dump_json(indent=1).encode(), if_absent=True)
    except ObjectExistsError:
        return read_decision(bucket, name, decision.version) or decision
    return decision


def _decision_key(name: str, version: int) -> str:
    return model_key(name, _GATES, f"{version:06d}.json")
