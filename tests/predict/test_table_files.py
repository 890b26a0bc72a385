"""Tables in every format hold the same rows; AnnData is written and read by anndata, in an environment of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile

from nucleus.data.images import encode_png
from nucleus.errors import MissingPackageError
from nucleus.predict.formats import check_formats
from nucleus.predict.image_files import check_outputs, find_inputs, predict_files
from nucleus.predict.measurement import image_columns, nucleus_columns, table_schema
from nucleus.predict.model import PredictionOptions
from nucleus.predict.table_files import csv_of_parquet, csv_table, finish_tables
from tests.predict.test_predict import small_model, spots
from tests.zarr_files import write_image, write_plate

UV = (sys.executable, "-m", "uv")
PACKAGES = (
    *("anndata==0.12.19", "array-api-compat", "h5py", "legacy-api-wrap", "natsort", "scverse-misc", "session-info2"),
)
"""Others that it needs are those of this environment."""


@pytest.fixture(scope="module")
def plate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of a plate and of an image with a comma in its name and without a pixel size, as CSV and Parquet."""
    folder = tmp_path_factory.mktemp("tables")
    field = write_plate(folder / "in" / "p.zarr", wells=("B/3",), fields=1) / "B/3/0"
    shutil.rmtree(field)
    pixels = np.stack([spots(60, 70, seed, count=8) for seed in (7, 8)])
    write_image(field, pixels, axes="cyx", labels=("DAPI", "GFP"), x={"unit": None}, y={"unit": None})
    (folder / "in" / 'a, "b".png').write_bytes(encode_png(spots(60, 70, 7, count=8)))
    found = find_inputs([folder / "in"])
    predict_files(small_model(), found.images, folder / "out", 0, formats=check_formats(("csv", "parquet")))
    return folder / "out"


@pytest.mark.parametrize("name", ["nuclei", "images"])
def test_parquet_holds_what_csv_does(plate: Path, name: str, tmp_path: Path) -> None:
    stored = pq.read_table(plate / f"{name}.parquet")
    columns = {"nuclei": nucleus_columns(2, plate=True), "images": image_columns(plate=True)}[name]
    assert stored.schema.equals(table_schema(columns))
    texts = dict.fromkeys(("column", "field"), "str")
    text = pd.read_csv(plate / f"{name}.csv", keep_default_na=False, na_values=[""], dtype=texts)
    assert len(text) == stored.num_rows > 0
    pd.testing.assert_frame_equal(stored.to_pandas(), text, check_dtype=False)
    csv_of_parquet(plate / f"{name}.parquet", tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (plate / f"{name}.csv").read_bytes()
    if name == "images":
        assert dict(zip(stored["image"].to_pylist(), stored["channels"].to_pylist(), strict=True)) == {
            'a, "b".png': None,
            "p.zarr/B/3/0": "DAPI; GFP",
        }


def test_tables_that_were_not_asked_for_are_those_of_no_prediction(tmp_path: Path) -> None:
    def tables() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    def predicted(*formats: str) -> set[str]:
        for name, columns in (("nuclei.csv", nucleus_columns(1)), ("images.csv", image_columns())):
            with csv_table(tmp_path / name, columns):
                pass
        finish_tables(tmp_path, check_formats(formats))
        return tables()

    assert predicted("labels") == {"nuclei.csv", "images.csv"}
    assert predicted("parquet") == {"nuclei.parquet", "images.parquet"}
    assert pq.read_table(tmp_path / "nuclei.parquet").num_rows == 0
    with pytest.raises(ValueError, match=r"nuclei\.parquet"):
        check_outputs([], tmp_path)
    assert predicted("csv", "parquet") == {"nuclei.csv", "images.csv", "nuclei.parquet", "images.parquet"}
    assert predicted("csv") == {"nuclei.csv", "images.csv"}


def test_anndata_has_to_be_installed_by_itself() -> None:
    with pytest.raises(MissingPackageError, match="pip install anndata"):
        check_formats(("labels", "h5ad"))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with anndata."""
    folder = tmp_path_factory.mktemp("anndata")
    command = [*UV, "pip", "install", "--quiet", "--no-deps", "--target", folder, "--python", sys.executable, *PACKAGES]
    subprocess.run(command, check=True)
    return folder


WRITE = """
import sys
sys.path.append(sys.argv[1])
from pathlib import Path
from nucleus.predict.table_files import write_anndata
write_anndata(*map(Path, sys.argv[2:5]))
import anndata, numpy as np
found = anndata.read_h5ad(sys.argv[4])
print(found.uns["spatial_unit"], *found.var["channel"])
area = np.asarray(found[:, "area"].X)[:, 0]
found.obs.assign(x=found.obsm["spatial"][:, 0], area=area).to_csv(sys.argv[5], index=False)
"""


def test_anndata_holds_measurements_and_places(plate: Path, packages: Path, tmp_path: Path) -> None:
    def written(tables: Path) -> tuple[list[str], pd.DataFrame]:
        paths = [packages, tables / "nuclei.csv", tables / "images.csv", tmp_path / "a.h5ad", tmp_path / "obs.csv"]
        command = [sys.executable, "-c", WRITE, *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip("\n").split(" "), pd.read_csv(tmp_path / "obs.csv")

    (unit, *channels), found = written(plate)
    assert (unit, set(channels)) == ("px", {""})
    table = pd.read_csv(plate / "nuclei.csv")
    assert len(table) > 5
    assert list(found.columns[:9]) == ["image", "plate", "row", "column", "field", "z", "t", "label", "touches_edge"]
    for name in ("image", "plate", "label", "area"):
        pd.testing.assert_series_equal(found[name], table[name], check_dtype=False)
    assert (found["x"] == table["centroid_x"]).all()

    tifffile.imwrite(tmp_path / "b.tif", spots(60, 70, 7, count=8))
    model = small_model(PredictionOptions(pixel_size=0.5))
    predict_files(model, [tmp_path / "b.tif"], tmp_path / "sized")
    (unit, *_), found = written(tmp_path / "sized")
    table = pd.read_csv(tmp_path / "sized" / "nuclei.csv")
    assert unit == "um"
    assert np.allclose(found["x"], table["centroid_x"] / 2)
    assert found["z"].isna().all()
