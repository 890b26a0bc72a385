"""Exported models load without this package and give the same output."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import keras
import numpy as np
import pytest

from nucleus.config.recipe import NormalizationOptions
from nucleus.data.generated import generated_image
from nucleus.errors import UsageError
from nucleus.model.architecture import InstanceSettings, ModelConfig
from nucleus.model.export import EXPORT_FORMATS, ExportFormat, export_model
from nucleus.model.unet import build_unet, calibrate_encoder

CONFIG = ModelConfig(
    encoder="mobilenet_v2",
    decoder_channels=[16, 8, 8, 8, 8],
    heads="both",
    normalization=NormalizationOptions(high=99.5),
    tile=64,
    overlap=16,
    instances=InstanceSettings(seed_threshold=0.6),
)
IMAGES = np.stack([generated_image(seed, 64, 96)[0] for seed in range(2)]).astype(np.float32)
NO_NUCLEUS = (
    "import sys\n"
    "class Refuse:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.split('.')[0] in ('nucleus', 'job'): raise ImportError(name)\n"
    "sys.meta_path.insert(0, Refuse())\n"
    "import numpy as np\n"
    "images = np.load(sys.argv[2])\n"
)
LOADERS: dict[ExportFormat, str] = {
    "h5": "import keras; found = keras.models.load_model(sys.argv[1])(images).numpy()",
    "keras": "import keras; found = keras.models.load_model(sys.argv[1])(images).numpy()",
    "savedmodel": (
        "import tensorflow as tf\n"
        "served = tf.saved_model.load(sys.argv[1]).signatures['serving_default']\n"
        "found = served(image=tf.constant(images))['logits'].numpy()"
    ),
    "onnx": (
        "import onnxruntime\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        "found, = session.run(['logits'], {'image': images})"
    ),
}
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


@pytest.mark.parametrize("kind", EXPORT_FORMATS)
def test_the_same_output_elsewhere(kind: ExportFormat, pulled: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, expected = pulled
    assert expected.std() > 0.01
    dest = tmp_path / "out" / f"m.{kind}"
    usage = export_model(folder, kind, dest, {"model": "m", "version": 3})
    found = json.loads(usage.read_text())
    assert (found["model"], found["version"], found["format"]) == ("m", 3, kind)
    assert found["labels"]["seed_threshold"] == 0.6
    assert found["input"]["normalization"]["high"] == 99.5
    assert found["output"]["channels"] == ["background", "body", "border", "distance"]
    assert sorted(path.name for path in dest.parent.iterdir()) == [dest.name, usage.name]
    np.save(tmp_path / "images.npy", IMAGES)
    code = f"{NO_NUCLEUS}{LOADERS[kind]}\nnp.save(sys.argv[3], found)"
    path = clean_environment(tmp_path / "site") if kind == "onnx" else None
    run_clean(code, path, dest, tmp_path / "images.npy", tmp_path / "found.npy")
    assert np.load(tmp_path / "found.npy") == pytest.approx(expected, abs=1e-4)


def clean_environment(folder: Path) -> Path:
    """ONNX Runtime and what it needs, nothing else."""
    folder.mkdir()
    installed = Path(sysconfig.get_path("purelib"))
    for name in _ONNX_RUNTIME:
        (folder / name).symlink_to(installed / name)
    return folder


def run_clean(code: str, path: Path | None, *arguments: Path) -> None:
    """Run code in a Python of its own; with a path, nothing but the standard library and what is there."""
    options = ["-I", "-S"] if path else ["-I"]
    start = f"import sys; sys.path.append({str(path)!r})\n" if path else ""
    command = [sys.executable, *options, "-c", start + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_overwritten(pulled: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "m.h5").write_text("mine")
    with pytest.raises(UsageError, match="something is there"):
        export_model(pulled[0], "h5", tmp_path / "m.h5", {})
    assert (tmp_path / "m.h5").read_text() == "mine"
    (tmp_path / "n.h5.json").write_text("mine")
    with pytest.raises(UsageError, match=r"n\.h5\.json"):
        export_model(pulled[0], "h5", tmp_path / "n.h5", {})
    assert not (tmp_path / "n.h5").exists()
