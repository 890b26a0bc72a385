"""Cells are the labels that scikit-image grows, whatever the tiles, and are the same in every format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
import zarr
from numpy.typing import NDArray
from shapely.geometry import shape
from skimage.segmentation import expand_labels as reference

from nucleus.data.images import encode_png
from nucleus.errors import UsageError
from nucleus.predict import cells
from nucleus.predict.cells import Expansion, expand_labels, parse_expansion
from nucleus.predict.formats import check_formats
from nucleus.predict.image_files import predict_files
from nucleus.predict.model import PredictionOptions
from tests.predict.test_predict import rows_of, small_model, spots

SHAPE = (130, 170)


@pytest.mark.parametrize("distance", [1, 1.5, 4, 9.2])
def test_labels_grow_as_those_of_scikit_image_in_any_tiles(monkeypatch: pytest.MonkeyPatch, distance: float) -> None:
    monkeypatch.setattr(cells, "_TILE", 13)
    random = np.random.default_rng(3)
    for density in (0.001, 0.02, 0.3):
        labels = np.where(random.random((70, 53)) < density, random.integers(1, 99, (70, 53)), 0).astype(np.int32)
        assert (expand_labels(labels, distance) == reference(labels, distance)).all()
    assert not expand_labels(np.zeros((20, 30), np.int32), distance).any()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results for an image with cells of 6 px, in blocks of 64 px and tiles of 50 px; a pixel has half a um."""
    folder = tmp_path_factory.mktemp("cells")
    (folder / "a.png").write_bytes(encode_png(spots(*SHAPE, 7, count=40)))
    model = small_model(PredictionOptions(block_side=64, pixel_size=0.5))
    formats = check_formats(("labels", "zarr", "geojson", "roi", "csv"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "_TILE", 50)
        predict_files(model, [folder / "a.png"], folder / "out", formats=formats, expansion=Expansion(3, "um"))
    return folder / "out"


@pytest.fixture(scope="module")
def grown(results: Path) -> NDArray[np.int32]:
    """The cells, by scikit-image."""
    labels = tifffile.imread(results / "a.labels.tif").astype(np.int32)
    assert labels.max() > 10
    return np.asarray(reference(labels, 6))


def filled(geometries: dict[int, Any]) -> NDArray[np.int32]:
    found = np.zeros(SHAPE, np.int32)
    rows, columns = np.indices(SHAPE) + 0.5
    for label, geometry in geometries.items():
        polygon = shape(geometry)
        assert polygon.is_valid
        found[shapely.contains_xy(polygon, columns, rows)] = label
    return found


def test_cells_are_the_nuclei_with_their_surroundings(results: Path, grown: NDArray[np.int32]) -> None:
    assert (tifffile.imread(results / "a.cells.tif") == grown).all()
    assert (zarr.open_group(results / "a.cells.zarr", mode="r")["0"][:] == grown).all()
    areas = np.bincount(grown.ravel())
    rows = rows_of(results / "nuclei.csv")
    assert len(rows) == grown.max()
    for row in rows:
        area = areas[int(row["label"])]
        assert (int(row["cell_area"]), float(row["cell_area_um2"])) == (area, area / 4)
        assert int(row["area"]) <= area


def test_qupath_gets_cells_with_a_nucleus_each(results: Path, grown: NDArray[np.int32]) -> None:
    features = json.loads((results / "a.geojson").read_text())["features"]
    assert {feature["properties"]["objectType"] for feature in features} == {"cell"}
    named = {int(feature["properties"]["name"]): feature for feature in features}
    assert (filled({name: feature["geometry"] for name, feature in named.items()}) == grown).all()
    nuclei = filled({name: feature["nucleusGeometry"] for name, feature in named.items()})
    assert (nuclei == tifffile.imread(results / "a.labels.tif")).all()
    areas = np.bincount(grown.ravel())
    assert all(named[name]["properties"]["measurements"]["cell_area"] == areas[name] for name in named)


def test_results_without_cells_replace_those_with(results: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(spots(60, 70, 7, count=8)))
    predict_files(small_model(), [tmp_path / "a.png"], tmp_path / "out", expansion=Expansion(4))
    assert (tmp_path / "out" / "a.cells.tif").exists()
    predict_files(small_model(), [tmp_path / "a.png"], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("a.labels.tif", "a.overlay.png", "nuclei.csv", "images.csv")
    }
    assert "cell_area" not in rows_of(tmp_path / "out" / "nuclei.csv")[0]
    assert "cell_area" in rows_of(results / "nuclei.csv")[0]


def test_distances_that_mean_nothing_have_errors(tmp_path: Path) -> None:
    assert parse_expansion("5 um") == parse_expansion("5µm") == Expansion(5, "um")
    assert parse_expansion("2.5") == parse_expansion("2.5px") == Expansion(2.5, "px")
    for text in ("0", "-3", "5mm", "", "um", "1e3", "inf", "99999999"):
        with pytest.raises(UsageError, match="such as 5um or 8px"):
            parse_expansion(text)
    (tmp_path / "a.png").write_bytes(encode_png(spots(60, 70, 7, count=8)))
    found = predict_files(small_model(), [tmp_path / "a.png"], tmp_path / "out", expansion=Expansion(5, "um"))
    assert "--pixel-size" in found.failures["a.png"]
    found = predict_files(small_model(), [tmp_path / "a.png"], tmp_path / "out", expansion=Expansion(501))
    assert "at most 500 px" in found.failures["a.png"]
