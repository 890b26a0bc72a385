"""Nobody let in: keys that show nowhere, a job with the least rights, files from a bucket that try to run code."""

import io
import json
import os
import pickle
import re
import shutil
import traceback
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from nucleus.cli.main import cli
from nucleus.config.settings import parse_recipe
from nucleus.errors import IntegrityError, ModelError, NucleusError
from nucleus.model.architecture import ModelConfig, read_model_config
from nucleus.model.unet import load_weights
from nucleus.registry.manifest import list_versions
from nucleus.registry.publish import publish
from nucleus.storage import local_server as server
from nucleus.storage.bucket import Bucket
from nucleus.storage.local_server import RunningStore
from nucleus.storage.uri import S3Uri
from nucleus.training.checkpoint import load_arrays
from tests.conftest import SECRET, holding
from tests.faults.policy import JOB_POLICY, allows
from tests.faults.proxy import Proxy, Request
from tests.whole_way import Trained


def request(method: str, path: str, **headers: str) -> Request:
    return Request(0, method, path, {name.replace("_", "-"): value for name, value in headers.items()}, b"")


@pytest.mark.parametrize(
    "refused",
    [
        request("DELETE", "/b/models/m/versions/000001/manifest.json"),
        request("DELETE", "/b/runs/r/run.json"),
        request("PUT", "/b/datasets/d/0/manifest.json", if_none_match="*"),
        request("PUT", "/b/weights/mobilenet_v2/0.weights.h5", if_none_match="*"),
        request("PUT", "/b/models/m/versions/000001/manifest.json"),
        request("PUT", "/b/models/m/versions/000001/manifest.json", if_match='"0"'),
        request("PUT", "/b/models/m/aliases/production.json"),
        request("PUT", "/b/elsewhere"),
        request("PUT", "/another/runs/r/run.json"),
        request("GET", "/b/elsewhere"),
        request("GET", "/b?list-type=2&prefix=elsewhere/"),
    ],
    ids=lambda item: f"{item.method} {item.path}",
)
def test_what_the_job_has_no_right_to(refused: Request) -> None:
    assert not allows(JOB_POLICY, refused, "b")


@pytest.mark.filterwarnings("default")
def test_a_whole_job_with_the_least_rights(trained: Trained) -> None:
    assert list_versions(trained.bucket, "tiny") == [1]
    assert {item.partition(" ")[0] for item in trained.denied} <= {"DELETE"}  # Ray's attempts to drop old checkpoints


@pytest.mark.filterwarnings("default")
def test_a_whole_job_shows_its_key_nowhere(store: RunningStore, cluster_line: Proxy, trained: Trained) -> None:
    """What it printed is looked through in `test_training.py`."""
    import ray

    assert trained.requests > 20
    assert cluster_line.shown == []
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    for folder in (Path(store.folder), trained.wandb_dir.parent, session):
        assert not holding(folder, SECRET.encode())


def test_an_error_does_not_show_the_key(bucket_uri: S3Uri, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket_uri))
    run = CliRunner().invoke(cli, ["--debug", "--storage-timeout", "1", "models", "list"])
    assert run.exit_code != 0
    assert run.exception is not None
    assert SECRET not in run.output + "".join(traceback.format_exception(run.exception))


class Runs:
    """When it is unpickled it makes a file: what no reader of ours may do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def malicious_keras(path: Path) -> None:
    """A `.keras` archive whose graph has a Lambda layer."""
    layer = {
        "class_name": "Lambda",
        "config": {"function": {"class_name": "__lambda__", "config": {"code": "4wAAAA=="}}},
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {"layers": [layer]}}))
        archive.writestr("metadata.json", "{}")
        archive.writestr("model.weights.h5", b"")


def test_files_that_try_to_run_code(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])

    objects = io.BytesIO()
    np.savez(objects, np.array([Runs(trap)], dtype=object))
    for number, content in enumerate((objects.getvalue(), pickle.dumps(Runs(trap)))):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(content)
        with pytest.raises(IntegrityError):
            load_arrays(path)
        path = path.rename(tmp_path / f"{number}.weights.h5")
        with pytest.raises(ModelError):
            load_weights(network, path)

    path = tmp_path / "lambda.keras"
    malicious_keras(path)
    for name in ("a.keras", "a.weights.h5", "a.h5"):
        with pytest.raises(ModelError):
            load_weights(network, path.rename(tmp_path / name))
        malicious_keras(path)

    whole = tmp_path / "b.weights.h5"
    with h5py.File(whole, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Lambda", "config": {}})
        file.create_dataset("x", data=np.void(pickle.dumps(Runs(trap))))
    with pytest.raises(ModelError):
        load_weights(network, whole)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.weights.h5", "pickle"),
        ("model.weights.h5", "keras"),
        ("model.onnx", "pickle"),
        ("model.json", "pickle"),
        ("model.json", '{"class_name": "Lambda", "config": {"function": "os.system"}}'),
    ],
)
def test_published_models_that_try_to_run_code(
    trained: Trained,
    bucket: Bucket,
    dozen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str,
) -> None:
    """As `nucleus predict` meets them: with a right manifest, for whoever may publish may lie."""
    trap, folder = tmp_path / "trap", tmp_path / "model"
    shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns("manifest.json"))
    if content == "keras":
        malicious_keras(folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Runs(trap)) if content == "pickle" else content.encode())
    publish(bucket, "m", folder, trained.manifest.origin)
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = next(dozen.rglob("images/*.png"))
    engine = "tensorflow" if name == "model.weights.h5" else "auto"
    command = ["predict", str(image), "--model", "m", "--out", str(tmp_path / "out"), "--engine", engine]
    run = CliRunner().invoke(cli, command)
    assert run.exit_code == 1, run.output
    assert name in run.stderr
    assert not trap.exists()


def test_configurations_that_name_code(tmp_path: Path) -> None:
    """A `model.json` says what a network is; what it does not know it refuses."""
    config = ModelConfig.model_validate(
        {
            "encoder": "mobilenet_v2",
            "decoder_channels": [8] * 5,
            "heads": "both",
            "normalization": {},
            "tile": 64,
            "overlap": 16,
        }
    ).model_dump(mode="json")
    for change in (
        {"architecture": "os.system"},
        {"encoder": "__import__('os')"},
        {"layers": [{"class_name": "Lambda"}]},
        {"normalization": {"method": "eval"}},
    ):
        with pytest.raises(ModelError, match="damaged"):
            read_model_config(json.dumps({**config, **change}).encode(), str(tmp_path))


def test_nothing_that_could_run_code_is_imported() -> None:
    """No pickle, no graph of Keras is read anywhere in the package."""
    root = Path(__file__).parents[2]
    forbidden = re.compile(
        r"\bpickle\.load|\bimport pickle|keras\.(models|saving)\.load_model|allow_pickle=True|\beval\(|\bexec\("
    )
    sources = [path for folder in ("nucleus", "job") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 50
    assert [path for path in sources if forbidden.search(path.read_text())] == []


def test_the_embedded_server_listens_on_this_machine_only(store: RunningStore) -> None:
    running = server.status(Path(store.folder))  # a test before this one may have started it anew
    assert running is not None
    sockets = psutil.Process(running.pid).net_connections("inet")
    assert {item.laddr.ip for item in sockets if item.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_credentials_in_a_recipe_are_refused() -> None:
    for key in ("aws_secret_access_key", "secret", "endpoint"):
        with pytest.raises(NucleusError, match=f"unknown key '{key}'"):
            parse_recipe({"model": "m", "dataset": "d", key: "x"}, "r.toml")
