"""An alias moves only to a better version, and the decision is kept."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nucleus.config.recipe import GateOptions
from nucleus.errors import DataError, IntegrityError, ModelError
from nucleus.registry import aliases as gate
from nucleus.registry.aliases import GateDecision, move_alias, pass_gate, read_alias, read_decision, rollback_alias
from nucleus.registry.manifest import EncoderWeightsOrigin, ModelManifest, Origin, StartOrigin
from nucleus.registry.publish import publish
from nucleus.registry.versions import version_prefix
from nucleus.storage.bucket import Bucket

HERE = "s3://b/datasets/d@0123456789ab"
ELSEWHERE = "s3://b/datasets/d@ba9876543210"


@pytest.fixture
def released(bucket: Bucket, tmp_path: Path) -> Callable[..., ModelManifest]:
    """Publish a version with a score."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.json").write_text("{}")

    def release(
        score: float | None, dataset: str = HERE, start: StartOrigin | None = None, **others: float | None
    ) -> ModelManifest:
        scores = {} if score is None else {"map": score, "images": 5.0}
        metrics = {"test": {"all": scores | others}} if scores or others else {}
        weights = EncoderWeightsOrigin(source="none", sha256=None)
        origin = Origin(
            run="r",
            recipe={},
            dataset=dataset,
            encoder_weights=weights,
            metrics=metrics,
            code_version="0",
            wandb_run=None,
            start=start,
        )
        return publish(bucket, "m", folder, origin)

    return release


def never(manifest: ModelManifest) -> float:
    raise AssertionError(f"version {manifest.version} was scored on this test split already")


def judged(
    bucket: Bucket, manifest: ModelManifest, rescore: Callable[[ModelManifest], float | None] = never
) -> GateDecision:
    return pass_gate(bucket, manifest, GateOptions(), rescore)


def meant(bucket: Bucket) -> int | None:
    alias = read_alias(bucket, "m", "production")
    return alias.version if alias else None


def test_only_better_versions_pass(bucket: Bucket, released: Callable[..., ModelManifest]) -> None:
    expected = [(0.5, True, 1), (0.4, False, 1), (0.5, False, 1), (0.6, True, 4)]
    for score, passed, production in expected:
        manifest = released(score)
        decision = judged(bucket, manifest)
        assert (decision.passed, meant(bucket)) == (passed, production)
        assert decision.score == score
        assert read_decision(bucket, "m", manifest.version) == decision
    assert decision.incumbent == 1
    assert re.search(r"0\.6000 .*0\.5000 .*version 1", decision.reason)
    kept = read_decision(bucket, "m", 2)
    assert kept is not None
    assert re.search(r"0\.4000 .*0\.5000 .*version 1", kept.reason)
    assert read_decision(bucket, "m", 9) is None


@pytest.mark.parametrize("score", [0.0, 0.0999])
def test_a_first_version_needs_the_minimum(
    bucket: Bucket, released: Callable[..., ModelManifest], score: float
) -> None:
    """A model that finds nothing does not become production because there is no other."""
    decision = judged(bucket, released(score, iou=0.1))
    assert (decision.passed, decision.incumbent, meant(bucket)) == (False, None, None)
    assert re.search(rf"{score:.4f} is below gate.minimum 0.1.*nucleus models alias m@1 production", decision.reason)
    assert judged(bucket, released(0.05)).passed is False, "the alias still does not exist"
    assert judged(bucket, released(0.1)).passed
    assert meant(bucket) == 3
    assert judged(bucket, released(0.11)).passed, "from now on the incumbent decides"


def test_the_minimum_is_a_choice_of_the_recipe(bucket: Bucket, released: Callable[..., ModelManifest]) -> None:
    low, high = GateOptions(minimum=0.0), GateOptions(alias="strict", minimum=0.9)
    manifest = released(0.0)
    assert pass_gate(bucket, manifest, low, never).passed
    assert not pass_gate(bucket, released(0.8), high, never).passed
    move_alias(bucket, "m", "strict", 1)
    assert pass_gate(bucket, released(0.85), high, never).passed, "better than what a person has put there"


def test_a_version_is_judged_once(bucket: Bucket, released: Callable[..., ModelManifest]) -> None:
    first, second = released(0.5), released(0.6)
    assert judged(bucket, first).passed
    assert judged(bucket, second).passed
    move_alias(bucket, "m", "production", 1)
    assert judged(bucket, second).passed, "as it was decided"
    assert meant(bucket) == 1, "what a person did since stands"


def test_other_datasets_are_scored_again(bucket: Bucket, released: Callable[..., ModelManifest]) -> None:
    assert judged(bucket, released(0.9, ELSEWHERE)).passed
    asked = []

    def rescore(manifest: ModelManifest) -> float:
        asked.append(manifest.version)
        return 0.3

    decision = judged(bucket, released(0.5), rescore)
    assert (decision.passed, decision.incumbent_score, asked) == (True, 0.3, [1])

    def cannot(_: ModelManifest) -> float:
        raise ModelError("of another time")

    decision = judged(bucket, released(0.8, ELSEWHERE), cannot)
    assert not decision.passed
    assert re.search("version 2 .*of another time", decision.reason)
    assert meant(bucket) == 2


def test_without_test_images_nothing_passes(bucket: Bucket, released: Callable[..., ModelManifest]) -> None:
    assert not judged(bucket, released(None)).passed
    assert meant(bucket) is None


