"""The table at the end of a run: each row is where something is, or what to type."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.ray_internals import is_submitted_job
from job.reporting import report_published
from nucleus.cli.training import print_published
from nucleus.config.recipe import GateOptions
from nucleus.config.settings import parse_recipe
from nucleus.metrics.scores import HEADLINES
from nucleus.registry.aliases import pass_gate
from nucleus.registry.manifest import EncoderWeightsOrigin, ModelManifest, Origin
from nucleus.registry.publish import publish
from nucleus.runs.plan import RunPlan, load_plan, save_plan
from nucleus.storage.bucket import Bucket
from nucleus.tracking.tensorboard import EVENTS_FILE

Published = Callable[..., ModelManifest]
WEIGHTS = EncoderWeightsOrigin(source="none", sha256=None)


@pytest.fixture
def published(bucket: Bucket, model_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """Publish a version of a run that went on in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def make(
        mode: str = "disabled", run: str = "r", score: float = 0.5, tracked: str | None = None, **recipe: Any
    ) -> ModelManifest:
        content = parse_recipe({"model": "m", "dataset": "d", **recipe}, "r.toml")
        dataset = "s3://b/datasets/d@0123456789ab"
        plan = RunPlan(
            run=run,
            bucket=str(bucket.uri),
            recipe=content.model_dump(mode="json"),
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
            wandb_mode=tracked,
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
    pass_gate(bucket, manifest, GateOptions(), lambda _: 0.0)
    found = rows(manifest, bucket, capsys)
    assert found.pop("TensorBoard").startswith("tensorboard --logdir runs/r/tensorboard")
    assert (tmp_path / "runs" / "r" / EVENTS_FILE).read_bytes() == b"events"
    assert found == {
        "published": f"m@1 at {bucket.uri}/models/m/versions/000001",
        "production": "moved to version 1: production did not exist before, and test map 0.5000 reaches 0.1",
        "run": f"{bucket.uri}/runs/r",
        "report": "runs/r/report/report.html",
        "W&B": "off",
        "another": "place",
        "predict": "nucleus predict IMAGES --model m@1 --out results/",
    }


def test_why_an_alias_did_not_move(published: Published, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    pass_gate(bucket, published(), GateOptions(), lambda _: 0.0)
    second = published(run="s", score=0.25)
    assert rows(second, bucket, capsys)["compare"] == "nucleus models compare m@1 m@2"
    assert rows(second, bucket, capsys)["production"] == "not judged. Run: nucleus models alias m@2 production"
    pass_gate(bucket, second, GateOptions(), lambda _: 0.0)
    told = rows(second, bucket, capsys)["production"]
    assert told == "did not move to version 2: test map 0.2500 does not beat 0.5000 of version 1"
    free = published(run="t", gate={"enabled": False})
    assert rows(free, bucket, capsys)["production"] == "not moved: gate.enabled = false"


def test_curves_that_are_not_there(published: Published, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    told = rows(published(), bucket, capsys)["TensorBoard"]
    assert told.startswith(f"{bucket.uri}/runs/r/{EVENTS_FILE} (not downloaded: ")


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


def test_a_run_that_went_offline_is_sent_by_a_command_that_takes_online_attempts(
    published: Published, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = published("online", tracked="offline")
    told = "nucleus runs show r --out DIR; wandb sync --include-online DIR/wandb/*run-*"
    assert rows(manifest, bucket, capsys)["W&B"] == told
    attempts = [tmp_path / "w" / "wandb" / name for name in ("run-20260101_000000-r", "offline-run-20260101_000001-r")]
    for folder in attempts:
        folder.mkdir(parents=True)
        (folder / "run-r.wandb").touch()
    sent = "w/wandb/run-20260101_000000-r w/wandb/offline-run-20260101_000001-r"
    assert rows(manifest, bucket, capsys)["W&B"] == f"wandb sync --include-online {sent}"
    (attempts[0] / "nucleus.json").write_text('{"steps": {}, "closed": true}')  # all of it was sent
    assert rows(manifest, bucket, capsys)["W&B"] == "wandb sync w/wandb/offline-run-20260101_000001-r"


def test_a_job_names_places_that_exist_for_who_reads_its_log(
    published: Published,
    bucket: Bucket,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = published("offline")
    bucket.put(f"runs/r/{EVENTS_FILE}", b"events")
    folder = tmp_path / "w" / "wandb" / "offline-run-20260101_000000-r"
    folder.mkdir(parents=True)
    (folder / "run-r.wandb").touch()
    assert not is_submitted_job()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "r"}}')
    found = rows(manifest, bucket, capsys)
    assert found["report"] == f"{bucket.uri}/runs/r/report/report.html"
    assert found["TensorBoard"] == f"{bucket.uri}/runs/r/tensorboard"
    assert found["W&B"] == "nucleus runs show r --out DIR; wandb sync DIR/wandb/offline-run-*"
    assert found["download"] == "nucleus runs show r --out DIR"
    assert str(tmp_path) not in "".join(found.values())
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_vanishes_after_publishing_costs_no_place(
    published: Published, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray unpacks a job's folder again where two raylets share a session folder, while the driver stands in it."""
    manifest, runs = published(), tmp_path / "elsewhere"
    bucket.put(f"runs/r/{EVENTS_FILE}", b"events")
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)  # the fixture's `monkeypatch.chdir` goes back
    gone.rmdir()
    with pytest.raises(FileNotFoundError):
        Path.cwd()
    print_published(manifest, runs, str(bucket.uri))
    out = capsys.readouterr().out
    assert f"report\t{runs}/r/report/report.html" in out
    assert f"tensorboard --logdir {runs}/r/tensorboard" in out


def test_a_bucket_that_fails_after_publishing_is_a_warning(
    published: Published, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = published()
    bucket.delete("runs/r/run.json")
    print_published(manifest, Path("runs").absolute(), str(bucket.uri))
    said = capsys.readouterr()
    assert f"published\tm@1 at {bucket.uri}/models/m/versions/000001" in said.out
    assert "Warning: m@1 is published" in said.err


def test_a_report_that_cannot_be_written_is_a_warning(
    published: Published, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = published()
    plan = load_plan(bucket, "r")

    def fail(*_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("job.reporting.report_run", fail)
    warnings: list[str] = []
    heard = SimpleNamespace(warn=warnings.append, on_warning=warnings.append)
    report_published(plan, manifest, bucket, heard, {})  # type: ignore[arg-type]
    assert len(warnings) == 1
    assert "m@1 is published" in warnings[0]
    assert "--resume r" in warnings[0]
    assert list(tmp_path.glob("runs/*")) == []
