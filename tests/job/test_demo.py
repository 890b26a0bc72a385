"""`nucleus demo` as typed, in a process of its own. It starts its own S3 server and Ray cluster: that is its work."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tifffile

SMALL = (
    "optimizer.epochs=1",
    "input.crop=64",
    "input.batch_size=4",
    "input.tile=64",
    "input.overlap=16",
)


@pytest.fixture
def another_cluster(ray_cluster: str) -> Iterator[str]:  # noqa: ARG001
    """A folder in which Ray has noted that the cluster last started on this machine is the session's."""
    import ray

    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # short, for it holds sockets
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
        yield folder


def test_demo(dozen: Path, another_cluster: str, tmp_path: Path) -> None:
    names = ("AWS_", "NUCLEUS_", "WANDB_", "RAY_ADDRESS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(names)}
    nowhere = "http://127.0.0.1:9"  # no download works, and what runs on this machine must be reached all the same
    environment |= {"KERAS_HOME": str(tmp_path / "keras"), "https_proxy": nowhere, "http_proxy": nowhere}
    environment["RAY_TMPDIR"] = another_cluster
    settings = [part for setting in SMALL for part in ("--set", setting)]
    command = [sys.executable, "-m", "nucleus", "demo", str(dozen), "--recipe", "demo"]
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path / "w"), *settings],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "12 images in s3://nucleus/datasets/demo@" in done.stderr
    assert done.stderr.count("WITHOUT pretrained") >= 2  # before training, and at the end
    assert "published\tdemo@1 at s3://nucleus/models/demo/versions/000001" in done.stdout
    work = tmp_path / "w"
    manifest = json.loads((work / "model" / "000001" / "manifest.json").read_text())
    assert manifest["origin"]["encoder_weights"] == {"source": "none", "sha256": None}
    assert manifest["origin"]["recipe"]["network"]["freeze_encoder"] is False
    predicted = sorted((work / "predictions" / "000001").glob("*.labels.tif"))
    assert len(predicted) == manifest["origin"]["metrics"]["test"]["all"]["images"]
    assert all(tifffile.imread(path).shape == (96, 96) for path in predicted)
    (report,) = (work / "runs").glob("*/report/report.html")
    page = report.read_text()
    assert "demo, version 1" in page
    assert page.count("data:image/jpeg;base64,") > 12
    assert "without pretrained" in page
    assert list((work / "wandb").glob("offline-run-*"))
    status = subprocess.run(
        [sys.executable, "-m", "nucleus", "store", "status", "--dir", str(work / "store")],
        capture_output=True,
        check=False,
    )
    assert status.returncode == 1  # the demo stopped the server that it had started
