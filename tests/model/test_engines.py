"""ONNX Runtime computes what TensorFlow computes, without TensorFlow; and it reads nothing but the network."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nucleus.config.names import EngineChoice
from nucleus.config.recipe import Heads, NormalizationOptions
from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image
from nucleus.errors import ModelError
from nucleus.model import engines
from nucleus.model.architecture import ModelConfig
from nucleus.model.engines import KerasEngine, OnnxEngine, decide_engine, thread_count
from nucleus.model.export import write_onnx
from nucleus.model.unet import build_unet, calibrate_encoder
from nucleus.predict.model import PredictionOptions, load_model_folder
from nucleus.registry.manifest import MANIFEST_FORMAT, ModelManifest, StoredFile
from nucleus.storage.files import sha256_of
from tests.small_model import origin

IMAGE = generated_image(7, 150, 170)[0]
TILES = np.stack([generated_image(seed, 64, 96)[0] for seed in range(3)])
PUBLISHED = ("model.json", "model.weights.h5", "model.onnx")
WITHOUT_TENSORFLOW = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('tensorflow', 'keras', 'tf2onnx', 'onnx', 'ray'): raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from pathlib import Path
from nucleus.predict.model import load_model_folder
from nucleus.predict.image_files import predict_files
folder = Path(sys.argv[1])
model = load_model_folder(folder)
np.save(folder.parent / 'labels.npy', model.segment(folder.parent / 'image.png').labels)
predict_files(model, [folder.parent / 'image.png'], folder.parent / 'out')
"""


def config_of(heads: Heads) -> ModelConfig:
    return ModelConfig(
        encoder="plain",
        decoder_channels=[8] * 5,
        heads=heads,
        normalization=NormalizationOptions(),
        tile=96,
        overlap=16,
    )


def network(heads: Heads) -> keras.Model:
    """A random network with a bias in each layer, whose values are not all undecided."""
    keras.utils.set_random_seed(3)
    model = build_unet(config_of(heads))
    calibrate_encoder(model, TILES)
    for layer in model.layers:
        if getattr(layer, "bias", None) is not None:
            layer.bias.assign(keras.random.normal(layer.bias.shape, stddev=0.2, seed=5))
    return model


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pulled model with `model.onnx`."""
    folder = tmp_path_factory.mktemp("engines") / "model"
    folder.mkdir()
    model = network("both")
    model.save_weights(folder / "model.weights.h5")
    (folder / "model.json").write_text(config_of("both").model_dump_json())
    write_onnx(model, "both", folder / "model.onnx")
    write_manifest(folder, PUBLISHED)
    return folder


def write_manifest(folder: Path, names: tuple[str, ...]) -> None:
    files = {name: StoredFile(size=(folder / name).stat().st_size, sha256=sha256_of(folder / name)) for name in names}
    manifest = ModelManifest(
        format=MANIFEST_FORMAT,
        model="m",
        version=1,
        created=datetime.now(UTC).isoformat(),
        files=files,
        origin=origin(),
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())


def copied(pulled: Path, folder: Path, content: bytes | None, names: tuple[str, ...] = PUBLISHED) -> Path:
    """A pulled model with another `model.onnx`, whose sum is right."""
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes((pulled / name).read_bytes())
    if content is not None:
        (folder / "model.onnx").write_bytes(content)
    write_manifest(folder, names)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["border", "distance"])
def test_values_are_tensorflows(heads: Heads, tmp_path: Path) -> None:
    model = network(heads)
    write_onnx(model, heads, tmp_path / "model.onnx")
    engine, expected = OnnxEngine(tmp_path / "model.onnx", config_of(heads)), KerasEngine(model, heads)
    for tiles in (TILES, TILES[:1, :32, :32]):
        values = engine(tiles)
        assert values.dtype == np.float32
        assert values == pytest.approx(expected(tiles), abs=1e-4)
    assert values.std() > 0.01


def test_constants_of_the_network_are_no_inputs(tmp_path: Path) -> None:
    """As EfficientNet's statistics of its input, which are not variables."""
    image = keras.Input((None, None, 3), name="image")
    scaled = keras.layers.Normalization(mean=[120.0, 110.0, 90.0], variance=[900.0, 800.0, 700.0])(image)
    model = keras.Model(image, keras.layers.Conv2D(2, 1)(scaled))
    write_onnx(model, "distance", tmp_path / "model.onnx")
    engine, expected = OnnxEngine(tmp_path / "model.onnx", config_of("distance")), KerasEngine(model, "distance")
    assert engine(TILES) == pytest.approx(expected(TILES), abs=1e-5)


def test_the_decoder_keeps_the_fast_layout(pulled: Path) -> None:
    """Sizes that are computed at run time would cost a third of the time."""
    nodes = onnx.load(pulled / "model.onnx").graph.node
    assert {tuple(node.input[1:]) for node in nodes if node.op_type == "Resize"} == {("", "upscale")}
    assert not {"Shape", "Softmax"} & {node.op_type for node in nodes}
    assert sum(node.op_type == "Transpose" for node in nodes) <= 3  # of the image and of the two outputs


def test_prediction_imports_no_tensorflow(pulled: Path) -> None:
    (pulled.parent / "image.png").write_bytes(encode_png(IMAGE))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, str(pulled)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    labels = np.load(pulled.parent / "labels.npy")
    by_tensorflow = load_model_folder(pulled, PredictionOptions(engine="tensorflow")).segment(IMAGE).labels
    assert np.mean((labels > 0) != (by_tensorflow > 0)) < 1e-3
    assert (pulled.parent / "out" / "nuclei.csv").is_file()


