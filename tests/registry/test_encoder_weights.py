"""Encoder weights: added to the bucket, fetched, rewritten from Keras's old format, and errors that name the ways."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout
from functools import cache
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

import nucleus.config
from nucleus.config.encoders import KNOWN_WEIGHTS, build_encoder
from nucleus.config.settings import parse_recipe
from nucleus.errors import IntegrityError, WeightsError
from nucleus.model.architecture import config_of_recipe
from nucleus.model.unet import build_unet, encoder_of, load_encoder_weights
from nucleus.progress import Advance, no_progress
from nucleus.registry.encoder_weights import (
    _Download,
    add_weights,
    fetch_start,
    fetch_weights,
    list_weights,
    provide_start,
    provide_weights,
    start_origin,
)
from nucleus.registry.manifest import version_prefix
from nucleus.registry.publish import publish
from nucleus.registry.versions import find_model
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import sha256_of
from tests.small_model import origin

CACHED = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"


@pytest.fixture(scope="module")
def encoder() -> keras.Model:
    """One for the whole file: building it takes seconds."""
    keras.utils.set_random_seed(7)
    return build_encoder("mobilenet_v2")


@pytest.fixture(scope="module")
def weights(encoder: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "encoder.weights.h5"
    encoder.save_weights(path)
    return path


_built_once = cache(build_encoder)


@pytest.fixture(autouse=True)
def _checked_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are loaded into one network to see whether they fit, not each into one of its own."""
    monkeypatch.setattr(nucleus.config, "build_encoder", _built_once)


def write_old_format(encoder: keras.Model, target: Path) -> None:
    """Write weights as Keras's downloads have them: a group per layer, the names in attributes."""
    with h5py.File(target, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in encoder.layers]
        for layer in encoder.layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/{i}:0".encode() for i in range(len(layer.weights))]
            group.attrs["weight_names"] = names
            for name, value in zip(names, layer.get_weights(), strict=True):
                group.create_dataset(name.decode(), data=value)


def test_added_once_and_found_as_imagenet(weights: Path, bucket: Bucket, tmp_path: Path) -> None:
    added = add_weights(weights, "mobilenet_v2", bucket)
    assert added.origin.sha256 == sha256_of(weights)
    assert added.uri.name == f"{sha256_of(weights)[:12]}.weights.h5"
    add_weights(weights, "mobilenet_v2", bucket)
    assert len(list_weights(bucket)) == 1
    assert provide_weights("imagenet", "mobilenet_v2", bucket, "runs/run") == added
    path = fetch_weights(added, tmp_path)
    assert path.read_bytes() == weights.read_bytes()
    path.write_bytes(b"damaged")
    assert sha256_of(fetch_weights(added, tmp_path)) == added.origin.sha256


def test_local_and_s3_paths(weights: Path, bucket: Bucket) -> None:
    local = provide_weights(str(weights), "mobilenet_v2", bucket, "runs/run-1")
    assert local is not None
    assert str(local.uri) == f"{bucket.uri}/runs/run-1/encoder-{sha256_of(weights)[:12]}.weights.h5"
    assert local.origin.source == "file"
    assert list_weights(bucket) == []  # a private file is nobody else's imagenet
    remote = provide_weights(str(local.uri), "mobilenet_v2", bucket, "runs/run-2")
    assert remote is not None
    assert (remote.uri, remote.origin.sha256) == (local.uri, local.origin.sha256)
    assert remote.origin.source == "s3"
    assert provide_weights("none", "mobilenet_v2", bucket, "runs/run-3") is None


def test_old_format_is_rewritten(encoder: keras.Model, bucket: Bucket, tmp_path: Path) -> None:
    write_old_format(encoder, tmp_path / "old.h5")
    added = add_weights(tmp_path / "old.h5", "mobilenet_v2", bucket)
    bucket.put("mine/old.h5", tmp_path / "old.h5")
    remote = provide_weights(f"{bucket.uri}/mine/old.h5", "mobilenet_v2", bucket, "runs/run")
    assert remote is not None
    assert remote.origin.source == "s3"
    again = build_encoder("mobilenet_v2")
    for rewritten in (added, remote):
        again.load_weights(fetch_weights(rewritten, tmp_path))
        assert all(np.array_equal(a, b) for a, b in zip(encoder.get_weights(), again.get_weights(), strict=True))


CODE = """
import sys
from pathlib import Path
from nucleus.errors import WeightsError
from nucleus.registry.encoder_weights import provide_weights
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import parse_uri

bucket = Bucket(parse_uri(sys.argv[1]))
try:
    provide_weights("imagenet", "mobilenet_v2", bucket, "runs/run")
except WeightsError as error:
    print(error)
Path(sys.argv[2]).rename(sys.argv[3])
print(provide_weights("imagenet", "mobilenet_v2", bucket, "runs/run").uri)
"""


def test_imagenet_from_the_keras_cache_goes_into_the_bucket(
    encoder: keras.Model, bucket: Bucket, tmp_path: Path
) -> None:
    """In a process where Keras has its own cache, empty at first, and every download fails."""
    (tmp_path / "models").mkdir()
    write_old_format(encoder, tmp_path / "old.h5")
    nowhere = "http://127.0.0.1:9"
    environment = {**os.environ, "KERAS_HOME": str(tmp_path), "https_proxy": nowhere, "http_proxy": nowhere}
    environment["no_proxy"] = "127.0.0.1"
    arguments = [str(bucket.uri), str(tmp_path / "old.h5"), str(tmp_path / "models" / CACHED)]
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for way in ("nucleus weights add FILE", "network.weights to a local file or s3:// URI", "where the download works"):
        assert way in done.stdout
    (stored,) = list_weights(bucket, "mobilenet_v2")
    assert done.stdout.splitlines()[-1] == str(bucket.uri / stored.key)


