"""`nucleus runs` and `nucleus models compare`, on runs that were written by hand."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import pytest
from click.testing import CliRunner, Result

import nucleus
from nucleus.cli.main import cli
from nucleus.errors import JobError
from nucleus.registry.manifest import EncoderWeightsOrigin, Origin, read_version
from nucleus.registry.publish import publish
from nucleus.report.drawing import draw_curves, encode_figure
from nucleus.runs import run_rows
from nucleus.runs.comparison import ComparedRun, datasets_warning, flat_recipe, recipe_differences, score_rows
from nucleus.runs.listing import best_epoch, find_run, history_of_version
from nucleus.runs.plan import RunFolder
from nucleus.runs.record import RECORD_FORMAT, Facts, NetworkFacts, RunRecord, Stage, read_facts
from nucleus.runs.run_rows import list_runs
from nucleus.runs.state import RunState, replace_state_of_another
from nucleus.storage.bucket import Bucket
from nucleus.storage.local_server import RunningStore
from nucleus.storage.uri import S3Uri
from tests.faults.proxy import proxied

DATASET = "s3://b/datasets/d@0123456789ab"
DASH = "\u2013"


def recipe(**changes: Any) -> dict[str, Any]:
    flat = {"model": "m", "seed": 1, "optimizer.epochs": 4, "optimizer.learning_rate": 1e-3} | {
        key.replace("__", "."): value for key, value in changes.items()
    }
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *tables, last = key.split(".")
        inner = found
        for table in tables:
            inner = inner.setdefault(table, {})
        inner[last] = value
    return found


def history(epochs: int, score: float = 0.5) -> list[dict[str, float]]:
    """Every second epoch is validated; the last but one of those validations is the best."""
    found: list[dict[str, float]] = []
    for epoch in range(epochs):
        entry = {"epoch": epoch + 1.0, "loss": 1.0 / (epoch + 1), "learning_rate": 1e-3}
        if epoch % 2:
            lower = 0.01 * abs(epoch - 1)
            entry |= {"val_loss": 1.0, "val_iou": score + 0.2, "val_dice": score + 0.3, "val_map": score - lower}
        found.append(entry)
    return found


def scores(value: float, *kinds: str) -> dict[str, dict[str, dict[str, float]]]:
    names = ("ap_50", "ap_70", "ap_90", "map", "iou", "dice", "accuracy")
    return {
        split: {kind: {"images": 3.0, **dict.fromkeys(names, value)} for kind in ("all", *kinds)}
        for split in ("val", "test")
    }


def record(run: str, version: int | None = None, **changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "run": run,
        "group": None,
        "bucket": "s3://b",
        "model": "m",
        "version": version,
        "gate": None,
        "begun": "2026-11-20T10:00:00+00:00",
        "ended": "2026-11-20T11:00:00+00:00",
        "recipe": recipe(),
        "dataset": DATASET,
        "encoder_weights": EncoderWeightsOrigin(source="none", sha256=None),
        "metrics": scores(0.5, "dark-field"),
        "history": history(4),
        "best_epoch": 2,
        "network": NetworkFacts(
            encoder="plain",
            parameters=2,
            encoder_parameters=1,
            trained_parameters=2,
            skips=[1],
            decoder=[1],
            outputs=["nucleus"],
        ),
        "thresholds": {"mask": 0.5},
        "nucleus_diameter": 20.0,
        "workers": 2,
        "device": "1 CPU core",
        "stages": [Stage(name="train", seconds=5400.0), Stage(name="publish", seconds=154.0)],
        "worker_seconds": 7200.0,
        "cpus_per_worker": 1,
        "gpus_per_worker": 0,
        "versions": {"python": "3.11.7", "ray": "2.60.0"},
        "code_version": "0.2.0",
        "commit": "abc",
        "wandb_run": None,
        "examples": [],
        "watched": [],
        "test_images": [],
    }
    return RunRecord(**(values | changes))


def begin(bucket: Bucket, run: str, **changes: Any) -> None:
    """What a run writes first."""
    plan = {
        "format": 1,
        "run": run,
        "bucket": str(bucket.uri),
        "recipe": recipe(),
        "dataset": DATASET,
        "weights_uri": None,
        "weights": {"source": "none", "sha256": None},
        "wandb_mode": "offline",
        "group": None,
        "wandb_dir": "/x",
        "token": "t",
    }
    bucket.put(f"runs/{run}/run.json", json.dumps(plan | changes).encode())


def go_on(bucket: Bucket, run: str, epochs: int, **changes: Any) -> None:
    """What it writes with a checkpoint."""
    bucket.put(f"runs/{run}/history.json", json.dumps(history(epochs, **changes)).encode())
    for name in ("checkpoint_1/state.json", "checkpoint_2/state.json", "tensorboard/events"):
        bucket.put(f"runs/{run}/{name}", b"{}")


def end(bucket: Bucket, left: RunRecord) -> None:
    """What it writes last."""
    files = {
        "record.json": left.model_dump_json().encode(),
        "report.html": b"<!doctype html>",
        "curves.png": b"PNG",
        "pictures/examples/a/image.png": b"PNG",
    }
    for name, data in files.items():
        bucket.put(f"runs/{left.run}/report/{name}", data)


def published(bucket: Bucket, folder: Path, run: str, value: float = 0.5, **changes: Any) -> None:
    """A version, with its history unless `epochs` is None."""
    epochs = changes.pop("epochs", 4)
    values: dict[str, Any] = {
        "run": run,
        "recipe": recipe(),
        "dataset": DATASET,
        "encoder_weights": EncoderWeightsOrigin(source="none", sha256=None),
        "metrics": scores(value),
        "code_version": "0.1.0",
        "wandb_run": None,
    }
    folder.mkdir(exist_ok=True)
    (folder / "model.json").write_text("{}")
    (folder / "metrics.json").unlink(missing_ok=True)
    if epochs is not None:
        (folder / "metrics.json").write_text(json.dumps({"metrics": scores(value), "history": history(epochs, value)}))
    publish(bucket, changes.pop("model", "m"), folder, Origin(**(values | changes)))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def said(*arguments: object) -> Any:
    run = invoke(*arguments, "--json")
    assert run.exit_code == 0, run.output
    return json.loads(run.stdout)


@pytest.fixture
def here(bucket_uri: S3Uri, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket_uri))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def all_sorts(bucket: Bucket, here: Path) -> Bucket:
    """A run of each state, and a folder that is no run."""
    published(bucket, here / "model", "old", 0.4)
    begin(bucket, "old")
    begin(bucket, "stopped", group="s", recipe=recipe(optimizer__epochs=9, optimizer__monitor="val_iou"))
    go_on(bucket, "stopped", 3)
    begin(bucket, "trial", group="s")
    end(bucket, record("trial"))
    begin(bucket, "won", recipe=recipe(model="other"))
    go_on(bucket, "won", 2)
    attempts = [{"driver": "a", "epochs_done": 0}, {"driver": "a", "epochs_done": 1, "lost": 51.0}]
    end(bucket, record("won", 7, model="other", attempts=attempts))
    bucket.put("runs/s/tuner.pkl", b"Ray Tune's")
    return bucket


def test_list_tells_where_each_run_stands(all_sorts: Bucket) -> None:
    rows = {row["run"]: row for row in said("runs", "list")}
    assert set(rows) == {"old", "stopped", "trial", "won"}
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {
        "old": "published",
        "stopped": "unknown",
        "trial": "finished",
        "won": "published",
    }
    assert {name: row["version"] for name, row in rows.items()} == {
        "old": "m@1",
        "stopped": None,
        "trial": None,
        "won": "other@7",
    }
    told = ("epochs", "epochs_asked", "monitor", "best_epoch", "best_epoch_map", "val_map", "test_map", "group")
    assert [rows["stopped"][key] for key in told] == [3, 9, "val_iou", 2, 0.5, None, None, "s"]
    assert [rows["old"][key] for key in told] == [4, 4, "val_map", 2, 0.4, 0.4, 0.4, None]
    assert [rows["won"][key] for key in told] == [4, 4, "val_map", 2, 0.5, 0.5, 0.5, None]
    assert rows["stopped"]["last_write"] >= rows["stopped"]["begun"]
    written = all_sorts.find("runs/stopped/history.json")
    assert written is not None
    assert rows["stopped"]["last_write"] == written.modified.isoformat()


def test_list_is_newest_first_and_can_be_narrowed(all_sorts: Bucket) -> None:
    moments = [row["begun"] for row in said("runs", "list")]
    assert moments == sorted(moments, reverse=True)
    assert {row["run"] for row in said("runs", "list", "--group", "s")} == {"stopped", "trial"}
    assert {row["run"] for row in said("runs", "list", "--model", "other")} == {"won"}
    assert said("runs", "list", "--model", "nothing") == []
    everything = [row["run"] for row in said("runs", "list")]
    assert [row["run"] for row in said("runs", "list", "--limit", 2)] == everything[:2]
    time.sleep(1.1)  # the server's clock tells seconds
    begin(all_sorts, "aaa")
    assert [row["run"] for row in said("runs", "list", "--limit", 1)] == ["aaa"]
    assert [row["run"] for row in said("runs", "list", "--limit", 1, "--group", "s")] == [
        next(run for run in everything if run in {"stopped", "trial"})
    ]


def test_list_to_a_pipe_is_separated_by_tabs(all_sorts: Bucket) -> None:  # noqa: ARG001
    run = invoke("runs", "list")
    assert run.exit_code == 0
    head, *lines = run.stdout.splitlines()
    assert head.split("\t")[:7] == ["run", "model", "state", "epochs", "epoch mAP", "val mAP", "test mAP"]
    cells = {line.split("\t")[0]: line.split("\t") for line in lines}
    assert cells["stopped"][1:8] == ["m", "unknown", "3/9", "0.5000", DASH, DASH, "d@0123456789ab"]
    assert (cells["won"][2], cells["won"][-1]) == ("other@7", "published as other@7")


@pytest.mark.usefixtures("here")
def test_no_runs() -> None:
    assert said("runs", "list") == []
    run = invoke("runs", "list")
    assert (run.exit_code, run.stderr) == (0, "No runs.\n")


@pytest.mark.parametrize("document", ["run.json", "state.json", "history.json", "report/record.json"])
@pytest.mark.parametrize("damage", [b"[" * 100_000, b'{"format": 1}', b"\xff"])
def test_a_damaged_document_is_named_and_does_not_break_the_list(
    document: str, damage: bytes, bucket: Bucket, here: Path
) -> None:
    begin(bucket, "good")
    begin(bucket, "bad")
    bucket.put(f"runs/bad/{document}", damage)
    run = invoke("runs", "list", "--json")
    assert run.exit_code == 0, run.output
    states = {row["run"]: row["state"] for row in json.loads(run.stdout)}
    assert states == {"good": "unknown", "bad": "damaged"}
    where = str(bucket.uri / f"runs/bad/{document}")
    assert where in run.stderr
    assert invoke("runs", "list").exit_code == 0
    for command in (["show", "bad"], ["compare", "good", "bad"]):
        alone = invoke("runs", *command)
        assert (alone.exit_code, alone.stdout) == (1, "")
        assert where in alone.stderr
    assert list(here.iterdir()) == []


def test_a_newer_record_names_the_version_to_install(bucket: Bucket, here: Path) -> None:  # noqa: ARG001
    begin(bucket, "new")
    bucket.put("runs/new/report/record.json", b'{"format": 9}')
    assert "A newer version of this package wrote it" in invoke("runs", "show", "new").stderr


def test_a_damaged_version_leaves_the_runs_of_others(bucket: Bucket, here: Path) -> None:
    published(bucket, here / "model", "one")
    published(bucket, here / "model", "two")
    for run in ("one", "two"):
        begin(bucket, run)
    bucket.put("models/m/versions/000001/manifest.json", b"{")
    run = invoke("runs", "list", "--json")
    states = {row["run"]: row["state"] for row in json.loads(run.stdout)}
    assert states == {"one": "unknown", "two": "published"}
    assert "models/m/versions/000001/manifest.json" in run.stderr
    bucket.put("models/m/versions/000002/metrics.json", b"{")
    assert {row["run"]: row["state"] for row in said("runs", "list")}["two"] == "damaged"


def test_the_plan_of_another_run_is_refused(bucket: Bucket, here: Path) -> None:  # noqa: ARG001
    begin(bucket, "one")
    bucket.put("runs/two/run.json", bucket.get("runs/one/run.json"))
    assert "found that of 'one'" in invoke("runs", "show", "two").stderr


def test_unknown_runs(all_sorts: Bucket) -> None:
    run = invoke("runs", "show", "stoped")
    assert run.exit_code == 1
    assert "did you mean 'stopped'?" in run.stderr
    assert "Run: nucleus runs list" in run.stderr
    assert "nucleus runs list --group s" in invoke("runs", "show", "s").stderr
    assert "did you mean" not in invoke("runs", "show", "zzz").stderr
    run = invoke("runs", "compare", "won", "Bad Name")
    assert (run.exit_code, run.stdout) == (2, "")
    assert "Try 'bad-name'" in run.stderr
    assert all_sorts.folders("runs") == ["old", "s", "stopped", "trial", "won"]


def test_show_tells_where_everything_is(all_sorts: Bucket) -> None:
    run = invoke("runs", "show", "won")
    assert run.exit_code == 0, run.output
    facts = dict(line.split("\t", 1) for line in run.stdout.split("\n\n")[0].splitlines())
    assert facts["state"] == "published as other@7"
    assert facts["optimizer.learning_rate"] == "0.001"
    assert facts["best epoch"] == "2: val_map 0.5000 (before the thresholds were tuned)"
    assert facts["CPU time"] == "2 h 0 min"
    assert facts["restarts"] == "after 1 epoch: 51.0 s from the last checkpoint to the next step"
    places = dict(line.split(": ") for line in run.stdout.split("\n\n")[-1].splitlines())
    assert places["report"] == f"{all_sorts.uri}/runs/won/report/report.html"
    assert places["version"] == f"{all_sorts.uri}/models/other/versions/000007"
    assert places["last checkpoint"].endswith("runs/won/checkpoint_2")
    assert places["dataset"] == DATASET
    assert "test\tdark-field\t3\t0.5000" in run.stdout
    assert "train\t1 h 30 min" in run.stdout
    document = said("runs", "show", "stopped")
    assert (document["record"], document["metrics"], len(document["history"])) == (None, {}, 3)
    assert set(document["places"]) == {"dataset", "run", "last checkpoint", "tensorboard"}
    old = said("runs", "show", "old")
    assert (old["metrics"]["test"]["all"]["map"], len(old["history"])) == (0.4, 4)


def test_show_downloads_the_report(all_sorts: Bucket, here: Path) -> None:
    target = here / "report"
    all_sorts.put("runs/won/wandb/offline-run-1-won/files/requirements.txt", b"numpy")
    assert said("runs", "show", "won", "--out", target)["report"] == str(target)
    names = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    of_wandb = "wandb/offline-run-1-won/files/requirements.txt"
    assert names == {"record.json", "report.html", "curves.png", "pictures/examples/a/image.png", of_wandb}
    (target / "report.html").write_text("an older one")
    run = invoke("runs", "show", "won", "--out", target)
    assert run.exit_code == 0
    assert (target / "report.html").read_bytes() == b"<!doctype html>"
    (target / "pictures" / "thesis.txt").write_text("years of work")
    (target / "report.html").write_text("mine")
    run = invoke("runs", "show", "won", "--out", target)
    assert (run.exit_code, run.stdout) == (2, "")
    assert "holds other files" in run.stderr
    assert (target / "report.html").read_text() == "mine"
    run = invoke("runs", "show", "stopped", "--out", here / "none")
    assert run.exit_code == 1
    assert "a run writes it at its end" in run.stderr
    assert not (here / "none").exists()
    assert all_sorts.find("runs/won/report/report.html")


def test_a_report_cannot_leave_its_folder(all_sorts: Bucket, here: Path) -> None:
    all_sorts._client.put_object(  # no key of ours has such parts
        Bucket=all_sorts.uri.bucket, Key=all_sorts.key("runs/won/report/") + "/a/../../../evil", Body=b"x"
    )
    run = invoke("runs", "show", "won", "--out", here / "in" / "report")
    assert run.exit_code == 1
    assert "evil" in run.stderr
    assert list(here.rglob("evil")) == []


def test_compare_runs(bucket: Bucket, here: Path) -> None:
    begin(bucket, "a")
    end(bucket, record("a", 1))
    begin(bucket, "b", recipe=recipe(optimizer__learning_rate=3e-3, input__kind_weights={"stain": 2.0}))
    end(bucket, record("b", 2, metrics=scores(0.625, "dark-field", "stain"), commit="def", gpus_per_worker=1))
    document = said("runs", "compare", "a", "b")
    assert document["recipe"] == {
        "optimizer.learning_rate": {"a": 0.001, "b": 0.003},
        "input.kind_weights.stain": {"b": 2.0},
    }
    rows = {(row["split"], row["kind"], row["metric"]): row for row in document["metrics"]}
    assert {kind for _, kind, _ in rows} == {"all", "dark-field"}  # stain has only one of them
    assert rows["test", "all", "map"]["values"] == [0.5, 0.625]
    assert rows["test", "all", "map"]["differences"] == [0.0, 0.125]
    assert document["test_scores_compare"]
    assert [one["gpu_seconds"] for one in document["compared"]] == [0.0, 7200.0]
    run = invoke("runs", "compare", "a", "b", "--out", "curves.png")
    assert run.exit_code == 0, run.output
    parts = [[line.split("\t") for line in part.splitlines()] for part in run.stdout.split("\n\n")]
    names, facts, metrics, recipes = parts
    assert names == [["", "run"], ["A", "a"], ["B", "b"]]
    assert ["commit", "abc", "def"] in facts
    assert ["time", "1 h 32 min", "1 h 32 min"] in facts
    assert "python" not in {row[0] for row in facts}  # the same in both
    assert metrics[0] == ["split", "kind", "metric", "A", "B", "B-A"]
    assert ["test", "all", "mAP", "0.5000", "0.6250", "+0.1250"] in metrics
    assert ["input.kind_weights.stain", DASH, "2.0"] in recipes
    assert cv2.imread(str(here / "curves.png")).shape == (1080, 1920, 3)
    assert "Warning" not in run.stderr


def test_compare_of_runs_that_go_on_and_of_other_datasets(all_sorts: Bucket) -> None:
    begin(all_sorts, "elsewhere", dataset="s3://b/datasets/d@ba9876543210")
    end(all_sorts, record("elsewhere", dataset="s3://b/datasets/d@ba9876543210"))
    begin(all_sorts, "empty")
    run = invoke("runs", "compare", "won", "elsewhere", "stopped", "empty", "--out", "c.png")
    assert run.exit_code == 0, run.output
    assert "test scores do not compare" in run.stderr
    assert "empty has no history, so its curves are missing" in run.stderr
    facts = {line.split("\t")[0]: line.split("\t")[1:] for line in run.stdout.split("\n\n")[1].splitlines()}
    assert facts["epochs"] == ["4/4", "4/4", "3/9", f"{DASH}/4"]
    assert f"test\tall\tmAP\t0.5000\t0.5000\t0.0000\t{DASH}\t{DASH}\t{DASH}\t{DASH}" in run.stdout
    assert not said("runs", "compare", "won", "elsewhere")["test_scores_compare"]
    run = invoke("runs", "compare", "stopped", "empty")
    assert run.exit_code == 0
    assert "No scores: no run has ended." in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "compare", "won"], "Expected two or more runs"),
        (["runs", "compare"], "Missing argument"),
        (["runs", "compare", "won", "won"], "won was given twice"),
        (["runs", "compare", "won", "old", "--out", "curves.pdf"], "such as curves.png"),
        (["runs", "compare", *(f"r{i}" for i in range(27))], "at most 26"),
        (["models", "compare", "m@1"], "Expected two or more versions"),
        (["models", "compare", "m", "m@1"], "m and m@1 are both m@1"),
        (["runs", "list", "--limit", "0"], "is not in the range"),
        (["runs", "show", "a b"], "Try 'a-b'"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, all_sorts: Bucket) -> None:  # noqa: ARG001
    run = invoke(*arguments)
    assert (run.exit_code, run.stdout) == (2, "")
    assert message in run.stderr


def test_compare_versions(bucket: Bucket, here: Path) -> None:
    published(bucket, here / "model", "a", 0.5)
    published(bucket, here / "model", "b", 0.625, recipe=recipe(seed=2))
    old = {split: {"all": {"map": 0.25}} for split in ("val", "test")}
    published(bucket, here / "model", "c", metrics=old, epochs=None, model="other", dataset="s3://b/datasets/d@feed")
    document = said("models", "compare", "m@1", "m")
    assert [one["name"] for one in document["compared"]] == ["m@1", "m@2"]
    assert [one["epochs"] for one in document["compared"]] == [4, 4]
    assert document["recipe"] == {"seed": {"m@1": 1, "m@2": 2}}
    run = invoke("models", "compare", "m@1", "m@2", "other", "--out", here / "c.png")
    assert run.exit_code == 0, run.output
    assert f"test\tall\tIoU\t0.5000\t0.6250\t+0.1250\t{DASH}\t{DASH}" in run.stdout
    assert "test\tall\tmAP\t0.5000\t0.6250\t+0.1250\t0.2500\t-0.2500" in run.stdout
    assert f"epochs\t4/4\t4/4\t{DASH}/4" in run.stdout
    assert "A\tm@1\ta\nB\tm@2\tb\nC\tother@1\tc\n" in run.stdout
    assert "test scores do not compare" in run.stderr
    assert "other@1 has no history" in run.stderr
    assert cv2.imread(str(here / "c.png")).shape == (1080, 1920, 3)
    bucket.put("models/m/versions/000001/metrics.json", b"{}")
    run = invoke("models", "compare", "m@1", "m@2")
    assert (run.exit_code, run.stdout) == (1, "")
    assert "metrics.json to have SHA-256" in run.stderr


def compared(name: str, **changes: Any) -> ComparedRun:
    values: dict[str, Any] = {
        "name": name,
        "run": name,
        "state": "finished",
        "recipe": recipe(),
        "dataset": DATASET,
        "encoder_weights": "none",
        "metrics": scores(0.5),
        "history": history(4),
    }
    return ComparedRun(**(values | changes))


def test_the_picture_has_the_curves_of_all_runs() -> None:
    runs = [compared(f"run-{i}") for i in range(10)] + [compared("without", history=[])]
    figure = draw_curves(runs)
    drawn = [{(line.get_gid(), line.get_label()) for line in axes.get_lines()} for axes in figure.axes[:5]]
    names = {f"run-{i}" for i in range(10)}
    metrics = [("loss", "val_loss"), ("val_iou",), ("val_dice",), ("val_map",), ("learning_rate",)]
    assert drawn == [{(metric, name) for metric in panel for name in names} for panel in metrics]
    lines = {line.get_gid(): line for line in figure.axes[0].get_lines()}
    assert lines["val_loss"].get_linewidth() > 1.5 * lines["loss"].get_linewidth()
    assert list(lines["val_loss"].get_xdata()) == [2, 4]
    looks = {(line.get_color(), line.get_marker(), str(line._dash_pattern)) for line in figure.axes[3].get_lines()}
    assert len(looks) == 10
    legend = figure.axes[5].get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[0] == "A  run-0"
    assert texts[10] == "K  without (no history)"
    assert encode_figure(figure).startswith(b"\x89PNG")


def test_the_picture_enlarges_what_people_compare() -> None:
    late = [{"epoch": float(i), "loss": 1.0, "val_map": 0.6 + 0.001 * i if i else 0.0} for i in range(20)]
    bottom, top = draw_curves([compared("a", history=late)]).axes[3].get_ylim()
    assert 0.5 < bottom < 0.61  # the first validation, at 0, is left out
    assert top > 0.619
    flat = [{"epoch": float(i), "loss": 1.0, "val_map": 0.5} for i in range(3)]
    bottom, top = draw_curves([compared("a", history=flat)]).axes[3].get_ylim()
    assert bottom < 0.5 < top


def test_values_of_a_comparison() -> None:
    assert flat_recipe({"a": {"b": {"c": 1}, "d": {}}, "e": [1, 2]}) == {"a.b.c": 1, "e": [1, 2]}
    same = [compared("a"), compared("b", dataset="s3://other/place/e@0123456789ab")]
    assert recipe_differences(same) == {}
    assert datasets_warning(same) is None  # the same content elsewhere
    other = compared("c", dataset="s3://b/datasets/d@feed")
    assert "c on s3://b/datasets/d@feed" in (datasets_warning([*same, other]) or "")
    assert datasets_warning([*same, compared("c", dataset="s3://b/datasets/d@feed", metrics={})]) is None
    rows = score_rows([compared("a", metrics={}), compared("b", metrics={"val": {"all": {"map": 0.5}}})])
    assert [(row.values, row.differences) for row in rows] == [((None, 0.5), (None, None))]
    assert best_epoch([{"epoch": 0.0, "loss": 1.0}], recipe()) is None
    assert best_epoch(history(6), recipe()) == history(6)[1]


def test_a_taken_run_name_is_refused_before_anything_starts(
    bucket: Bucket,
    here: Path,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin(bucket, "taken")
    monkeypatch.setattr("job.train", lambda *_: pytest.fail("it was started"))
    run = invoke("train", "demo", "--run", "taken")
    assert run.exit_code == 1
    assert "'taken' is. Choose another with --run" in run.stderr
    assert "or resume that run: nucleus train --resume taken" in run.stderr
    with pytest.raises(JobError, match=r'nucleus.train\(resume="taken"\)'):
        nucleus.train("demo", run="taken")


def test_epochs_of_older_versions_count_from_one(bucket: Bucket, here: Path) -> None:
    """They counted from 0, in each of their documents."""
    earlier = [{**metrics, "epoch": metrics["epoch"] - 1} for metrics in history(4)]
    published(bucket, here / "model", "old")
    begin(bucket, "old")
    begin(bucket, "stopped")
    bucket.put("runs/stopped/history.json", json.dumps(earlier).encode())
    begin(bucket, "ended")
    ended = record("ended").model_dump(mode="json") | {"format": 1, "history": earlier, "best_epoch": 1}
    bucket.put("runs/ended/report/record.json", json.dumps(ended).encode())
    (here / "model" / "metrics.json").write_text(json.dumps({"history": earlier}))
    origin = read_version(bucket, "m", 1).origin
    publish(bucket, "m", here / "model", origin)
    assert history_of_version(bucket, read_version(bucket, "m", 2)) == history(4)
    for run in ("stopped", "ended"):
        found = find_run(bucket, run)
        assert found.plan.first_epoch == 0  # in W&B, which keeps the rows that it has
        assert found.plan.model_copy(update={"format": 2}).first_epoch == 1
        assert found.history == history(4)
        assert found.best == history(4)[1]
    assert found.record is not None
    assert (found.record.best_epoch, found.record.format) == (2, RECORD_FORMAT)
    facts = {**ended, "seconds": {}}
    kept = {name: facts[name] for name in Facts.model_fields if name in facts}
    assert read_facts(json.dumps(kept).encode(), "x").best_epoch == 2


def test_two_hundred_runs_take_few_requests(bucket: Bucket, here: Path, store: RunningStore) -> None:
    def write(i: int) -> None:
        run = f"r{i:03}"
        begin(bucket, run)
        if i % 2:
            left = record(run, i, history=history(100))
            bucket.put(f"runs/{run}/report/record.json", left.model_dump_json().encode())
        else:
            bucket.put(f"runs/{run}/history.json", json.dumps(history(100)).encode())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(200)))
    published(bucket, here / "model", "r000")
    with proxied(store.port) as line, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", line.endpoint)
        counted = Bucket(bucket.uri)
        assert len(list_runs(counted)) == 200
        assert line.requests <= 4 * 200 + 10
        of_all = line.requests
        assert len(list_runs(counted, limit=10)) == 10
        assert line.requests - of_all < of_all / 2
    assert find_run(bucket, "r000").published == "m@1"


@pytest.mark.usefixtures("here")
def test_names_stay_whole_on_a_terminal(bucket: Bucket) -> None:
    """A terminal gets fewer columns, and is told which are left out; a pipe gets all."""
    names = [*(f"dsb2018-20261123-17581{i}-ab{i:02}" for i in range(5)), "m" * 36]
    for i, name in enumerate(names):
        begin(bucket, name, recipe=recipe(model="dsb2018", seed=i))
        end(bucket, record(name, 10 + i, model="dsb2018", metrics=scores(0.5 + i / 100, "bright-field")))
    for columns in (80, 120):
        listed = on_terminal(columns, "runs", "list")
        assert all(name in listed for name in names)
        assert "dsb2018@10" in listed
        assert "test mAP" in listed
        assert "Left out: model, val mAP, dataset, begun (UTC), last write, details" in listed
        compared = on_terminal(columns, "runs", "compare", *names)
        assert all(name in compared for name in names)
        assert all(f"{0.5 + i / 100:.4f}" in compared for i in range(6))
        assert compared.count("split") == 1
        three = on_terminal(columns, "runs", "compare", *names[:3])
        assert "C-A" in three
        assert "+0.0200" in three
        for text in (listed, compared, three):
            table = [line.rstrip() for line in text.splitlines() if not line.startswith("Left out")]
            assert max(map(len, table)) <= columns, text
        for text in (listed, compared, on_terminal(columns, "runs", "show", names[0])):
            assert "\u2026" not in text
    assert "published as dsb2018@10" in on_terminal(120, "runs", "show", names[0])
    piped = invoke("runs", "compare", *names).stdout
    assert "F-A" in piped


def on_terminal(columns: int, *arguments: str) -> str:
    """What a command prints on a terminal of so many columns."""
    main, other = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "nucleus", *arguments]
    with subprocess.Popen(command, stdout=other, stderr=other, stdin=other, env=environment) as process:
        os.close(other)
        parts = []
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:  # Linux's word for the end of a pseudo-terminal
                break
            if not part:
                break
            parts.append(part)
    os.close(main)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(parts).decode().replace("\r\n", "\n"))


def ended(bucket: Bucket, run: str, word: str = "failed", **known: Any) -> None:
    """A run that has ended, with the state that its driver wrote last."""
    begin(bucket, run)
    state = RunState(state=word, since=datetime.now(UTC), host="node-1", process=42, **known)  # type: ignore[arg-type]
    bucket.put(RunFolder(bucket, run).state_key, state.model_dump_json().encode())


def test_runs_that_have_ended_are_read_once(
    bucket: Bucket, here: Path, store: RunningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a new state, a new run or a removed one changes what is listed; writers need not know of the index."""
    monkeypatch.setattr(run_rows, "_WORTH", 3)
    ended(bucket, "won", "published", version="m@1")
    end(bucket, record("won", 1))
    ended(bucket, "lost", "running")
    for run in ("broken", "halted"):
        ended(bucket, run, "stopped" if run == "halted" else "failed", cause="no room")
    ended(bucket, "waits", "published", version="m@2")  # its record is still to come
    published(bucket, here / "model", "nobody")
    begin(bucket, "old")
    first = list_runs(bucket)
    assert {row.run: row.state for row in first} == {
        "won": "published",
        "lost": "running",
        "broken": "failed",
        "halted": "stopped",
        "waits": "published",
        "old": "unknown",
    }
    index = bucket.get("runs/.index.json")
    assert sorted(json.loads(index)["runs"]) == ["broken", "halted", "won"]
    with proxied(store.port) as line, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", line.endpoint)
        counted = Bucket(bucket.uri)
        assert list_runs(counted) == first
        read = [request.path for request in line.log if "runs/" in request.path]
        assert not [path for path in read for run in ("won", "broken", "halted") if f"/{run}" in path]
    assert list_runs(bucket, limit=2) == first[:2]
    assert list_runs(bucket, model="m", limit=9) == first

    ended(bucket, "broken", "published", version="m@3")  # it was resumed
    end(bucket, record("waits", 2))
    for item in list(bucket.objects("runs/halted/")):
        bucket.delete(item.key)
    now = {row.run: (row.state, row.version) for row in list_runs(bucket)}
    assert "halted" not in now
    assert (now["broken"], now["waits"]) == (("published", "m@3"), ("published", "m@2"))


