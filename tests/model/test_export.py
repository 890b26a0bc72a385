"""Exported models load without this package and give the same output."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import get_args

import keras
import numpy as np
import pytest

from nucleus.config.names import ExportFormat
from nucleus.config.recipe import NormalizationOptions
from nucleus.data.synthetic import generated_image
from nucleus.errors import ModelError, UsageError
from nucleus.model.architecture import InstanceSettings, ModelConfig
from nucleus.model.bioimageio import ModelFacts
from nucleus.model.engines import KerasEngine, OnnxEngine
from nucleus.model.export import export_model, write_half_weights, write_onnx
from nucleus.model.unet import build_unet, calibrate_encoder, load_weights

CONFIG = ModelConfig(
    encoder="mobilenet_v2",
    decoder_channels=[16, 8, 8, 8, 8],
    heads="both",
    normalization=NormalizationOptions(high=99.5),
    tile=64,
    overlap=16,
    instances=InstanceSettings(seed_threshold=0.6),
)
KINDS = [kind for kind in get_args(ExportFormat) if kind != "bioimageio"]  # which test_bioimageio.py tests
FACTS = ModelFacts("m", 3, "")
IMAGES = np.stack([generated_image(seed, 64, 96)[0] for seed in range(2)]).astype(np.float32)
NO_NUCLEUS = (
    "import sys\n"
    "class Refuse:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.split('.')[0] in ('nucleus', 'job'): raise ImportError(name)\n"
    "sys.meta_path.insert(0, Refuse())\n"
    "import numpy as np\n"
    "folder = sys.argv[1]\n"
    "images = np.load(f'{folder}/images.npy')\n"
)
WITH_TENSORFLOW = """
import keras
import tensorflow as tf
for kind in ('h5', 'keras'):
    np.save(f'{folder}/{kind}.npy', keras.models.load_model(f'{folder}/m.{kind}')(images).numpy())
served = tf.saved_model.load(f'{folder}/m.savedmodel').signatures['serving_default']
np.save(f'{folder}/savedmodel.npy', served(image=tf.constant(images))['logits'].numpy())
"""
WITH_ONNX_RUNTIME = """
import onnxruntime
assert not {'tensorflow', 'keras'} & set(sys.modules)
found, = onnxruntime.InferenceSession(f'{folder}/m.onnx').run(['logits'], {'image': images})
np.save(f'{folder}/onnx.npy', found)
"""
_ONNX_RUNTIME = ("onnxruntime", "numpy", "numpy.libs", "google", "flatbuffers", "packaging")


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A model's files, and its logits for `IMAGES`."""
    folder = tmp_path_factory.mktemp("model")
    keras.utils.set_random_seed(0)
    model = build_unet(CONFIG)
    calibrate_encoder(model, IMAGES.astype(np.uint8))
    model.save_weights(folder / "model.weights.h5")
    (folder / "model.json").write_text(CONFIG.model_dump_json())
    return folder, model(IMAGES, training=False).numpy()