def test_files_that_do_not_fit(weights: Path, bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "x.weights.h5").write_bytes(b"no HDF5")
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save_weights(tmp_path / "other.weights.h5")
    for name in ("x.weights.h5", "other.weights.h5"):
        with pytest.raises(WeightsError, match=name):
            add_weights(tmp_path / name, "mobilenet_v2", bucket)
    with pytest.raises(WeightsError, match=r"none\.h5"):
        provide_weights(str(tmp_path / "none.h5"), "mobilenet_v2", bucket, "runs/run")
    assert list(bucket.objects("")) == []
    added = add_weights(weights, "mobilenet_v2", bucket)
    Bucket(added.uri.parent).put(added.uri.name, b"replaced")
    with pytest.raises(WeightsError, match="nucleus weights add"):
        provide_weights("imagenet", "mobilenet_v2", bucket, "runs/run")
    with pytest.raises(IntegrityError):
        fetch_weights(added, tmp_path / "cache")


def test_a_file_with_every_array_of_the_encoder_is_not_loaded(
    weights: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading needs TensorFlow, whose import takes a driver ten seconds; any other file is loaded as before."""
    loaded = []
    monkeypatch.setattr(nucleus.config, "build_encoder", lambda name: loaded.append(name) or _built_once(name))
    provide_weights(str(weights), "mobilenet_v2", bucket, "runs/run")
    assert loaded == []
    other, damaged = tmp_path / "other.weights.h5", tmp_path / "damaged.weights.h5"
    shutil.copy(weights, other)
    with h5py.File(other, "r+") as file:
        del file["layers/conv2d/vars/0"]
        file["layers/conv2d/vars/0"] = np.zeros((3, 3, 3, 31), np.float32)
    damaged.write_bytes(weights.read_bytes()[:-4096])
    for path in (other, damaged):
        with pytest.raises(WeightsError, match=path.name):
            provide_weights(str(path), "mobilenet_v2", bucket, "runs/run")
    assert loaded == ["mobilenet_v2"] * 2


@pytest.mark.slow
def test_the_network_takes_every_weight(encoder: keras.Model, weights: Path) -> None:
    config = config_of_recipe(parse_recipe({"model": "m", "dataset": "d"}, "test"))
    inside = encoder_of(build_unet(config))
    load_encoder_weights(inside, weights)
    assert [w.path for w in inside.weights] == [w.path for w in encoder.weights]
    assert all(np.array_equal(a, b) for a, b in zip(inside.get_weights(), encoder.get_weights(), strict=True))


def test_real_weights_have_useful_features(real_weights: Path) -> None:
    encoder = build_encoder("mobilenet_v2")
    encoder.load_weights(real_weights)
    rng = np.random.default_rng(0)
    features = encoder(rng.uniform(-1, 1, (2, 96, 96, 3)).astype(np.float32), training=False).numpy()
    assert np.isfinite(features).all()
    assert features.std() > 0.05


def test_the_licence_of_the_real_weights_is_known(real_weights: Path) -> None:
    assert KNOWN_WEIGHTS[sha256_of(real_weights)] == "mobilenet_v2"


def test_a_download_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").write_bytes(b"weights")
    told: list[str] = []
    with redirect_stdout(_Download(told.append)):
        keras.utils.get_file("here", (tmp_path / "there").as_uri(), cache_dir=tmp_path)
    assert told == [f"Downloading data from {(tmp_path / 'there').as_uri()}"]
    assert capsys.readouterr().out == ""


def quiet(*_: str) -> nullcontext[Advance]:
    return nullcontext(no_progress)


def test_a_start_in_the_bucket_stays_where_it_is(
    bucket: Bucket, model_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    published = publish(bucket, "m", model_files, origin())
    found = provide_start("m", bucket, "runs/r", quiet)
    assert found.uri == bucket.uri / version_prefix("m", 1)
    assert [item.key for item in bucket.objects("runs/")] == []
    known = start_origin(found)
    assert (known.version, known.sha256) == ("m@1", published.files["model.weights.h5"].sha256)
    assert fetch_start(found.uri, known, tmp_path / "worker").manifest == published
    with pytest.raises(IntegrityError, match=r"Expected m@1 \(sha256 0{12}\) at .*; found m@1 \("):
        fetch_start(found.uri, known.model_copy(update={"sha256": "0" * 64}), tmp_path / "worker")


def test_a_start_on_this_machine_is_copied_to_the_run(
    bucket: Bucket, model_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers have only the bucket; the folder may be gone when the run is resumed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    publish(bucket, "m", model_files, origin())
    folder = find_model("m", str(bucket.uri)).folder
    first, second = (provide_start(str(folder), bucket, "runs/r", quiet) for _ in range(2))
    assert first.uri == second.uri
    assert str(first.uri).startswith(f"{bucket.uri}/runs/r/start-")
    shutil.rmtree(folder)
    fetched = fetch_start(first.uri, start_origin(first), tmp_path / "worker")
    assert (fetched.folder / "model.weights.h5").read_bytes() == (model_files / "model.weights.h5").read_bytes()