@pytest.mark.parametrize("damage", [b"[", b'{"format": 1, "runs": {"a": 1}}', b'{"format": 9}'])
def test_a_damaged_index_is_made_anew(damage: bytes, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_rows, "_WORTH", 1)
    ended(bucket, "broken", cause="no room")
    bucket.put("runs/.index.json", damage)
    told: list[str] = []
    (row,) = list_runs(bucket, warn=told.append)
    assert (row.state, row.cause) == ("failed", "no room")
    assert ["runs/.index.json" in text for text in told] == [True] * (b"9" not in damage)
    assert list(json.loads(bucket.get("runs/.index.json"))["runs"]) == ["broken"]
    told.clear()
    assert (list_runs(bucket, warn=told.append), told) == ([row], [])


def test_the_state_of_a_deleted_run_is_not_that_of_the_next_one(bucket: Bucket) -> None:
    ended(bucket, "again", cause="no room")
    (row,) = list_runs(bucket)
    assert row.state == "failed"
    bucket.delete("runs/again/run.json")
    assert list_runs(bucket) == []
    time.sleep(1.1)  # the server's clock tells seconds
    begin(bucket, "again")
    assert [row.state for row in list_runs(bucket)] == ["unknown"]
    assert find_run(bucket, "again").status.state == "unknown"
    replace_state_of_another(RunFolder(bucket, "again"))
    assert [row.state for row in list_runs(bucket)] == ["stopped"]
