"""`docs/notebook.ipynb` runs and gives what it says; the outputs kept in the repository are those of a whole run.

To run it anew and keep its outputs: `python -m tests.docs.test_notebook`.
"""

import json
import os
import re
import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import keras
import nbformat
import numpy as np
import psutil
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"
MOST_BYTES = 1 << 20
CELL_SECONDS = 1800
PNG = b"\x89PNG\r\n\x1a\n"
# Cells that the tests add: they write the values of the notebook's variables to files.
FIRST = """
Path("begun.json").write_text(json.dumps([sys.executable, str(folder), store["pid"]]))
"""
LAST = """
command("models", "pull", "notebook@latest", folder / "pulled")
network, config = nucleus.model.load_model(folder / "pulled")
test_image = nucleus.data.normalize(read(shown[0])[0], config.normalization)[:64, :64]
expected = np.asarray(network(test_image[np.newaxis].astype("float32"), training=False))
Path("found.json").write_text(json.dumps({
    "epochs": [metrics["epoch"] for metrics in history],
    "thresholds": config.instances == model.config.instances,
    "published": [version.model, version.version, version.origin.metrics["test"]["all"]["map"]],
    "scores": scores["all"],
    "images": list(scores.table["map"]),
    "rows": [len(found.table) for found in predictions],
    "perfect_mask": [pixels.iou, nuclei.mean_ap],
    "same_mask": float((mask & ours).sum() / (mask | ours).sum()),
}))
labels = {f"labels_{number}": found.labels for number, found in enumerate(predictions)}
truth = {f"truth_{number}": read(path)[1] for number, path in enumerate(shown)}
np.savez("found.npz", image=test_image, logits=expected, **labels, **truth)
"""


@pytest.fixture(scope="module")
def jupyter_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Jupyter and IPython keep and find their files in an empty folder; the notebook is told of no images."""
    home = tmp_path_factory.mktemp("jupyter")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(home / name.lower()))
        for name in ("DSB2018", "WEIGHTS", "TF_CONFIG", "MPLBACKEND"):
            patch.delenv(name, raising=False)
        yield home


@pytest.fixture(scope="module")
def left(jupyter_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    """The folder in which a clean copy of the notebook was run, with its outputs in `run.ipynb`."""
    here = tmp_path_factory.mktemp("notebook")
    notebook = without_outputs(nbformat.read(NOTEBOOK, as_version=4))
    after(notebook, "setup", FIRST)
    before(notebook, "stop", LAST)
    run_notebook(notebook, here)
    nbformat.write(notebook, here / "run.ipynb")
    return here


@pytest.fixture(scope="module")
def found(left: Path) -> dict[str, Any]:
    """What was in the notebook's variables at its end."""
    told: dict[str, Any] = json.loads((left / "found.json").read_text())
    return told


def run_notebook(notebook: NotebookNode, folder: Path) -> None:
    """Run every cell in `folder`, by the interpreter that runs this; the outputs come into the notebook."""
    # Installed kernels may be another environment's. Without their folders ipykernel's own is left: this interpreter.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    kernel.shutdown_wait_time = CELL_SECONDS  # a busy machine needs more than five seconds to stop what it has started
    client = NotebookClient(
        notebook, km=kernel, timeout=CELL_SECONDS, resources={"metadata": {"path": str(folder)}}, record_timing=False
    )
    client.execute(cleanup_kc=True)


def without_outputs(notebook: NotebookNode) -> NotebookNode:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def after(notebook: NotebookNode, name: str, code: str) -> None:
    """Add a cell after the one of that name."""
    notebook.cells.insert(place_of(notebook, name) + 1, new_code_cell(code))


def before(notebook: NotebookNode, name: str, code: str) -> None:
    """Add a cell before the one of that name."""
    notebook.cells.insert(place_of(notebook, name), new_code_cell(code))


def place_of(notebook: NotebookNode, name: str) -> int:
    (place,) = (number for number, cell in enumerate(notebook.cells) if cell.id == name)
    return place


