"""Labels in the OME-Zarr of their image: found by its metadata, with its axes, and never in the place of others."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaozarrs
import zarr

from nucleus.data.stacks import PlaneOptions
from nucleus.data.zarr_store import bucket_zarr, local_zarr
from nucleus.errors import ImageError
from nucleus.predict import zarr_results
from nucleus.predict.blocks import AssembledLabels
from nucleus.predict.cells import Expansion
from nucleus.predict.image_files import PredictedFiles, find_inputs, predict_files
from nucleus.predict.measurement import Frame
from nucleus.predict.planes import plan_images
from nucleus.predict.zarr_results import ImageLabels, IntoImage
from nucleus.storage.bucket import Bucket
from tests.predict.test_predict import rows_of, small_model, spots
from tests.zarr_files import VERSIONS, document_of, write_image

SHAPE = (60, 70)
versions = pytest.mark.parametrize("version", VERSIONS)


def drawn(seed: int = 1) -> AssembledLabels:
    labels = AssembledLabels(np.random.default_rng(seed).integers(0, 9, SHAPE, np.int32))
    labels.count = 8
    return labels


def names(image: Path, version: int) -> list[str]:
    document = json.loads((image / "labels" / document_of(version)).read_text())
    return list((document["attributes"]["ome"] if version == 3 else document)["labels"])


@pytest.mark.filterwarnings("ignore:1 validation warning")  # of the image, whose arrays do not name their axes
@versions
def test_predicted_labels_are_those_of_a_store_of_their_own(tmp_path: Path, version: int) -> None:
    image = write_image(tmp_path / "a.zarr", spots(*SHAPE, 7, count=8), version, axes="yx", side=0.5)

    def predicted(into: IntoImage | None, out: str) -> PredictedFiles:
        found = find_inputs([image])
        return predict_files(
            small_model(), found.images, tmp_path / out, formats=("zarr",), expansion=Expansion(3), into=into
        )

    assert not predicted(None, "beside").failures
    assert not (image / "labels").exists()
    assert not predicted(IntoImage(), "in").failures
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"nuclei.csv", "images.csv"}
    assert len(rows_of(tmp_path / "in" / "nuclei.csv")) > 3
    assert names(image, version) == ["nuclei", "nuclei_cells"]
    for name, ending in (("nuclei", ".labels.zarr"), ("nuclei_cells", ".cells.zarr")):
        own = zarr.open_group(tmp_path / "beside" / f"a{ending}", mode="r")["0"][:]
        assert own.max() > 3
        assert (zarr.open_group(image / "labels" / name, mode="r")["0"][:] == own).all()
        yaozarrs.validate_zarr_store(str(image / "labels" / name))
    (again,) = predicted(IntoImage(), "again").failures.values()
    assert "--label-name" in again
    assert not predicted(IntoImage("others"), "others").failures
    yaozarrs.validate_zarr_store(str(image))
    assert names(image, version) == ["nuclei", "nuclei_cells", "others", "others_cells"]
    assert not [path for path in (image / "labels").iterdir() if path.name.startswith(".") and path.is_dir()]


@versions
def test_a_plane_of_a_stack_lies_at_its_place(tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_results, "_SMALLEST_LEVEL", 40)
    pixels = np.zeros((2, 2, 3, *SHAPE), np.uint16)
    image = write_image(tmp_path / "a.zarr", pixels, version, side=0.25)
    labels = drawn()
    target = ImageLabels(image, IntoImage())
    target.check(Frame("a", SHAPE, z=2, t=1), cells=False)
    assert names(image, version) == []
    with pytest.raises(ImageError, match="projection"):
        target.check(Frame("a", SHAPE, t=1), cells=False)
    target.write(labels, Frame("a", SHAPE, z=2, t=1))
    group = zarr.open_group(image / "labels" / "nuclei", mode="r")
    assert group["0"].shape == (2, 3, *SHAPE)
    assert (group["0"][1, 2] == labels.labels).all()
    assert (group["1"][1, 2] == labels.labels[::2, ::2]).all()
    assert not group["0"][0].any()
    attributes = group.attrs["ome"] if version == 3 else group.attrs
    (scales,) = attributes["multiscales"]
    assert [axis["name"] for axis in scales["axes"]] == ["t", "z", "y", "x"]
    assert scales["axes"][3]["unit"] == "micrometer"
    assert [level["coordinateTransformations"][0]["scale"] for level in scales["datasets"]] == [
        [1, 1, 0.25, 0.25],
        [1, 1, 0.5, 0.5],
    ]
    assert attributes["image-label"]["source"] == {"image": "../../"}


@versions
def test_labels_in_a_bucket_are_created_and_never_mixed(tmp_path: Path, bucket: Bucket, version: int) -> None:
    folder = write_image(tmp_path / "a.zarr", spots(*SHAPE, 7), version, axes="yx")
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.put(path.relative_to(tmp_path).as_posix(), path)
    image, document = bucket_zarr(bucket, "a.zarr"), document_of(version)
    first, second = ImageLabels(image, IntoImage()), ImageLabels(image, IntoImage())
    for each in (first, second):
        each.check(Frame("a", SHAPE), cells=False)
    first.write(drawn(1), Frame("a", SHAPE))
    before = {item.key: item.etag for item in bucket.objects("a.zarr/labels/")}
    with pytest.raises(ImageError, match="--overwrite"):
        second.write(drawn(2), Frame("a", SHAPE))
    with pytest.raises(ImageError, match="--overwrite"):
        ImageLabels(image, IntoImage()).check(Frame("a", SHAPE), cells=False)
    assert {item.key: item.etag for item in bucket.objects("a.zarr/labels/")} == before
    assert {f"a.zarr/labels/nuclei/{document}", f"a.zarr/labels/{document}"} <= set(before)
    ImageLabels(image, IntoImage(overwrite=True)).write(drawn(2), Frame("a", SHAPE))
    found = bucket_zarr(bucket, "a.zarr/labels/nuclei").array("0", version)
    assert found is not None
    assert (np.asarray(found[:]) == drawn(2).labels).all()
    listed = json.loads(bucket.get(f"a.zarr/labels/{document}"))
    assert (listed["attributes"]["ome"] if version == 3 else listed)["labels"] == ["nuclei"]


def test_where_labels_cannot_go_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"")
    with pytest.raises(ImageError, match="Leave out --into-image"):
        ImageLabels(tmp_path / "a.tif", IntoImage())
    image = write_image(tmp_path / "a.zarr", spots(*SHAPE, 7), axes="yx")
    with pytest.raises(ImageError, match="level of"):
        ImageLabels(image, IntoImage()).check(Frame("a", (30, 35)), cells=False)
    turned = write_image(tmp_path / "turned.zarr", spots(*SHAPE, 7), axes="xy")
    with pytest.raises(ImageError, match=r"last axes .* found x, y"):
        ImageLabels(turned, IntoImage()).check(Frame("turned", SHAPE[::-1]), cells=False)
    (tmp_path / "elsewhere").mkdir()
    (image / "labels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ImageError, match="link"):
        ImageLabels(local_zarr(image), IntoImage()).check(Frame("a", SHAPE), cells=False)
    assert not list((tmp_path / "elsewhere").iterdir())
    (image / "labels").unlink()
    (image / "labels").mkdir()
    (image / "labels" / "zarr.json").write_text('{"attributes": {"ome": {"labels": 3}}}')
    with pytest.raises(ImageError, match="list of labels"):
        ImageLabels(image, IntoImage()).check(Frame("a", SHAPE), cells=False)
    planned = plan_images({"a.zarr": image}, PlaneOptions())
    found = predict_files(small_model(), planned, tmp_path / "out", formats=("zarr",), into=IntoImage())
    assert "list of labels" in found.failures["a.zarr"]
