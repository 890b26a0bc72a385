"""A package for bioimage.io passes the project's own test, in an environment of its own, and predicts as ours does."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from nucleus.data.origins import DataSource
from nucleus.errors import ModelError
from nucleus.model.architecture import read_model_config
from nucleus.model.bioimageio import ModelFacts, write_package
from nucleus.model.engines import OnnxEngine
from nucleus.registry.versions import read_included

UV = (sys.executable, "-m", "uv")
# bioimageio.spec 0.5.12 fails with newer versions of pydantic, which this package uses.
PACKAGES = ("bioimageio.core==0.11.0", "pydantic==2.11.10", "onnxruntime==1.23.2")

DATA = [DataSource(name="stage1_train.zip", images=531, license="CC0-1.0", origin="DSB2018")]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the model that comes along."""
    path = tmp_path_factory.mktemp("zoo") / "nuclei.zip"
    folder = read_included().folder
    config = read_model_config((folder / "model.json").read_bytes(), "nuclei")
    write_package(folder, config, ModelFacts("nuclei", 1, "Apache-2.0", DATA), path)
    return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with bioimageio.core."""
    folder = tmp_path_factory.mktemp("zoo-environment")
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([*UV, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    subprocess.run([*UV, "pip", "install", "--quiet", "--python", python, *PACKAGES], check=True)
    return python.parent


def test_it_passes_the_test_of_the_model_zoo(package: Path, zoo: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [zoo / "bioimageio", "test", package], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Run onnx inference for inputs with batch_size: 2" in done.stdout + done.stderr


def test_its_output_is_that_of_the_network(package: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(package).extractall(tmp_path)
    description = json.loads((tmp_path / "rdf.yaml").read_text())
    stretch, scale, _ = description["inputs"][0]["preprocessing"]
    image = np.load(tmp_path / "image.npy")
    low, high = np.percentile(image, [stretch["kwargs"][f"{end}_percentile"] for end in ("min", "max")])
    normalized = np.clip((image - low) / (high - low) * scale["kwargs"]["gain"], 0, 255)
    included = read_included().folder
    config = read_model_config((included / "model.json").read_bytes(), "nuclei")
    ours = OnnxEngine(included / "model.onnx", config)(np.rint(normalized).astype(np.uint8))
    assert np.abs(np.load(tmp_path / "values.npy") - ours).mean() < 0.01  # ours rounds grey values
    assert "Apache-2.0" in (tmp_path / "rdf.yaml").read_text()


def test_it_has_the_licences_of_the_data(package: Path) -> None:
    with zipfile.ZipFile(package) as archive:
        readme, description = archive.read("README.md").decode(), json.loads(archive.read("rdf.yaml"))
    assert "- stage1_train.zip: 531 images. Licence: CC0-1.0. Source: DSB2018\n" in readme
    assert [DataSource(**each) for each in description["config"]["nucleus"]["data"]] == DATA


def test_what_is_missing_is_said(package: Path, tmp_path: Path) -> None:
    folder = read_included().folder
    config = read_model_config((folder / "model.json").read_bytes(), "nuclei")
    with pytest.raises(ModelError, match=r"card\.license"):
        write_package(folder, config, ModelFacts("nuclei", 1, ""), tmp_path / "a.zip")
    with pytest.raises(ModelError, match=r"model\.onnx"):
        write_package(package.parent, config, ModelFacts("nuclei", 1, "MIT"), tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()
