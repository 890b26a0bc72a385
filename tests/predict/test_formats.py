"""Nuclei in every format, read back with other libraries than those that wrote them, are the labels."""

import gzip
import json
import uuid
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import roifile
import shapely
import tifffile
import yaozarrs
import zarr
from numpy.typing import NDArray
from pycocotools.coco import COCO
from shapely.geometry import shape

from nucleus.data.images import encode_png
from nucleus.data.stacks import PlaneOptions
from nucleus.errors import ImageError, MissingPackageError, OutputError, UsageError
from nucleus.predict import zarr_results
from nucleus.predict.blocks import AssembledLabels
from nucleus.predict.formats import ENDINGS, check_formats, open_outlines
from nucleus.predict.image_files import predict_files
from nucleus.predict.measurement import Frame, MeasuredPart
from nucleus.predict.model import PredictionOptions
from nucleus.predict.planes import plan_images
from tests.predict.test_predict import rows_of, small_model, spots

SHAPE = (130, 170)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results for an image `a.png` in every format, with blocks of 64 px."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "a.png").write_bytes(encode_png(spots(*SHAPE, 7, count=40)))
    model = small_model(PredictionOptions(block_side=64))
    predict_files(model, [folder / "a.png"], folder / "out", formats=check_formats(tuple(ENDINGS)))
    return folder / "out"


@pytest.fixture(scope="module")
def labels(results: Path) -> NDArray[np.int32]:
    found = tifffile.imread(results / "a.labels.tif").astype(np.int32)
    assert found.max() > 10
    return found


def filled(polygons: dict[int, Any]) -> NDArray[np.int32]:
    """Labels of the pixels whose centres are inside shapely's polygons."""
    found = np.zeros(SHAPE, np.int32)
    rows, columns = np.indices(SHAPE) + 0.5
    for label, polygon in polygons.items():
        found[shapely.contains_xy(polygon, columns, rows)] = label
    return found


@pytest.mark.parametrize("name", ["geojson", "geojson.gz"])
def test_geojson_is_a_collection_of_detections(results: Path, labels: NDArray[np.int32], name: str) -> None:
    data = (results / f"a.{name}").read_bytes()
    collection = json.loads(gzip.decompress(data) if name.endswith("gz") else data)
    assert collection["type"] == "FeatureCollection"
    features = collection["features"]
    assert all(shape(feature["geometry"]).is_valid for feature in features)
    assert all(ring[0] == ring[-1] for feature in features for ring in feature["geometry"]["coordinates"])
    assert len({uuid.UUID(feature["id"]) for feature in features}) == len(features)
    assert {feature["properties"]["objectType"] for feature in features} == {"detection"}
    measured = [feature["properties"]["measurements"] for feature in features]
    rows = {int(row["label"]): row for row in rows_of(results / "nuclei.csv")}
    for found in measured:
        row = rows.pop(found["label"])
        assert found == {key: float(row[key]) for key in found}
        assert {"area", "diameter", "score", "mean_0", "centroid_x"} <= set(found)
    assert not rows
    polygons = {found["label"]: shape(feature["geometry"]) for found, feature in zip(measured, features, strict=True)}
    assert (filled(polygons) == labels).all()


def test_regions_of_imagej_are_the_labels(results: Path, labels: NDArray[np.int32]) -> None:
    regions = roifile.roiread(results / "a.rois.zip")
    assert {region.roitype for region in regions} == {roifile.ROI_TYPE.TRACED}
    polygons = {int(region.name): shapely.Polygon(region.coordinates()) for region in regions}
    assert (filled(polygons) == labels).all()
    assert zipfile.ZipFile(results / "a.rois.zip").testzip() is None