def test_an_undefined_score_never_passes(bucket: Bucket, released: Callable[..., ModelManifest]) -> None:
    undefined = {"map": None, "images": 5.0, "nuclei_true": 0.0}
    decision = judged(bucket, released(None, **undefined))
    assert (decision.passed, decision.score, meant(bucket)) == (False, None, None)
    assert "no test image has a nucleus" in decision.reason
    # What earlier versions of this package recorded where there was nothing to find.
    assert not judged(bucket, released(1.0, nuclei_true=0.0)).passed
    assert not judged(bucket, released(None, images=5.0)).passed, "the metric is missing"
    assert meant(bucket) is None
    assert judged(bucket, released(0.2, nuclei_true=40.0)).passed
    assert not judged(bucket, released(None, **undefined)).passed
    assert meant(bucket) == 4


@pytest.mark.parametrize("recorded", [None, 1.0])
def test_a_version_with_an_undefined_score_is_scored_again(
    bucket: Bucket, released: Callable[..., ModelManifest], recorded: float | None
) -> None:
    released(recorded, images=5.0, nuclei_true=0.0)
    move_alias(bucket, "m", "production", 1)
    decision = judged(bucket, released(0.4), lambda _: 0.3)
    assert (decision.passed, decision.incumbent_score) == (True, 0.3)
    for unknown in (None, float("nan")):
        move_alias(bucket, "m", "production", 1)
        decision = judged(bucket, released(0.9), lambda _, found=unknown: found)
        assert (decision.passed, meant(bucket)) == (False, 1)
        assert "version 1 could not be scored" in decision.reason


def test_a_manifest_with_nan_passes_nothing(bucket: Bucket, released: Callable[..., ModelManifest]) -> None:
    manifest = released(0.5)
    metrics = {"test": {"all": {"map": float("nan"), "images": 5.0, "nuclei_true": 9.0}}}
    origin = manifest.origin.model_copy(update={"metrics": metrics})
    decision = judged(bucket, manifest.model_copy(update={"origin": origin}))
    assert (decision.passed, meant(bucket)) == (False, None)


def test_a_decision_that_was_cut_short_is_finished(bucket: Bucket, released: Callable[..., ModelManifest]) -> None:
    judged(bucket, released(0.5))
    second = released(0.6)
    move_alias(bucket, "m", "production", 2)  # as far as the first attempt came
    decision = judged(bucket, second)
    assert (decision.passed, decision.incumbent, decision.incumbent_score) == (True, 1, 0.5)
    assert rollback_alias(bucket, "m", "production").version == 1


@pytest.mark.parametrize("error", [IntegrityError, DataError, ModelError])
def test_an_incumbent_that_cannot_be_scored_stays(
    bucket: Bucket, released: Callable[..., ModelManifest], error: type[Exception]
) -> None:
    judged(bucket, released(0.5, ELSEWHERE))

    def cannot(_: ModelManifest) -> float:
        raise error("broken")

    assert re.search("version 1 .*broken", judged(bucket, released(0.9), cannot).reason)
    bucket.put(f"{version_prefix('m', 1)}/manifest.json", b"{}")
    assert re.search("version 1 .*manifest", judged(bucket, released(0.9)).reason)
    assert meant(bucket) == 1


def test_moves_meanwhile_are_seen(
    bucket: Bucket, released: Callable[..., ModelManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the comparison and the move somebody else moves the alias to a better version."""
    released(0.5), released(0.7)
    move_alias(bucket, "m", "production", 1)
    third = released(0.6)
    really = gate.replace_alias
    others = iter([2])

    def replace(*arguments: object) -> bool:
        for version in others:
            move_alias(bucket, "m", "production", version)
        return really(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gate, "replace_alias", replace)
    decision = judged(bucket, third)
    assert (decision.passed, decision.incumbent, meant(bucket)) == (False, 2, 2)


def test_damaged_decisions_are_refused(bucket: Bucket, released: Callable[..., ModelManifest]) -> None:
    released(0.5)
    bucket.put("models/m/gates/000001.json", b"{}")
    with pytest.raises(ModelError, match="damaged"):
        read_decision(bucket, "m", 1)


def begun_with(score: float | None) -> StartOrigin:
    return StartOrigin(version="nuclei@3", sha256="a" * 64, scores={} if score is None else {"all": {"map": score}})


@pytest.mark.parametrize(
    ("start", "passed", "said"),
    [
        (0.4, True, r"production did not exist before.*0\.5000 beats 0\.4000 of nuclei@3, its start"),
        (0.5, False, r"0\.5000 does not beat 0\.5000 of nuclei@3"),
        (None, False, r"nuclei@3, with which training started, has no test map"),
    ],
)
def test_a_version_must_beat_the_one_it_started_with(
    bucket: Bucket, released: Callable[..., ModelManifest], start: float | None, passed: bool, said: str
) -> None:
    decision = judged(bucket, released(0.5, start=begun_with(start)))
    assert (decision.passed, decision.start, decision.start_score) == (passed, "nuclei@3", start)
    assert re.search(said, decision.reason)
    assert meant(bucket) == (1 if passed else None)


def test_a_version_must_beat_its_start_and_the_incumbent(
    bucket: Bucket, released: Callable[..., ModelManifest]
) -> None:
    released(0.5)
    move_alias(bucket, "m", "production", 1)
    assert not judged(bucket, released(0.45, start=begun_with(0.4))).passed, "worse than what the alias points to"
    assert not judged(bucket, released(0.55, start=begun_with(0.6))).passed, "worse than its start"
    assert judged(bucket, released(0.65, start=begun_with(0.6))).passed
    assert meant(bucket) == 4
