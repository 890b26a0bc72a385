"""Prediction and evaluation by the actors of a real Ray cluster, compared with one process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result

from nucleus.cli.main import cli
from nucleus.data import spooling
from nucleus.data.synthetic import write_generated
from nucleus.registry.publish import publish
from nucleus.registry.versions import read_included
from nucleus.storage.bucket import Bucket
from tests.faults.proxy import Fault, Proxy, Request
from tests.small_model import origin
from tests.whole_way import Trained

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("default"),  # Ray 2.60 warns of its own deprecations and leaves sockets to the collector
]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def registry(trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(trained.bucket.uri))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.mark.usefixtures("registry")
def test_the_cluster_predicts_and_resumes(bucket: Bucket, dozen: Path, tmp_path: Path) -> None:
    files = sorted(dozen.rglob("images/*.png"))
    for file in files:
        bucket.put(f"images/{file.name}", file)
    bucket.put("images/broken.png", b"no image")
    out = bucket.uri / "labels"
    typed = ("predict", bucket.uri / "images", "--model", "tiny", "--out", out, "--json")
    run = invoke(*typed)
    assert run.exit_code == 1
    assert "1 of 13 images could not be read" in run.stderr
    answer = json.loads(run.stdout)
    assert (answer["model"], answer["out"], answer["done_before"]) == ("tiny@1", str(out), 0)
    assert list(answer["failures"]) == ["broken.png"]
    assert invoke("predict", *files, "--model", "tiny", "--out", tmp_path / "out").exit_code == 0
    for file in files:
        name = f"{file.stem}.labels.tif"
        assert bucket.get(f"labels/{name}") == (tmp_path / "out" / name).read_bytes()
    assert len(answer["nuclei"]) == 12
    assert bucket.find("labels/nuclei.parquet")

    bucket.delete("images/broken.png")
    run = invoke(*typed)
    assert run.exit_code == 0
    assert (json.loads(run.stdout)["nuclei"], json.loads(run.stdout)["done_before"]) == ({}, 12)
    assert invoke(*typed, "--tta").exit_code == 2


@pytest.mark.usefixtures("registry")
def test_the_cluster_uses_the_model_that_comes_along(bucket: Bucket, dozen: Path, tmp_path: Path) -> None:
    """Each worker has it in its package; another one would be refused, and results with another are not joined."""
    files = sorted(dozen.rglob("images/*.png"))[:3]
    for file in files:
        bucket.put(f"images/{file.name}", file)
    typed = ("predict", bucket.uri / "images", "--out", bucket.uri / "labels", "--workers", 1, "--json")
    run = invoke(*typed)
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["model"] == str(read_included())
    assert json.loads(bucket.get("labels/prediction.json"))["registry"] is None
    assert invoke("predict", *files, "--out", tmp_path / "out").exit_code == 0
    for file in files:
        name = f"{file.stem}.labels.tif"
        assert bucket.get(f"labels/{name}") == (tmp_path / "out" / name).read_bytes()
    assert json.loads(invoke(*typed, "--model", "nuclei").stdout)["done_before"] == 3
    other = invoke(*typed, "--model", "tiny")
    assert other.exit_code == 2
    assert f"found those of {read_included()}" in other.stderr
    spread = invoke("evaluate", "nuclei", "dozen", "--workers", 1, "--json")
    assert json.loads(spread.stdout)["model"] == str(read_included())


@pytest.mark.usefixtures("registry")
def test_the_cluster_evaluates_as_one_process_does(tmp_path: Path) -> None:
    """To the bit with as many threads as an actor has; with another number up to the rounding of convolutions."""
    typed = ("evaluate", "tiny", "dozen", "--split", "all", "--json")
    spread = invoke(*typed, "--workers", 2, "--gallery", tmp_path / "a.png")
    assert spread.exit_code == 0, spread.output
    alone = subprocess.run(
        [sys.executable, "-m", "nucleus", *typed, "--gallery", str(tmp_path / "b.png")],
        env={**os.environ, "TF_NUM_INTRAOP_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(spread.stdout)
    assert found == json.loads(alone.stdout)
    assert len(found["images"]) == 12
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    other = json.loads(invoke(*typed).stdout)["overall"]
    assert found["overall"].keys() == other.keys()
    for kind, scores in found["overall"].items():
        assert scores["loss"] == pytest.approx(other[kind]["loss"], rel=1e-4)
        assert scores["iou"] == pytest.approx(other[kind]["iou"], abs=1e-3)  # pixels at the threshold may change sides


def actors_of(line: Proxy) -> Iterator[int]:
    """The processes of actors of the cluster that reaches S3 through a line; other clusters have theirs too."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            raylet = process.parent() if process.name().startswith("ray::_Actor") else None
            if raylet is not None and raylet.environ().get("AWS_ENDPOINT_URL_S3") == line.endpoint:
                yield process.pid


def test_the_cluster_imports_what_one_process_does(
    bucket: Bucket, cluster_line: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is killed while it writes its first part costs nothing: its part is read by another."""
    monkeypatch.setattr(spooling, "_ITEMS_OF_A_PART", 2)  # in this process, which deals the parts
    killed: list[int] = []

    def kill(request: Request) -> Fault | None:
        if request.method == "PUT" and "/importing/" in request.path and not killed:
            killed.append(next(actors_of(cluster_line)))
            os.kill(killed[0], signal.SIGKILL)
        return None

    write_generated(tmp_path / "images", 6, side=64)
    cluster_line.decide = kill
    try:
        spread = invoke("data", "import", tmp_path / "images", bucket.uri / "b", "--workers", 2, "--json")
    finally:
        cluster_line.decide = lambda _: None
    assert spread.exit_code == 0, spread.output
    assert killed
    assert "read images" in spread.stderr
    alone = invoke("data", "import", tmp_path / "images", bucket.uri / "a", "--json")
    found, expected = ({**json.loads(run.stdout), "uri": "", "name": "", "created": ""} for run in (spread, alone))
    assert found == expected
    shards = [{**{item.key.rpartition("/")[2]: item.etag for item in bucket.objects(name)}} for name in ("a/", "b/")]
    assert {**shards[0], "manifest.json": ""} == {**shards[1], "manifest.json": ""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "s3://b/images", "--model", "m", "--out", "{folder}"], "one prefix"),
        (["predict", "{folder}", "--model", "m", "--out", "s3://b/labels"], "one prefix"),
        (["predict", "s3://b/a", "s3://b/c", "--model", "m", "--out", "s3://b/labels"], "one prefix"),
        (["predict", "{folder}", "--model", "m", "--out", "{folder}", "--workers", "2"], "--workers"),
        (["predict", "s3://b/images", "--model", "{model}", "--out", "s3://b/labels"], "NAME"),
        (["evaluate", "{model}", "d", "--workers", "2"], "NAME"),
    ],
)
def test_what_does_not_go_together(trained: Trained, tmp_path: Path, arguments: list[str], message: str) -> None:
    run = invoke(*(text.format(folder=tmp_path, model=trained.folder) for text in arguments))
    assert run.exit_code == 2
    assert message in run.stderr


def test_errors_of_actors_are_the_projects_own(
    bucket: Bucket, dozen: Path, model_files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    publish(bucket, "m", model_files, origin())  # its weights are none
    bucket.put("images/a.png", next(dozen.rglob("images/*.png")))
    typed = ("predict", bucket.uri / "images", "--model", "m", "--out", bucket.uri / "labels")
    run = invoke(*typed, "--workers", 99)  # no more than there is work for
    assert run.exit_code == 1
    assert "model.json" in run.stderr
    assert "Traceback" not in run.stderr