def test_coco_is_read_by_pycocotools(results: Path, labels: NDArray[np.int32]) -> None:
    coco = COCO(str(results / "a.coco.json"))
    assert [(image["file_name"], image["height"], image["width"]) for image in coco.loadImgs([1])] == [
        ("a.png", *SHAPE)
    ]
    found = np.zeros(SHAPE, np.int32)
    for annotation in coco.loadAnns(coco.getAnnIds()):
        mask = coco.annToMask(annotation) > 0
        found[mask] = annotation["id"]
        rows, columns = np.nonzero(mask)
        assert annotation["area"] == mask.sum()
        x, y, width, height = annotation["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
    assert (found == labels).all()


def test_zarr_is_a_pyramid_of_labels(
    results: Path, labels: NDArray[np.int32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = yaozarrs.validate_ome_uri(str(results / "a.labels.zarr"))
    assert type(image.attributes.ome).__name__ == "LabelImage"
    assert (zarr.open_group(results / "a.labels.zarr", mode="r")["0"][:] == labels).all()

    monkeypatch.setattr(zarr_results, "_CHUNK", 64)
    monkeypatch.setattr(zarr_results, "_SMALLEST_LEVEL", 50)
    whole = AssembledLabels(labels)
    whole.count = int(labels.max())
    zarr_results.write_zarr(tmp_path / "b.labels.zarr", whole, Frame("b.png", SHAPE, pixel_size=0.5))
    group = zarr.open_group(tmp_path / "b.labels.zarr", mode="r")
    (scales,) = group.attrs["ome"]["multiscales"]
    assert [level["coordinateTransformations"][0]["scale"] for level in scales["datasets"]] == [
        [0.5, 0.5],
        [1.0, 1.0],
        [2.0, 2.0],
    ]
    for level in range(3):
        assert (group[str(level)][:] == labels[:: 2**level, :: 2**level]).all()
    assert yaozarrs.validate_ome_uri(str(tmp_path / "b.labels.zarr"))


def test_only_what_was_asked_for_is_there_and_nothing_of_before(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(spots(60, 70, 7, count=8)))
    tables = {"nuclei.csv", "images.csv"}
    model = small_model()
    for asked in (("labels", "zarr", "overlay"), ("csv",), ("geojson",), ("roi", "coco")):
        predict_files(model, [tmp_path / "a.png"], tmp_path / "out", formats=check_formats(asked))
        images = {f"a{ENDINGS[name]}" for name in asked if name in ENDINGS}
        assert {path.name for path in (tmp_path / "out").iterdir()} == tables | images
    before = (tmp_path / "out" / "a.rois.zip").read_bytes()
    predict_files(model, [tmp_path / "a.png"], tmp_path / "out", formats=("roi",))
    regions = roifile.roiread(tmp_path / "out" / "a.rois.zip")
    assert len(regions) == len(zipfile.ZipFile(tmp_path / "out" / "a.rois.zip").namelist())  # replaced, not appended to
    assert len(before) > 0


def test_planes_of_a_stack_are_told_apart(tmp_path: Path) -> None:
    planes = np.stack([spots(60, 70, seed, count=8) for seed in (7, 8)])
    tifffile.imwrite(tmp_path / "a.tif", planes, imagej=True, metadata={"axes": "ZYX"})
    planned = plan_images({"a.tif": tmp_path / "a.tif"}, PlaneOptions(z="all"))
    predict_files(small_model(), planned, tmp_path, formats=("geojson", "roi"))
    names = set()
    for z in (0, 1):
        features = json.loads((tmp_path / f"a.z{z}.geojson").read_text())["features"]
        assert features
        assert all(feature["geometry"]["plane"] == {"c": -1, "z": z, "t": 0} for feature in features)
        names |= {feature["id"] for feature in features}
        regions = roifile.roiread(tmp_path / f"a.z{z}.rois.zip")
        assert {(region.z_position, region.t_position) for region in regions} == {(z + 1, 0)}
    assert len(names) == len(rows_of(tmp_path / "nuclei.csv"))


def test_measurements_name_channels_and_features_their_place_in_a_plate(tmp_path: Path) -> None:
    labels = np.zeros((8, 9), np.int32)
    labels[2:5, 3:7] = 1
    image = Frame("p.zarr/B/3/0", labels.shape, pixel_size=0.5, channels=("DAPI", "", 'a "b"'))
    row: dict[str, Any] = image.keys | {"label": 1, "area": 12, "touches_edge": False, "area_um2": 3.0}
    row |= {"mean_0": 1.5, "integrated_0": 18.0, "mean_1": 2.0, "mean_2": 3.0, "mean_3": np.inf}
    with open_outlines("geojson", tmp_path / "a", image, "m") as add:
        add(MeasuredPart(image, labels, [row]))
    (feature,) = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert feature["properties"]["measurements"] == {
        "label": 1,
        "area": 12,
        "area_um2": 3.0,
        "mean_0 DAPI": 1.5,
        "integrated_0 DAPI": 18.0,
        "mean_1": 2.0,
        'mean_2 a "b"': 3.0,
    }
    assert feature["properties"]["metadata"] == {"plate": "p", "row": "B", "column": "3", "field": "0"}
    assert shape(feature["geometry"]).is_valid


def test_an_image_without_nuclei_has_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((40, 50, 3), np.uint8)))
    predict_files(small_model(), [tmp_path / "a.png"], tmp_path, formats=check_formats(tuple(ENDINGS)))
    assert json.loads((tmp_path / "a.geojson").read_text())["features"] == []
    assert json.loads((tmp_path / "a.coco.json").read_text())["annotations"] == []
    assert zipfile.ZipFile(tmp_path / "a.rois.zip").namelist() == []
    assert not zarr.open_group(tmp_path / "a.labels.zarr", mode="r")["0"][:].any()


def test_wrong_choices_have_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"geojson\.gz, roi, coco, overlay, csv, parquet, h5ad; found svg"):
        check_formats(("labels", "svg"))
    with pytest.raises(UsageError, match="found none"):
        check_formats(())
    assert check_formats(("roi", "labels", "roi")) == ("labels", "roi")
    image = Frame("wide.tif", (10, 32_768))
    with pytest.raises(ImageError, match=r"32768 x 10 px\. Use --format geojson"):
        open_outlines("roi", tmp_path / "wide", image, "m").__enter__()
    with open_outlines("roi", tmp_path / "wide", replace(image, shape=(10, 32_767)), "m"):
        pass
    monkeypatch.setattr("nucleus.lazy.missing_packages", list)
    with pytest.raises(MissingPackageError, match="formats"):
        check_formats(("zarr",))


def test_a_folder_that_is_no_result_stays(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(spots(40, 40, 3, count=2)))
    mine = tmp_path / "out/a.labels.zarr/mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for formats in ("labels",), ("zarr",):
        with pytest.raises(OutputError, match="found another folder"):
            predict_files(small_model(), [tmp_path / "a.png"], tmp_path / "out", formats=formats)
    assert mine.read_text() == "mine"
