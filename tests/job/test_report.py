"""What a run leaves for people to look at: on disk, and the same in the bucket."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.reporting import _stages
from nucleus.runs.listing import find_run
from nucleus.runs.plan import RunFolder
from nucleus.runs.record import Attempt, Facts, RunRecord, read_record
from nucleus.runs.state import read_state
from nucleus.tracking.tensorboard import EVENTS_FILE
from nucleus.training.validation import RANKED_IMAGES
from tests.faults.proxy import Proxy
from tests.whole_way import Trained

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]


@pytest.fixture
def folder(trained: Trained) -> Path:
    return trained.folder.parent / "runs" / "first-run" / "report"


@pytest.fixture
def record(folder: Path) -> RunRecord:
    return read_record((folder / "record.json").read_bytes(), str(folder))


def test_the_same_on_disk_and_in_the_bucket(trained: Trained, folder: Path) -> None:
    prefix = "runs/first-run/report/"
    stored = {item.key.removeprefix(prefix) for item in trained.bucket.objects(prefix)}
    local = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert stored == local | {"facts.json"}  # what the workers told is in the record
    assert {name for name in local if "/" not in name} == {"report.html", "record.json"}
    for name in local:
        assert trained.bucket.get(prefix + name) == (folder / name).read_bytes(), name


def test_the_record_is_of_this_run(trained: Trained, record: RunRecord, cluster_line: Proxy) -> None:
    manifest = trained.manifest
    assert (record.run, record.model, record.version) == ("first-run", "tiny", 1)
    assert record.metrics == manifest.origin.metrics
    assert record.history == trained.recorder.epochs
    assert record.recipe == manifest.origin.recipe
    assert (record.workers, record.device) == (2, "1 CPU core")
    assert record.endpoint == cluster_line.endpoint
    assert [(attempt.epochs_done, attempt.lost) for attempt in record.attempts] == [(0, 0.0)]
    assert record.restarts == []
    assert record.gate is not None
    assert record.gate.startswith("production moved to version 1")
    validated = [metrics for metrics in record.history if "val_map" in metrics]
    assert record.history[record.best_epoch - 1]["val_map"] == max(metrics["val_map"] for metrics in validated)


def test_the_state_is_that_of_a_published_run(trained: Trained) -> None:
    assert read_state(RunFolder(trained.bucket, "first-run")).version == "tiny@1"
    assert find_run(trained.bucket, "first-run").status.short == "published as tiny@1"


def test_time_and_cost(record: RunRecord) -> None:
    seconds = {stage.name: stage.seconds for stage in record.stages}
    assert next(iter(seconds)) == "start, wait and save"
    assert {"build the network", "train", "validate", "tune the thresholds", "publish"} <= seconds.keys()
    assert all(value >= 0 for value in seconds.values())
    of_workers = sum(seconds.values()) - seconds["start, wait and save"] - seconds["publish"]
    assert record.worker_seconds == pytest.approx(2 * of_workers)
    assert (record.cpu_seconds, record.gpu_seconds) == (record.worker_seconds, 0)


def test_what_restarts_cost_is_a_stage_of_its_own(record: RunRecord) -> None:
    seconds = {"build the network": 5.0, "tune the thresholds": 2.0}
    kept = {name: value for name, value in record.model_dump().items() if name in Facts.model_fields}
    facts = Facts.model_validate({**kept, "seconds": seconds})
    history = [{"seconds": 10.0, "validation_seconds": 1.0}] * 2
    attempts = [
        Attempt(driver="a", epochs_done=0),
        Attempt(driver="a", epochs_done=0, lost=500.0),  # before this driver
        Attempt(driver="b", epochs_done=1, lost=900.0),
        Attempt(driver="b", epochs_done=1, lost=30.0),
    ]
    del attempts[2]
    stages = {stage.name: stage.seconds for stage in _stages(facts, history, {"train": 100.0}, attempts)}
    assert list(stages) == [
        *("start, wait and save", "build the network", "train", "validate", "tune the thresholds", "lost to restarts"),
    ]
    assert (stages["start, wait and save"], stages["lost to restarts"]) == (41.0, 30.0)
    assert sum(stages.values()) == 100.0
    alone = {stage.name for stage in _stages(facts, history, {"train": 100.0}, attempts[:1])}
    assert "lost to restarts" not in alone


def test_network(record: RunRecord) -> None:
    network = record.network
    assert (network.skips, network.decoder) == ([16, 32, 64, 128, 128], [16] * 5)
    assert network.parameters > network.trained_parameters > network.parameters - network.encoder_parameters


def test_pictures(trained: Trained, folder: Path, record: RunRecord) -> None:
    """Epochs 2 and 3 were validated; the images are smaller than what is reduced."""
    samples = {sample.name: sample for sample in trained.dataset.manifest.samples}

    def picture(*place: str) -> np.ndarray:
        found = cv2.imread(str(folder.joinpath("pictures", *place[:-1], f"{place[-1]}.png")))
        assert found is not None, place
        return found

    assert record.watched
    for image in record.watched:
        assert (samples[image.name].split, samples[image.name].kind) == ("val", image.kind)
        assert image.epochs == [0, 2, 3]
        shown = [picture("watched", image.name, name) for name in ("image", "truth", "epoch-00000", "best")]
        assert {each.shape[:2] for each in shown} == {(samples[image.name].height, samples[image.name].width)}
        assert (shown[0] != shown[1]).any()
    for example in record.examples:
        assert samples[example.name].split == "train"
        assert picture("examples", example.name, "augmented").shape == (64, 64, 3)
        assert (picture("examples", example.name, "augmented-labels") >= 0).all()
    tests = trained.dataset.manifest.split_samples("test")
    assert {image.name for image in record.test_images} == {sample.name for sample in tests}
    assert len(tests) <= 2 * RANKED_IMAGES
    for image in record.test_images:
        for outlined in ("truth", "mistakes"):
            assert (picture("test", image.name, "image") != picture("test", image.name, outlined)).any()
        assert image.nuclei == samples[image.name].nuclei
        assert image.scores["map"] == pytest.approx(np.mean([v for k, v in image.scores.items() if k[:3] == "ap_"]))


def test_scores_of_images_add_up(record: RunRecord) -> None:
    for name in ("map", "iou", "dice", "accuracy"):
        mean = np.mean([image.scores[name] for image in record.test_images])
        assert mean == pytest.approx(record.metrics["test"]["all"][name])


def test_crops_are_scored_too(record: RunRecord) -> None:
    for metrics in record.history:
        assert 0 <= metrics["iou"] <= metrics["dice"] <= 1
        assert 0 <= metrics["accuracy"] <= 1
        assert metrics["images_per_second"] == pytest.approx(2 * metrics["images_per_second_per_worker"])


def test_history_goes_with_each_checkpoint(trained: Trained, record: RunRecord) -> None:
    assert json.loads(trained.bucket.get("runs/first-run/history.json")) == record.history


def test_tensorboard_on_disk_and_in_the_bucket(trained: Trained, record: RunRecord) -> None:
    events = trained.folder.parent / "runs" / "first-run" / EVENTS_FILE
    assert trained.bucket.get(f"runs/first-run/{EVENTS_FILE}") == events.read_bytes()
    found = EventAccumulator(str(events.parent), {"images": 0, "scalars": 0}).Reload()
    for name in ("loss", "val_map", "images_per_second_per_worker"):
        told = {event.step: event.value for event in found.Scalars(name)}
        expected = {int(metrics["epoch"]): metrics[name] for metrics in record.history if name in metrics}
        assert told == pytest.approx(expected, rel=1e-6)
    watched = record.watched[0]
    assert [event.step for event in found.Images(f"predictions/{watched.name}")] == [0, 2, 3]
    assert [event.step for event in found.Images(f"best/{watched.name}")] == [3]
    assert found.Tags()["graph"]
