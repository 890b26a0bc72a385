"""The table at the end of a run: each row is where something is, or what to type."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nucleus.cli.training import print_published
from nucleus.config.settings import parse_recipe
from nucleus.metrics.scores import HEADLINES
from nucleus.registry.aliases import pass_gate
from nucleus.registry.manifest import EncoderWeightsOrigin, ModelManifest, Origin
from nucleus.registry.publish import publish
from nucleus.runs.plan import RunPlan, save_plan
from nucleus.storage.bucket import Bucket
from nucleus.tracking.tensorboard import EVENTS_FILE

Published = Callable[..., ModelManifest]
WEIGHTS = EncoderWeightsOrigin(source="none", sha256=None)


@pytest.fixture
def published(bucket: Bucket, model_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """Publish a version of a run that went on in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def make(mode: str = "disabled", run: str = "r", score: float = 0.5, **recipe: Any) -> ModelManifest:
        content = parse_recipe({"model": "m", "dataset": "d", **recipe}, "r.toml")
        dataset = "s3://b/datasets/d@0123456789ab"
        plan = RunPlan(
            run=run,
            bucket=str(bucket.uri),
            recipe=content,
            dataset=dataset,
            weights_uri=None,
            weights=WEIGHTS,
            wandb_mode=mode,
            wandb_dir=str(tmp_path / "w"),
        )
        save_plan(bucket, plan)
        scores = dict.fromkeys(("images", *(name for name, _ in HEADLINES)), score)
        origin = Origin(
            run=run,
            recipe=content.model_dump(mode="json"),
            dataset=dataset,
            encoder_weights=WEIGHTS,
            metrics={split: {"all": scores} for split in ("val", "test")},
            code_version="0",
            wandb_run=f"team/nuclei/{run}",
        )
        return publish(bucket, "m", model_files, origin)

    return make


def rows(manifest: ModelManifest, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    print_published(manifest, Path("runs").absolute(), str(bucket.uri), more={"another": "place"})
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split("\t") for line in lines[lines.index("what\twhere") + 1 :])  # type: ignore[misc]


def test_where_all_is(published: Published, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = published()
    bucket.put(f"runs/r/{EVENTS_FILE}", b"events")
    pass_gate(bucket, manifest, "production", "map", lambda _: 0.0)
    found = rows(manifest, bucket, capsys)
    assert found.pop("TensorBoard").startswith("tensorboard --logdir runs/r/tensorboard")
    assert (tmp_path / "runs" / "r" / EVENTS_FILE).read_bytes() == b"events"
    assert found == {
        "published": f"m@1 at {bucket.uri}/models/m/versions/000001",
        "production": "means version 1: no version was behind production before",
        "run": f"{bucket.uri}/runs/r",
        "report": "runs/r/report/report.html",
        "W&B": "off",
        "another": "place",
        "predict": "nucleus predict IMAGES --model m@1 --out results/",
    }


def test_why_an_alias_did_not_move(published: Published, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    pass_gate(bucket, published(), "production", "map", lambda _: 0.0)
    second = published(run="s", score=0.25)
    assert rows(second, bucket, capsys)["compare"] == "nucleus models compare m@1 m@2"
    assert rows(second, bucket, capsys)["production"] == "not judged; move it: nucleus models alias m@2 production"
    pass_gate(bucket, second, "production", "map", lambda _: 0.0)
    told = rows(second, bucket, capsys)["production"]
    assert told == "does not move to version 2: test map 0.2500 does not beat 0.5000 of version 1"
    free = published(run="t", gate={"enabled": False})
    assert rows(free, bucket, capsys)["production"] == "not asked to move: gate.enabled = false"


def test_curves_that_are_not_there(published: Published, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    told = rows(published(), bucket, capsys)["TensorBoard"]
    assert told.startswith(f"{bucket.uri}/runs/r/{EVENTS_FILE} (not brought here: ")


def test_tracking(
    published: Published,
    bucket: Bucket,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example/")
    online = rows(published("online"), bucket, capsys)
    assert online["W&B"] == "https://wandb.example/team/nuclei/runs/r"
    offline = published("offline", run="s")
    told = "nucleus runs show s --out DIR; wandb sync DIR/wandb/offline-run-*"
    assert rows(offline, bucket, capsys)["W&B"] == told
    folder = tmp_path / "w" / "wandb" / "offline-run-20260101_000000-s"
    folder.mkdir(parents=True)
    (folder / "run-s.wandb").touch()
    assert rows(offline, bucket, capsys)["W&B"] == "wandb sync w/wandb/offline-run-20260101_000000-s"