def code_cells(path: Path) -> list[NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def pictures(cells: list[NotebookNode]) -> list[bytes]:
    shown = [output.get("data", {}).get("image/png") for cell in cells for output in cell.outputs]
    return [b64decode(picture) for picture in shown if picture]


def test_it_runs_by_this_interpreter_and_leaves_nothing_running(left: Path) -> None:
    interpreter, folder, pid = json.loads((left / "begun.json").read_text())
    assert Path(interpreter) == Path(sys.executable)
    assert not Path(folder).exists()
    assert not psutil.pid_exists(pid)


def test_every_cell_shows_what_it_should(left: Path) -> None:
    cells = code_cells(left / "run.ipynb")
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert len(pictures(cells)) == len(pictures(code_cells(NOTEBOOK)))
    assert all(picture.startswith(PNG) for picture in pictures(cells))


def test_the_model_has_learnt_and_is_published(found: dict[str, Any]) -> None:
    scores = found["scores"]
    assert found["epochs"] == list(range(1, len(found["epochs"]) + 1))
    assert 0.4 < scores["map"] < scores["ap_50"] < 1
    assert 0.8 < scores["iou"] < scores["dice"] < scores["accuracy"] < 1
    assert found["published"] == ["notebook", 1, pytest.approx(scores["map"], abs=1e-6)]
    assert found["thresholds"]
    assert len(found["images"]) == scores["images"]
    assert scores["map"] == pytest.approx(sum(found["images"]) / len(found["images"]), abs=1e-6)
    assert min(found["images"]) < scores["map"]


def test_a_perfect_mask_is_no_perfect_prediction(found: dict[str, Any]) -> None:
    iou, mean_ap = found["perfect_mask"]
    assert iou == 1
    assert mean_ap < 0.8


def test_the_predictions_fit(left: Path, found: dict[str, Any]) -> None:
    with np.load(left / "found.npz") as stored:
        numbers = range(sum(name.startswith("labels_") for name in stored.files))
        assert list(numbers) == [0, 1, 2]  # one of each kind
        for number in numbers:
            labels, truth = stored[f"labels_{number}"], stored[f"truth_{number}"]
            assert labels.shape == truth.shape
            assert set(np.unique(labels)) == set(range(labels.max() + 1))
            assert labels.max() == pytest.approx(truth.max(), rel=0.5)
            assert found["rows"][number] == labels.max()


def test_model_h5_is_the_model(left: Path, found: dict[str, Any]) -> None:
    with np.load(left / "found.npz") as stored:
        image, expected = stored["image"], stored["logits"]
    model = keras.models.load_model(left / "notebook-results" / "model.h5", compile=False)
    logits = model(image[np.newaxis].astype(np.float32)).numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert 0.8 < found["same_mask"] <= 1
    about = json.loads((left / "notebook-results" / "model.h5.json").read_text())
    assert (about["model"], about["version"]) == ("notebook", 1)


def test_a_cell_that_raises_ends_it_and_its_server(jupyter_home: Path, tmp_path: Path) -> None:  # noqa: ARG001
    notebook = without_outputs(nbformat.read(NOTEBOOK, as_version=4))
    after(notebook, "setup", FIRST + "raise ValueError('as a cell may')")
    with pytest.raises(CellExecutionError, match="as a cell may"):
        run_notebook(notebook, tmp_path)
    _, folder, pid = json.loads((tmp_path / "begun.json").read_text())
    assert not psutil.pid_exists(pid)
    assert not Path(folder).exists()


def rerun() -> None:
    """Run the notebook and keep its outputs, without what depends on this machine."""
    notebook = without_outputs(nbformat.read(NOTEBOOK, as_version=4))
    with TemporaryDirectory() as folder:
        run_notebook(notebook, Path(folder))
    for cell in notebook.cells:
        cell.metadata = {}
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, NOTEBOOK)


def test_what_is_committed_is_a_whole_run() -> None:
    cells = code_cells(NOTEBOOK)
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(pictures(cells)) >= 5
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type in {"stream", "display_data"}
            assert output.get("name") != "stderr", output.text


def test_what_is_committed_names_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata["language_info"] == {"name": "python"}
    for cell in notebook.cells:
        assert cell.metadata == {}, cell.id
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)  # base64 may spell anything
    text = nbformat.writes(notebook)
    assert not re.search(r"(?<![\w.<$])/(home|root|tmp|usr|var|work|Users|opt|mnt)/", text)
    assert not re.search(r"https?://|\d+\.\d+\.\d+\.\d+", text)
    assert os.uname().nodename not in text


if __name__ == "__main__":
    rerun()