def test_a_version_without_the_file_predicts_with_tensorflow(pulled: Path, tmp_path: Path) -> None:
    old = copied(pulled, tmp_path / "old", None, PUBLISHED[:2])
    (old / "model.onnx").write_bytes(b"of nobody")  # not in the manifest: not used
    expected = load_model_folder(pulled, PredictionOptions(engine="tensorflow")).segment(IMAGE).labels
    assert np.array_equal(load_model_folder(old).segment(IMAGE).labels, expected)
    with pytest.raises(ModelError, match=r"with model\.onnx for --engine onnx"):
        load_model_folder(old, PredictionOptions(engine="onnx"))


@pytest.mark.parametrize(
    ("installed", "device", "seen", "hidden", "choice", "has_onnx", "expected"),
    [
        (True, None, 0, None, "auto", True, "onnx"),
        (True, "nvidia0", 1, None, "auto", True, "tensorflow"),
        (True, "dxg", 1, None, "auto", True, "tensorflow"),
        (True, "nvidia0", 0, None, "auto", True, "onnx"),
        (True, "nvidia0", 1, "", "auto", True, "onnx"),
        (True, "nvidiactl", 1, None, "auto", True, "onnx"),
        (False, "nvidia0", 1, None, "auto", True, "onnx"),
        (True, None, 0, None, "auto", False, "tensorflow"),
        (True, None, 0, None, "tensorflow", True, "tensorflow"),
        (True, "nvidia0", 1, None, "onnx", True, "onnx"),
        (False, None, 0, None, "auto", False, None),
        (False, None, 0, None, "tensorflow", True, None),
        (True, None, 0, None, "onnx", False, None),
    ],
)
def test_the_choice(
    installed: bool, device: str | None, seen: int, hidden: str | None, choice: EngineChoice, has_onnx: bool,
    expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if device:
        (tmp_path / device).touch()
    monkeypatch.setattr(engines, "_DEVICES", tmp_path)
    monkeypatch.setattr(engines, "missing_packages", lambda names: [] if installed else names)
    config = import_module("tensorflow").config
    monkeypatch.setattr(config, "get_visible_devices", lambda _: ["GPU"] * seen)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    if expected is None:
        with pytest.raises(ModelError, match=r"nucleus\[train\]|model\.onnx"):
            decide_engine(choice, has_onnx=has_onnx)
    else:
        assert decide_engine(choice, has_onnx=has_onnx).engine == expected


def test_threads(pulled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    assert thread_count() == 3
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")
    assert thread_count() == 1
    engine = OnnxEngine(pulled / "model.onnx", config_of("both"))
    assert engine._session.get_session_options().intra_op_num_threads == 1
    assert str(decide_engine("onnx")).endswith("on 1 thread, because --engine onnx chose it")


def test_batches_and_threads_do_not_change_a_value(pulled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To within rounding; on the CPUs tried to the bit, for each value is the same sum in the same order."""
    found = []
    for threads in ("1", "2"):
        monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", threads)
        engine = OnnxEngine(pulled / "model.onnx", config_of("both"))
        found += [engine(TILES), np.concatenate([engine(tile[np.newaxis]) for tile in TILES])]
    for values in found[1:]:
        assert values == pytest.approx(found[0], abs=1e-5)


def with_weights_elsewhere(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def with_an_unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.example"
    model.opset_import.add(domain="com.example", version=1)


def with_a_function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f", domain="com.example")


def with_a_graph_inside(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.add(name="body", type=onnx.AttributeProto.GRAPH).g.name = "inner"


def with_other_weights_inside(model: onnx.ModelProto) -> None:
    tensor = model.graph.node[0].attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
    tensor.external_data.add(key="location", value="/etc/passwd")


def of_another_network(model: onnx.ModelProto) -> None:
    del model.graph.output[-1]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (with_weights_elsewhere, "weights in another file"),
        (with_other_weights_inside, "weights in another file"),
        (with_an_unknown_operator, "an operator that is not ONNX's own"),
        (with_a_function, "functions"),
        (with_a_graph_inside, "a graph in an operator"),
        (of_another_network, "found one from"),
    ],
)
def test_foreign_networks_are_refused(
    change: Callable[[onnx.ModelProto], None], found: str, pulled: Path, tmp_path: Path
) -> None:
    model = onnx.load(pulled / "model.onnx")
    change(model)
    (tmp_path / "weights.bin").write_bytes(bytes(1 << 20))
    folder = copied(pulled, tmp_path / "model", model.SerializeToString())
    with pytest.raises(ModelError, match=found):
        load_model_folder(folder, PredictionOptions(engine="onnx"))


@pytest.mark.parametrize("content", [b"", b"no ONNX", b"\x08", b"\x3a\xff\xff\xff\xff\x0f", bytes(100)])
def test_damaged_networks_are_refused(content: bytes, pulled: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.onnx"):
        load_model_folder(copied(pulled, tmp_path / "model", content), PredictionOptions(engine="onnx"))


@settings(max_examples=15)
@given(st.data())
def test_any_damage_ends_in_our_error_or_in_values(pulled: Path, data: st.DataObject) -> None:
    content = (pulled / "model.onnx").read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(st.binary(min_size=1, max_size=16))
    path = pulled.parent / "damaged.onnx"
    path.write_bytes(content[:start] + (new + content[start + len(new) :] if data.draw(st.booleans()) else b""))
    try:
        engine = OnnxEngine(path, config_of("both"))
    except ModelError:
        return
    assert engine._session is not None


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu.max": "nonsense\n"}, 16),
        ({}, 16),
    ],
)
def test_threads_keep_to_the_limit_of_the_container(
    files: dict[str, str], threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(engines, "_CGROUP", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert thread_count() == threads