@pytest.fixture(scope="module")
def exported(pulled: tuple[Path, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`m.<format>` in every format, and in `<format>.npy` what a Python that has no `nucleus` makes of `IMAGES`."""
    folder = tmp_path_factory.mktemp("exported")
    for kind in KINDS:
        export_model(pulled[0], kind, folder / f"m.{kind}", FACTS)
    np.save(folder / "images.npy", IMAGES)
    run_clean(NO_NUCLEUS + WITH_TENSORFLOW, None, folder)
    run_clean(NO_NUCLEUS + WITH_ONNX_RUNTIME, clean_environment(folder / "site"), folder)
    return folder


def test_a_place_that_is_taken_is_refused_before_tensorflow_is_imported(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").touch()
    code = (
        "import sys, nucleus\nfrom pathlib import Path\n"
        "try:\n    nucleus.model.check_export(Path(sys.argv[1]))\n"
        "except nucleus.errors.UsageError as error:\n    print(error)\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import nucleus.errors\n{code}", str(tmp_path / "m.onnx")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "m.onnx; it exists already" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_output_elsewhere(kind: ExportFormat, exported: Path, pulled: tuple[Path, np.ndarray]) -> None:
    _, expected = pulled
    assert expected.std() > 0.01
    assert np.load(exported / f"{kind}.npy") == pytest.approx(expected, abs=1e-4)
    found = json.loads((exported / f"m.{kind}.json").read_text())
    assert (found["model"], found["version"], found["format"]) == ("m", 3, kind)
    assert found["labels"]["seed_threshold"] == 0.6
    assert found["input"]["normalization"]["high"] == 99.5
    assert found["output"]["channels"] == ["background", "body", "border", "distance"]
    assert {path.name for path in exported.glob(f"*m.{kind}*")} == {f"m.{kind}", f"m.{kind}.json"}


def clean_environment(folder: Path) -> Path:
    """ONNX Runtime and what it needs, nothing else."""
    folder.mkdir()
    installed = Path(sysconfig.get_path("purelib"))
    for name in _ONNX_RUNTIME:
        (folder / name).symlink_to(installed / name)
    return folder


def run_clean(code: str, path: Path | None, folder: Path) -> None:
    """Run code in a Python of its own on a folder; with a path, nothing but the standard library and what is there."""
    options = ["-I", "-S"] if path else ["-I"]
    start = f"import sys; sys.path.append({str(path)!r})\n" if path else ""
    command = [sys.executable, *options, "-c", start + code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_overwritten(pulled: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "m.h5").write_text("mine")
    with pytest.raises(UsageError, match=r"m\.h5"):
        export_model(pulled[0], "h5", tmp_path / "m.h5", FACTS)
    assert (tmp_path / "m.h5").read_text() == "mine"
    (tmp_path / "n.h5.json").write_text("mine")
    with pytest.raises(UsageError, match=r"n\.h5\.json"):
        export_model(pulled[0], "h5", tmp_path / "n.h5", FACTS)
    assert not (tmp_path / "n.h5").exists()


@pytest.mark.slow
def test_half_precision_is_the_same_for_both_engines(tmp_path: Path) -> None:
    """The kernels are rounded, in files of half the size, and both engines compute with them as without."""
    config = CONFIG.model_copy(update={"encoder": "plain"})  # larger ones take seconds to convert
    model, before = build_unet(config), build_unet(config)
    calibrate_encoder(before, IMAGES.astype(np.uint8))
    whole_weights, weights = tmp_path / "whole.weights.h5", tmp_path / "half.weights.h5"
    before.save_weights(whole_weights)
    write_half_weights(whole_weights, weights)
    load_weights(model, weights)
    for given, halved in zip(before.variables, model.variables, strict=True):
        rounded = given.numpy().astype(np.float16) if len(given.shape) > 1 else given.numpy()
        assert np.array_equal(halved.numpy(), rounded), given.path
        assert halved.dtype == "float32"
    for name, half in (("half.onnx", True), ("whole.onnx", False)):
        write_onnx(model, config.heads, tmp_path / name, half=half)
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * (tmp_path / "whole.onnx").stat().st_size
    assert weights.stat().st_size < 0.6 * whole_weights.stat().st_size
    tiles = IMAGES.astype(np.uint8)
    halves, whole = (OnnxEngine(tmp_path / name, config)(tiles) for name in ("half.onnx", "whole.onnx"))
    assert halves == pytest.approx(whole, abs=1e-6)
    assert halves == pytest.approx(KerasEngine(model, config.heads)(tiles), abs=1e-4)


def test_weights_beyond_half_precision_are_refused(pulled: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    model = build_unet(CONFIG)
    load_weights(model, pulled[0] / "model.weights.h5")
    kernel = next(variable for variable in model.variables if len(variable.shape) > 1)
    kernel.assign(kernel.numpy() + 1e5)
    model.save_weights(tmp_path / "large.weights.h5")
    with pytest.raises(ModelError, match=r"larger ones in layers/"):
        write_half_weights(tmp_path / "large.weights.h5", tmp_path / "half.weights.h5")
