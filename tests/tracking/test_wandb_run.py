"""W&B and TensorBoard: what their files hold, read back from real runs and compared number by number."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from nucleus.config.recipe import TrackingOptions
from nucleus.data.images import encode_png
from nucleus.data.reader import LabelledImage
from nucleus.metrics.scores import score_labels
from nucleus.predict.evaluation import PredictedImage
from nucleus.registry.manifest import ModelManifest, version_prefix
from nucleus.registry.publish import publish
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri
from nucleus.tracking.offline_log import logged_steps, records
from nucleus.tracking.tensorboard import EVENTS_FILE, StepProfile, events_of, graph_of, write_events
from nucleus.tracking.wandb_artifacts import note_published
from nucleus.tracking.wandb_run import (
    CLASSES,
    LARGEST_SIDE,
    WandbRun,
    WorstImage,
    class_mask,
    kept_files,
    offline_files,
    shown_image,
)
from tests.conftest import SECRET
from tests.small_model import origin
from tests.tracking.offline_log import logged_artifacts, logged_rows, rows_of_run
from tests.tracking.wandb_server import WandbServer, wandb_server

RUN = "r-1"
HISTORY = [
    {"epoch": epoch + 1.0, "loss": 1 / (epoch + 3), "learning_rate": 1e-4 / 3, "images_per_second_per_worker": 7.0}
    | ({"val_map": math.sqrt(epoch) / 3, "val_iou": 0.1 + 0.2} if epoch % 2 else {})
    for epoch in range(5)
]
OWN = {"_step", "_runtime", "_timestamp"}
"""What W&B adds to each row."""


def predicted(name: str = "a", height: int = 24, width: int = 40, seed: int = 0) -> PredictedImage:
    """Two touching nuclei and one by itself; the prediction takes the two for one."""
    labels = np.zeros((height, width), np.uint16)
    labels[4:12, 4:12], labels[4:12, 12:20], labels[16:20, 4:8] = 1, 2, 300
    image = np.random.default_rng(seed).integers(0, 60, (height, width, 3), np.uint8)
    scores = score_labels(labels, labels, loss=0.0)
    return PredictedImage(LabelledImage(name, "stain", image, labels), np.where(labels == 2, 1, labels), scores)


def opened(folder: Path, mode: str) -> WandbRun:
    return WandbRun(RUN, TrackingOptions(), mode, folder, {"seed": 3, "run": RUN}, "a-sweep", "c0ffee")


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The rows without pictures, and without what W&B adds."""
    plain = [row for row in rows if not any(isinstance(value, dict) for value in row.values())]
    return [{key: value for key, value in row.items() if key not in OWN} for row in plain]


