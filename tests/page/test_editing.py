"""What the page computes for corrections: missed nuclei, measurements of drawn ones, and downloads."""

import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

import nucleus
from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image
from nucleus.errors import UsageError
from nucleus.page.editing import (
    EditedImage,
    edited_nuclei,
    measure_labels,
    measure_shape,
    missed_nucleus,
    write_download,
)
from nucleus.page.layers import Changes, NucleusShape, filled_shape
from nucleus.predict.blocks import AssembledLabels
from nucleus.predict.image_files import predict_files
from nucleus.predict.outlines import outlines_of
from nucleus.predict.segmentation import Segmentation
from nucleus.predict.source import array_source
from tests.page.test_layers import unpacked

PIXELS = generated_image(0, 192, 256)[0]


@pytest.fixture(scope="module")
def image() -> EditedImage:
    model = nucleus.load()
    return EditedImage(model, model.scaled_image(array_source(PIXELS, "a.png")))


@pytest.fixture(scope="module")
def found(image: EditedImage) -> Segmentation:
    return image.model.segment(PIXELS)


def shape_of(labels: NDArray[np.int32], label: int) -> NucleusShape:
    (outline,) = (each for each in outlines_of(labels) if each.label == label)
    return NucleusShape(label=label, rings=tuple(tuple(ring.ravel().tolist()) for ring in outline.rings))


def test_a_click_finds_the_nucleus_that_was_removed(image: EditedImage, found: Segmentation) -> None:
    row = max(found.rows, key=lambda row: row["score"])
    others = [shape_of(found.labels, each["label"]) for each in found.rows if each is not row]
    data = missed_nucleus(image, row["centroid_x"], row["centroid_y"], others, found.diameter)
    assert data is not None
    (rings,) = unpacked(data).values()
    shape = NucleusShape(label=1, rings=tuple(tuple(value / 2 for value in ring) for ring in rings))
    region, pixels = filled_shape(shape, found.labels.shape)
    before = found.labels[region.rows, region.columns] == row["label"]
    assert int((pixels & before).sum()) >= 0.8 * row["area"]
    assert not (pixels & (found.labels[region.rows, region.columns] > 0) & ~before).any()


def test_a_click_on_background_finds_nothing(image: EditedImage, found: Segmentation) -> None:
    far = np.argwhere(_distance_to_nuclei(found.labels) > 14)
    y, x = far[len(far) // 2]
    assert missed_nucleus(image, float(x), float(y), [], found.diameter) is None
    with pytest.raises(UsageError):
        missed_nucleus(image, 300, 10, [], None)


def _distance_to_nuclei(labels: NDArray[np.int32]) -> NDArray[np.float64]:
    from scipy import ndimage

    return np.asarray(ndimage.distance_transform_edt(labels == 0))


def test_a_drawn_nucleus_is_measured_as_a_found_one(image: EditedImage, found: Segmentation) -> None:
    row = found.rows[len(found.rows) // 2]
    measured = measure_shape(image, shape_of(found.labels, row["label"]))
    exact = [name for name in row if name not in {"image", "score"}]
    assert {name: measured[name] for name in exact} == {name: row[name] for name in exact}
    assert measured["score"] == pytest.approx(row["score"], abs=0.02)


def test_saved_labels_are_measured_with_the_numbers_that_they_have(image: EditedImage, found: Segmentation) -> None:
    labels = found.labels * 3
    rows = [row for part in measure_labels(image, labels) for row in part.rows]
    assert [row["label"] for row in rows] == [3 * row["label"] for row in found.rows]
    assert [row["area"] for row in rows] == [row["area"] for row in found.rows]


def test_downloads_are_what_predict_writes(image: EditedImage, found: Segmentation, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encode_png(PIXELS))
    predict_files(image.model, [file], tmp_path / "out", formats=("labels", "geojson", "roi", "coco", "overlay"))
    labels = AssembledLabels(found.labels)
    labels.count = found.count
    rows = [row | {"image": "a.png"} for row in found.rows]
    for what, name in (
        ("labels", "a.labels.tif"),
        ("csv", "nuclei.csv"),
        ("geojson", "a.geojson"),
        ("coco", "a.coco.json"),
        ("picture", "a.overlay.png"),
    ):
        written = write_download(what, image, labels, rows, tmp_path / "a")  # type: ignore[arg-type]
        assert written.read_bytes() == (tmp_path / "out" / name).read_bytes(), what
    assert write_download("roi", image, labels, rows, tmp_path / "a").stat().st_size > 100


def test_downloads_have_the_changes(image: EditedImage, found: Segmentation, tmp_path: Path) -> None:
    drawn = NucleusShape(label=900, rings=((0, 0, 6, 0, 6, 6, 0, 6),))
    changes = Changes(removed=(1, *np.unique(found.labels[:6, :6])[1:].tolist()), shapes=(drawn,))
    labels, rows = edited_nuclei(found.labels, found.rows, changes, lambda shape: measure_shape(image, shape), tmp_path)
    stored = tifffile.imread(write_download("labels", image, labels, rows, tmp_path / "a"))
    table = list(csv.DictReader(write_download("csv", image, labels, rows, tmp_path / "a").read_text().splitlines()))
    assert [int(row["label"]) for row in table] == np.unique(stored)[1:].tolist()
    assert {int(row["label"]): int(row["area"]) for row in table} == {
        int(label): int((stored == label).sum()) for label in np.unique(stored)[1:]
    }
    assert table[-1]["label"] == "900"
    assert float(table[-1]["mean_0"]) == pytest.approx(PIXELS[:6, :6, 0].mean(), rel=1e-5)
