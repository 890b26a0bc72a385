"""Import of OME-Zarr with labels: which labels, which planes, and what contradicts the image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nucleus.data.importing import Imported, import_dataset
from nucleus.data.intake import SourceOptions
from nucleus.data.splits import SplitOptions
from nucleus.data.stacks import PlaneOptions
from nucleus.data.synthetic import generated_image
from nucleus.data.zarr_labels import ZarrChoice, labelled_planes
from nucleus.data.zarr_store import local_zarr
from nucleus.errors import DataError, ImageError, UsageError
from nucleus.storage.bucket import Bucket
from tests.data.test_zarr_buckets import uploaded
from tests.zarr_files import VERSIONS, write_group, write_image

versions = pytest.mark.parametrize("version", VERSIONS)


def pair(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """A generated grey image and its labels."""
    image, labels = generated_image(seed, 64, 80)
    return np.asarray(image.mean(axis=2), np.uint8), labels.astype(np.int32)


def written(folder: Path, seed: int, version: int = 3, names: tuple[str, ...] = ("nuclei",), **changes: Any) -> Path:
    """An image with labels; those after the first are empty."""
    image, labels = pair(seed)
    write_image(folder, image, version, axes="yx")
    write_group(folder / "labels", {"labels": list(names)}, version)
    for number, name in enumerate(names):
        options = {"axes": "yx", **changes}
        write_image(folder / "labels" / name, options.pop("pixels", labels * (number == 0)), version, **options)
    return folder


def imported(source: Path | Any, bucket: Bucket, **choice: Any) -> Imported:
    reading = SourceOptions(zarr=ZarrChoice(**choice))
    return import_dataset(
        source, bucket.uri / "datasets" / "d", SplitOptions(seed=0, val=0.25, test=0.25), reading=reading
    )


@versions
def test_images_and_labels_are_those_of_the_zarr(tmp_path: Path, bucket: Bucket, version: int) -> None:
    """Here and in a bucket."""
    for seed in range(4):
        written(tmp_path / "z" / f"{seed}.ome.zarr", seed, version)
    here = imported(tmp_path / "z", bucket)
    assert (here.left_out, len(here.dataset.manifest.samples)) == ([], 4)
    counts = {sample.name: sample.nuclei for sample in here.dataset.manifest.samples}
    assert counts == {f"{seed}.ome.zarr": int(pair(seed)[1].max()) for seed in range(4)}
    uploaded(tmp_path / "z", bucket)
    assert imported(bucket.uri / "z", bucket).dataset == here.dataset


def test_labels_are_chosen_by_name(tmp_path: Path) -> None:
    image = local_zarr(written(tmp_path / "a.zarr", 1, names=("nuclei", "cells")))
    with pytest.raises(ImageError, match=r"nuclei, cells\. Add: --labels nuclei"):
        list(labelled_planes(image, "a", ZarrChoice()))
    with pytest.raises(ImageError, match="found nuclei, cells"):
        list(labelled_planes(image, "a", ZarrChoice("other")))
    (plane,) = labelled_planes(image, "a", ZarrChoice("cells"))
    assert plane.labels.name == "a/labels/cells"
    write_image(tmp_path / "b.zarr", pair(1)[0], axes="yx")
    with pytest.raises(ImageError, match="found none in labels/"):
        list(labelled_planes(local_zarr(tmp_path / "b.zarr"), "b", ZarrChoice()))


def test_a_channel_and_planes_are_chosen(tmp_path: Path) -> None:
    grey, labels = pair(2)
    pixels = np.stack(
        [np.stack([grey * 0 + depth * factor + grey * factor for depth in range(2)]) for factor in (0, 1)]
    )
    folder = tmp_path / "a.zarr"
    write_image(folder, pixels, axes="czyx", labels=("other", "DAPI"))
    write_group(folder / "labels", {"labels": ["nuclei"]}, 3)
    write_image(folder / "labels/nuclei", np.stack([labels, labels * 0]), axes="zyx")
    image = local_zarr(folder)
    with pytest.raises(ImageError, match="2 depths"):
        list(labelled_planes(image, "a", ZarrChoice(channel="DAPI")))
    planes = list(labelled_planes(image, "a", ZarrChoice(channel="dapi", planes=PlaneOptions(z="all"))))
    assert [plane.title for plane in planes] == ["a z=0", "a z=1"]
    for depth, plane in enumerate(planes):
        file, mask = plane.open()
        out, found = np.empty(file.shape, file.dtype), np.empty(mask.shape, mask.dtype)
        file.fill(out)
        mask.fill(found)
        assert (out[..., 0] == grey + depth).all()
        assert (found[..., 0] == labels * (depth == 0)).all()
    (plane,) = labelled_planes(image, "a", ZarrChoice(planes=PlaneOptions(z=0)))
    with pytest.raises(ImageError, match=r"2: 'other', 'DAPI'"):
        plane.open()
    with pytest.raises(UsageError, match="no projection"):
        ZarrChoice(planes=PlaneOptions(z="max"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": np.zeros((64, 40), np.int32)}, r"80 x 64 px .* found 40 x 64"),
        ({"pixels": np.zeros((64, 80), np.float32)}, "integers in one channel"),
        ({"side": 0.25}, "0.5 micrometres"),
    ],
)
def test_labels_that_contradict_the_image_are_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (plane,) = labelled_planes(local_zarr(written(tmp_path / "a.zarr", 1, **changes)), "a", ZarrChoice())
    with pytest.raises(ImageError, match=message):
        plane.open()


def test_labels_of_other_depths_are_told(tmp_path: Path) -> None:
    folder = written(tmp_path / "a.zarr", 1, pixels=np.zeros((2, 64, 80), np.int32), axes="zyx")
    with pytest.raises(ImageError, match="1 depths in the labels a/labels/nuclei"):
        list(labelled_planes(local_zarr(folder), "a", ZarrChoice()))


def test_a_choice_is_for_zarr_alone(tmp_path: Path, bucket: Bucket, dozen: Path) -> None:
    with pytest.raises(UsageError, match="--labels"):
        imported(dozen, bucket, labels="nuclei")
    with pytest.raises(DataError, match="found none in labels/"):
        imported(write_image(tmp_path / "a.zarr", pair(1)[0], axes="yx"), bucket)
    with pytest.raises(DataError, match=r"ends in \.zarr"):
        imported(write_image(tmp_path / "6001240", pair(1)[0], axes="yx"), bucket)