def pictures(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Epoch and key of each picture; W&B writes the keys of a row in any order."""
    return [(row["epoch"], key) for row in rows for key in sorted(row) if isinstance(row[key], dict)]


def summary_of_file(path: Path) -> dict[str, Any]:
    """What a file leaves as the run's summary, by the first part of each key."""
    found: dict[str, Any] = {}
    for record in records(path):
        for item in record.summary.update:
            found["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return found


def train(folder: Path, epochs: range, images: list[PredictedImage], *, end: bool, mode: str = "offline") -> WandbRun:
    """As a worker does; a resumed run logs the epochs before again."""
    run = opened(folder, mode)
    for metrics in HISTORY[: epochs.start]:
        run.log(metrics)
    for epoch in epochs:
        if epoch == 1:  # the first that is validated: before its metrics, with what was predicted before training
            run.predictions(0, images)
            run.predictions(epoch + 1, images)
        run.log(HISTORY[epoch])
        if epoch in {0, 3}:
            run.predictions(epoch + 1, images)
    if end:
        run.predictions(None, images)
        run.finish({"test_map": 0.25})
    else:
        run.abort()
    return run


def test_every_number_and_picture_is_there_once(tmp_path: Path) -> None:
    run = train(tmp_path, range(5), [predicted("a"), predicted("b")], end=True)
    rows = rows_of_run(tmp_path, RUN)
    assert numbers(rows) == HISTORY
    shown = [(epoch, f"predictions/{name}") for epoch in (1, 0, 2, 4) for name in "ab"]
    assert pictures(rows) == [*shown, (5, "best/a"), (5, "best/b")]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert run.run_path == f"nucleus/{RUN}"


def test_a_resumed_run_adds_what_is_missing(tmp_path: Path) -> None:
    """In the same folder nothing twice; in another one the numbers again, at the same steps."""
    train(tmp_path / "a", range(3), [predicted()], end=False)
    train(tmp_path / "a", range(2, 5), [predicted()], end=True)
    assert numbers(rows_of_run(tmp_path / "a", RUN)) == HISTORY
    once = [(epoch, "predictions/a") for epoch in (1, 0, 2, 4)]
    assert pictures(rows_of_run(tmp_path / "a", RUN)) == [*once, (5, "best/a")]
    train(tmp_path / "a", range(4, 5), [predicted()], end=True)  # it ended, and the driver was lost before it heard
    assert numbers(rows_of_run(tmp_path / "a", RUN)) == HISTORY
    assert Counter(pictures(rows_of_run(tmp_path / "a", RUN))).most_common(1)[0][1] == 1

    train(tmp_path / "b", range(3, 5), [predicted()], end=True)
    assert numbers(rows_of_run(tmp_path / "b", RUN)) == HISTORY
    steps = [
        {row["epoch"]: row["_step"] for row in rows_of_run(tmp_path / name, RUN) if "loss" in row} for name in "ab"
    ]
    assert steps[0] == steps[1]
    last = summary_of_file(offline_files(tmp_path / "a", RUN)[-1])
    expected = {"test_map": 0.25, **HISTORY[3], **HISTORY[4]}
    assert {name: last[name] for name in expected} == expected  # sent last, it replaces the others


def test_a_run_that_began_before_0_3_goes_on_counting_from_zero(tmp_path: Path) -> None:
    """W&B keeps the rows that it has; the steps are the same in both counts."""
    earlier = [{**metrics, "epoch": metrics["epoch"] - 1} for metrics in HISTORY]
    run = WandbRun(RUN, TrackingOptions(), "offline", tmp_path, first_epoch=0)
    run.log(HISTORY[0])
    run.predictions(0, [predicted()])
    for metrics in HISTORY[1:3]:
        run.log(metrics)
    run.abort()
    resumed = WandbRun(RUN, TrackingOptions(), "offline", tmp_path, first_epoch=0)
    for metrics in HISTORY:
        resumed.log(metrics)
    resumed.predictions(None, [predicted()])
    resumed.finish({"epoch": 5.0, "test_map": 0.25})
    rows = rows_of_run(tmp_path, RUN)
    assert numbers(rows) == earlier
    assert pictures(rows) == [(-1, "predictions/a"), (4, "best/a")]
    assert summary_of_file(offline_files(tmp_path, RUN)[-1])["epoch"] == 4
    train(tmp_path / "new", range(5), [predicted()], end=True)
    steps = [
        [row["_step"] for row in rows_of_run(folder, RUN) if "loss" in row] for folder in (tmp_path, tmp_path / "new")
    ]
    assert steps[0] == steps[1]


KILLED = """
import json, sys, time
from pathlib import Path
import psutil
from nucleus.config.recipe import TrackingOptions
from nucleus.tracking.wandb_run import WandbRun

folder, written, history = Path(sys.argv[1]), sys.argv[2] == "True", json.loads(sys.argv[3])
run = WandbRun("r-1", TrackingOptions(), "offline", folder)
file = next(folder.glob("wandb/*/*.wandb"))

def wait_until_written():
    given = time.time() + 0.5
    while file.stat().st_mtime < given:
        run.wandb_run.summary["waiting"] = time.time()  # or W&B has nothing to write
        time.sleep(0.1)

run.log(history[0])
run.log(history[1])
wait_until_written()
run.log(history[2])
if written:
    wait_until_written()
for process in [*psutil.Process().children(), psutil.Process()]:
    process.kill()
"""


@pytest.mark.parametrize("written", [True, False])
def test_a_killed_attempt_is_completed(written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With W&B's process, as Ray does, which has written the last row or not; its file is as new as the row is."""
    monkeypatch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(written), json.dumps(HISTORY)]
    done = subprocess.run(command, check=False)
    assert done.returncode == -signal.SIGKILL
    (file,) = offline_files(tmp_path, RUN)
    os.utime(file)  # as if W&B had written something else just before it was killed
    kept = numbers(rows_of_run(tmp_path, RUN))
    assert kept in ([HISTORY[:3]] if written else [HISTORY[:2], HISTORY[:3]])
    train(tmp_path, range(2, 5), [predicted()], end=True)
    assert numbers(rows_of_run(tmp_path, RUN)) == HISTORY


def test_a_file_in_another_format_holds_nothing(tmp_path: Path) -> None:
    """All rows are logged again then, at the same steps."""
    train(tmp_path, range(3), [predicted()], end=False)
    (file,) = offline_files(tmp_path, RUN)
    whole = file.read_bytes()
    assert logged_steps(file) == {0, 2, 4, 5, 6, 8}
    file.write_bytes(b"another" + whole[7:])
    assert logged_steps(file) == set()
    file.write_bytes(whole[:-9])
    assert logged_steps(file) == {0, 2, 4, 5, 6, 8}  # the end of the run is cut off
    file.write_bytes(whole[: len(whole) // 4])
    assert logged_steps(file) < {0, 2, 4, 5, 6, 8}


def test_predictions_are_overlays_of_w_and_b(tmp_path: Path) -> None:
    small, large = predicted("small"), predicted("large", 600, 1100)
    train(tmp_path, range(1), [small, large], end=True)
    (row,) = [row for row in rows_of_run(tmp_path, RUN) if "best/small" in row]
    folder = offline_files(tmp_path, RUN)[0].parent / "files"
    for item in (small, large):
        shown = row[f"best/{item.sample.name}"]
        assert shown["caption"] == f"{item.sample.name} (stain)"
        image = cv2.imread(str(folder / shown["path"]), cv2.IMREAD_COLOR_RGB)
        assert np.array_equal(image, shown_image(item.sample.image))
        for name, labels in (("truth", item.sample.labels), ("prediction", item.labels)):
            mask = cv2.imread(str(folder / shown["masks"][name]["path"]), cv2.IMREAD_UNCHANGED)
            assert np.array_equal(mask, class_mask(labels))
            assert mask.shape == image.shape[:2]
    assert image.shape == (round(600 * LARGEST_SIDE / 1100), LARGEST_SIDE, 3)
    config = summary_of_config(offline_files(tmp_path, RUN)[0])["_wandb"]["mask/class_labels"]
    assert config["best/small_wandb_delimeter_truth"]["value"] == {str(key): name for key, name in CLASSES.items()}


def summary_of_config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(path):
        for update in (record.run.config.update, record.config.update):
            found.update({item.key: json.loads(item.value_json) for item in update})
    return found


def test_touching_nuclei_are_told_apart() -> None:
    item = predicted()
    truth, found = class_mask(item.sample.labels), class_mask(item.labels)
    assert np.array_equal(np.argwhere(truth == 2), [(y, x) for y in range(4, 12) for x in (11, 12)])
    assert np.array_equal(truth > 0, item.sample.labels > 0)
    assert not (found == 2).any()
    large = class_mask(np.kron(item.sample.labels, np.ones((40, 40), np.uint16)))
    assert large.shape == (307, 512)
    assert (large == 2).sum() == pytest.approx(2 * 8 * 12.8, rel=0.1)  # still two pixels wide


def test_the_commit_and_configuration_are_those_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a clone of something else, whose remote's address holds a password."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for command in (["init", "-q"], ["remote", "add", "origin", f"https://me:{SECRET}@example.org/x.git"]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    monkeypatch.chdir(clone)
    monkeypatch.setattr(sys, "argv", ["worker.py", f"--redis-password={SECRET}"])
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MY_PASSWORD", SECRET)
    train(tmp_path / "w", range(1), [predicted()], end=True)
    (path,) = offline_files(tmp_path / "w", RUN)
    assert sys.argv[1:]
    config = summary_of_config(path)
    assert (config["seed"], config["run"]) == (3, RUN)
    (begun,) = [record.run for record in records(path) if record.HasField("run")]
    assert (begun.git.commit, begun.git.remote_url, begun.run_group, begun.job_type) == (
        "c0ffee",
        "",
        "a-sweep",
        "train",
    )
    assert any(record.HasField("stats") for record in records(path))
    (first, second) = [record.environment for record in records(path) if record.HasField("environment")]
    assert (first.git.commit, list(first.args), second.cpu_count > 0) == ("c0ffee", [], True)
    files = [path for path in (tmp_path / "w").rglob("*") if path.is_file()]
    assert len(files) > 4
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
        assert path.suffix not in {".py", ".patch"}


def test_a_run_of_the_users_program_stays_its_own(tmp_path: Path) -> None:
    import wandb

    settings = wandb.Settings(console="off", silent=True)
    own = wandb.init(project="own", id="own", mode="offline", dir=str(tmp_path / "own"), settings=settings)
    train(tmp_path / "a", range(2), [predicted()], end=True)
    assert wandb.run is own
    own.log({"mine": 1})
    own.finish()
    wandb.teardown()
    assert [row["mine"] for row in rows_of_run(tmp_path / "own", "own")] == [1]
    assert numbers(rows_of_run(tmp_path / "a", RUN)) == HISTORY[:2]


def test_tracking_that_is_off_loads_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nucleus.config.recipe import TrackingOptions\n"
        "import nucleus.tracking.wandb_run\n"
        "from nucleus.tracking.wandb_artifacts import note_published\n"
        f"assert note_published('r', TrackingOptions(), 'disabled', Path({str(tmp_path)!r}), manifest=None, uri=None,\n"
        "    history=[], worst=[]) == []\n"
        "sys.exit(','.join({'wandb', 'tensorflow', 'keras'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def published(bucket: Bucket, model_files: Path) -> ModelManifest:
    return publish(bucket, "m", model_files, origin(RUN, 0.75))


def draw(folder: Path) -> list[WorstImage]:
    """Two images of different sizes."""
    folder.mkdir()
    found = []
    for number, name in enumerate("xy"):
        paths = [folder / f"{name}-{what}.png" for what in ("image", "mistakes")]
        for offset, path in enumerate(paths):
            path.write_bytes(encode_png(np.full((8, 9 + number, 3), 10 * number + offset, np.uint8)))
        found.append(WorstImage(name, f"{name} (stain): mAP 0.{number}00; 9 nuclei, 8 predicted: 4 missed", *paths))
    return found


def note(
    folder: Path, manifest: ModelManifest, uri: S3Uri, worst: list[WorstImage], mode: str = "offline", **given: Any
) -> list[str]:
    return note_published(
        RUN,
        TrackingOptions(),
        mode,
        folder,
        "a-sweep",
        manifest=manifest,
        uri=uri / version_prefix(manifest.model, manifest.version),
        history=HISTORY,
        worst=worst,
        **given,
    )


def test_a_published_model_is_an_artifact_of_references(
    published: ModelManifest, bucket: Bucket, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", SECRET])
    train(tmp_path, range(5), [predicted()], end=True)
    worst = draw(tmp_path / "pictures")
    for _ in range(2):
        assert note(tmp_path, published, bucket_uri, worst, alias="production", commit="c0ffee") == []
    paths = offline_files(tmp_path, RUN)
    assert len(paths) == 2  # the second time adds nothing

    (model,) = logged_artifacts(tmp_path, RUN)
    prefix = f"{bucket_uri}/{version_prefix('m', 1)}"
    assert {item.path: item.ref for item in model.manifest.contents} == {
        name: f"{prefix}/{name}" for name in (*published.files, "manifest.json")
    }
    assert {*model.aliases} >= {"version-1", "production"}
    assert (model.name, model.type) == ("m", "model")
    assert not any(item.local_path for item in model.manifest.contents)  # nothing that only this machine has
    metadata = json.loads(model.metadata)
    assert metadata["files"] == {name: file.model_dump() for name, file in published.files.items()}
    assert (metadata["version"], metadata["uri"]) == (1, prefix)
    assert metadata["dataset"] == published.origin.dataset
    assert metadata["metrics"] == published.origin.metrics
    etags = {item.key.rpartition("/")[2]: item.etag.strip('"') for item in bucket.objects(f"{version_prefix('m', 1)}/")}
    etags.pop("claim.json")
    assert {item.path: item.digest for item in model.manifest.contents} == etags

    (row,) = logged_rows(paths[1])
    assert row["epoch"] == 5
    assert row["_step"] > max(row["_step"] for row in logged_rows(paths[0]))
    files = []
    for number, image in enumerate(worst):
        shown = row[f"worst/{image.name}"]
        assert shown["captions"] == [f"{number + 1}. {image.name}", image.caption]
        for offset, name in enumerate(shown["filenames"]):
            assert not Path(name).is_absolute()
            files.append(paths[1].parent / "files" / name)
            assert np.array_equal(cv2.imread(str(files[-1])), np.full((8, 9 + number, 3), 10 * number + offset))
    last = summary_of_file(paths[1])
    expected = {"val_map": 0.75, "test_map": 0.75, "val_iou": 0.1 + 0.2, "loss": HISTORY[4]["loss"]}
    assert {name: last[name] for name in expected} == expected

    kept = kept_files(tmp_path, RUN)
    assert {*files, *paths} <= set(kept.values())
    assert all(Path(name).parts[0].startswith("offline-run-") for name in kept)
    for path in kept.values():
        assert SECRET.encode() not in path.read_bytes(), path


def test_a_bucket_that_cannot_be_reached_is_a_warning(
    published: ModelManifest, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worst = draw(tmp_path / "pictures")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    (problem,) = note(tmp_path, published, bucket_uri, worst)
    assert "Expected to log m@1" in problem
    assert f"--resume {RUN}" in problem
    monkeypatch.undo()
    assert note(tmp_path, published, bucket_uri, worst) == []
    assert [item.type for item in logged_artifacts(tmp_path, RUN)] == ["model"]
    assert [key for _, key in pictures(rows_of_run(tmp_path, RUN))] == ["worst/x", "worst/y"]


@pytest.fixture
def server(store: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:  # noqa: ARG001
    """A stand-in for W&B's server; W&B uses it."""
    import wandb

    with wandb_server() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        wandb.teardown()  # it reads the environment once
        yield running
        wandb.teardown()


def sync(*folders: Path) -> None:
    """Send offline runs as a person does."""
    command = [str(Path(sys.executable).parent / "wandb"), "sync", "--yes", "--include-synced", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr


def check_sent(server: WandbServer, published: ModelManifest) -> None:
    """What an online run has sent, or an offline one when it was synced."""
    assert numbers(server.history) == HISTORY
    once = [(epoch, "predictions/a") for epoch in (1, 0, 2, 4)]
    assert pictures(server.history) == [*once, (5, "best/a"), (5, "worst/x"), (5, "worst/y")]
    shown = [value for row in server.history for value in row.values() if isinstance(value, dict)]
    for value in shown:
        masks = [mask["path"] for mask in value.get("masks", {}).values()]
        assert len(masks) == (2 if "path" in value else 0)
        for name in (*(value.get("filenames") or [value["path"]]), *masks):
            assert f"files/{name}" in server.files
    assert sorted(value["captions"][1] for value in shown if "captions" in value) == [
        f"{name} (stain): mAP 0.{number}00; 9 nuclei, 8 predicted: 4 missed" for number, name in enumerate("xy")
    ]
    assert {"val_map", "test_map", "loss"} <= set(server.summary)
    assert server.summary["test_map"] == 0.75
    assert (server.config["seed"]["value"], server.config["run"]["value"]) == (3, RUN)
    assert {run["commit"] for run in server.runs} <= {"c0ffee", None}
    assert {run["name"] for run in server.runs} == {RUN}
    (model,) = server.artifacts
    assert (model["artifactTypeName"], model["artifactCollectionName"]) == ("model", "m")
    assert {item["alias"] for item in model["aliases"]} >= {"version-1", "production"}
    assert json.loads(model["metadata"])["files"] == {k: file.model_dump() for k, file in published.files.items()}
    manifests = [json.loads(data) for path, data in server.files.items() if path.startswith("manifests/")]
    assert manifests
    for found in manifests:
        names = {entry["ref"].rpartition("/")[2] for entry in found["contents"].values()}
        assert names == {*published.files, "manifest.json"}
    assert all(SECRET.encode() not in data for data in server.files.values())


def test_an_offline_run_in_three_parts_is_sent_whole(
    server: WandbServer, published: ModelManifest, bucket_uri: S3Uri, tmp_path: Path
) -> None:
    """Interrupted, resumed, published from another process, and sent from another folder, without the first one."""
    here, there = tmp_path / "here", tmp_path / "there"
    train(here, range(3), [predicted()], end=False)
    train(here, range(3, 5), [predicted()], end=True)
    note(here, published, bucket_uri, draw(tmp_path / "pictures"), alias="production", commit="c0ffee")
    assert server.queries == []
    for name, path in kept_files(here, RUN).items():
        (there / "wandb" / name).parent.mkdir(parents=True, exist_ok=True)
        path.rename(there / "wandb" / name)
    shutil.rmtree(here)
    shutil.rmtree(tmp_path / "pictures")
    sync(*(path.parent for path in offline_files(there, RUN)))
    check_sent(server, published)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The links that W&B is asked for, which the stand-in does not answer: target and aliases."""
    import wandb

    links: list[tuple[str, list[str]]] = []

    def link(_: object, artifact: wandb.Artifact, target: str, aliases: list[str]) -> None:
        assert artifact.type == "model"
        links.append((target, aliases))

    monkeypatch.setattr(wandb.Artifact, "wait", lambda artifact, timeout=None: artifact)  # noqa: ARG005
    monkeypatch.setattr(wandb.Run, "link_artifact", link)
    return links


def test_an_online_run_that_is_resumed_sends_everything_once(
    server: WandbServer,
    registry: list[tuple[str, list[str]]],
    published: ModelManifest,
    bucket_uri: S3Uri,
    tmp_path: Path,
) -> None:
    worst = draw(tmp_path / "pictures")
    train(tmp_path / "a", range(3), [predicted()], end=False, mode="online")
    run = train(tmp_path / "b", range(2, 5), [predicted()], end=True, mode="online")  # on another machine
    assert (run.run_path, run.kept_files) == (f"us/nucleus/{RUN}", {})
    for _ in range(2):
        assert note(tmp_path / "c", published, bucket_uri, worst, "online", alias="production", commit="c0ffee") == []
    first, again = server.artifacts
    assert first["digest"] == again["digest"]  # by which W&B knows that it is there
    server.artifacts.remove(again)
    check_sent(server, published)
    assert registry == [("wandb-registry-model/m", ["version-1", "production"])] * 2


def test_a_registry_that_refuses_is_a_warning(
    server: WandbServer,
    registry: list[tuple[str, list[str]]],
    published: ModelManifest,
    bucket_uri: S3Uri,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import wandb

    def refuse(*_: object, **__: object) -> None:
        raise wandb.errors.CommError("you may not write to this registry")

    monkeypatch.setattr(wandb.Run, "link_artifact", refuse)
    (problem,) = note(tmp_path, published, bucket_uri, draw(tmp_path / "pictures"), "online")
    assert "to W&B's registry as wandb-registry-model/m; W&B says: you may not write to this registry" in problem
    assert [item["artifactTypeName"] for item in server.artifacts].count("model") == 1
    assert registry == []


def test_tensorboard_shows_scalars_pictures_and_the_graph(tmp_path: Path) -> None:
    import keras
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    image = keras.Input((None, None, 3), name="image")
    graph = graph_of(keras.Model(image, keras.layers.Conv2D(2, 3, name="first")(image)))
    drawn = {done: encode_png(np.full((8, 9, 3), 10 * done, np.uint8)) for done in (0, 1, 4)}
    path = tmp_path / EVENTS_FILE
    write_events(path, events_of(HISTORY, {done: {"predictions/a": png} for done, png in drawn.items()}, graph))
    found = EventAccumulator(str(path.parent), {"scalars": 0, "images": 0, "graph": 1}).Reload()
    names = {name for row in HISTORY for name in row} - {"epoch"}
    assert set(found.Tags()["scalars"]) == names
    for name in names:
        expected = [(int(row["epoch"]), pytest.approx(row[name], rel=1e-6)) for row in HISTORY if name in row]
        assert [(item.step, item.value) for item in found.Scalars(name)] == expected
    assert found.Tags()["images"] == ["predictions/a"]
    shown = [(item.step, item.width, item.height, item.encoded_image_string) for item in found.Images("predictions/a")]
    assert shown == [(done, 9, 8, png) for done, png in drawn.items()]
    nodes = found.Graph().node
    assert any("first" in node.name and node.op == "Conv2D" for node in nodes)
    assert len(graph) < 20_000  # no weights


def calls(epochs: int, total: int, at_once: int) -> list[tuple[int, int, int]]:
    return [
        (epoch, min(done + at_once, total), total)
        for epoch in range(1, epochs + 1)
        for done in range(0, total, at_once)
    ]


@pytest.mark.parametrize(
    ("asked", "given", "first", "last"),
    [
        (5, calls(2, 100, 1), (1, 10), (1, 15)),
        (5, calls(2, 100, 8), (1, 16), (1, 24)),
        (50, calls(2, 20, 4), (1, 12), (1, 20)),  # to the epoch's end
        (5, calls(4, 6, 1), (2, 4), (2, 6)),  # short epochs
        (5, calls(4, 8, 8), (2, 8), (3, 8)),  # each is one call
        (5, calls(1, 9, 1), None, None),  # too few
        (0, calls(2, 100, 1), None, None),
        (5, calls(3, 100, 1)[100:], None, None),  # it goes on with the second epoch
    ],
)
def test_which_steps_are_profiled(
    asked: int,
    given: list[tuple[int, int, int]],
    first: tuple[int, int] | None,
    last: tuple[int, int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tensorflow as tf

    now: list[tuple[int, int]] = []
    told: list[tuple[str, tuple[int, int]]] = []
    monkeypatch.setattr(tf.profiler.experimental, "start", lambda _: told.append(("start", now[-1])))
    monkeypatch.setattr(tf.profiler.experimental, "stop", lambda: told.append(("stop", now[-1])))
    profile = StepProfile(asked, tmp_path)
    for epoch, done, total in given:
        now.append((epoch, done))
        profile.steps(epoch, done, total)
    profile.stop()
    assert told == ([("start", first), ("stop", last)] if first else [])


def test_a_profile_can_be_read(tmp_path: Path) -> None:
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf.xplane_pb2 import XSpace

    profile = StepProfile(100, tmp_path)
    for done in range(1, 14):
        tf.linalg.matmul(tf.ones((64, 64)), tf.ones((64, 64))).numpy()
        profile.steps(1, done, 100)
    assert profile.files == {}
    profile.stop()  # as when the run is broken off
    (name,) = [name for name in profile.files if name.endswith(".xplane.pb")]
    assert re.fullmatch(r"plugins/profile/[^/]+/[^/]+\.xplane\.pb", name)
    space = XSpace.FromString(profile.files[name].read_bytes())
    events = {event.name for plane in space.planes for event in plane.event_metadata.values()}
    assert any("MatMul" in event for event in events)
