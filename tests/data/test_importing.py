import errno
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from nucleus.data.cache import ShardCache
from nucleus.data.dataset import (
    Dataset,
    DatasetLocation,
    check_has_nuclei,
    list_versions,
    locate_dataset,
    open_dataset,
)
from nucleus.data.dataset_storage import verify_dataset
from nucleus.data.images import encode_png
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.data.samples import SPLITS
from nucleus.data.shards import decode_record
from nucleus.data.synthetic import generated_image, write_generated
from nucleus.errors import BucketNotFoundError, DataError, IntegrityError, OutputError, UsageError
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri, parse_uri


def records(dataset: Dataset, cache: Path) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
    found = {}
    for split in SPLITS:
        shards = dataset.manifest.split_shards(split)
        for shard in shards:
            file = ShardCache(cache).open(dataset, shard)
            assert len(file) == shard.records
            for record in range(shard.records):
                name, image, labels = decode_record(file.read(record))
                found[name] = (split, image, labels)
    return found


def test_contents_and_versions(dozen: Path, bucket_uri: S3Uri, tmp_path: Path) -> None:
    uri = bucket_uri / "datasets" / "dozen"
    source = tmp_path / "source"
    shutil.copytree(dozen, source)
    first = import_dataset(source, uri, SplitOptions())
    assert first.created
    stored = records(first.dataset, tmp_path / "cache")
    assert len(stored) == 12
    for sample in first.dataset.manifest.samples:
        split, image, labels = stored[sample.name]
        truth, true_labels = generated_image(int(sample.name.rsplit("-", 1)[1]), 96, 96)
        assert split == sample.split
        assert (image == truth).all()
        assert ((labels > 0) == (true_labels > 0)).all()
        assert labels.max() == sample.nuclei == true_labels.max()

    before = {item.key: item.modified for item in Bucket(uri).objects("")}
    again = import_dataset(source, uri, SplitOptions())
    assert not again.created
    assert again.dataset == first.dataset
    assert {item.key: item.modified for item in Bucket(uri).objects("")} == before

    write_generated(source, 2, seed=12, side=96)
    more = import_dataset(source, uri, SplitOptions())
    assert more.created
    assert more.dataset.manifest.version != first.dataset.manifest.version
    assert [d.manifest.version for d in list_versions(uri)] == [
        first.dataset.manifest.version,
        more.dataset.manifest.version,
    ]
    old = open_dataset(DatasetLocation(uri, first.dataset.manifest.version))
    assert old == first.dataset


def test_zip_and_folder_give_one_version(dozen: Path, bucket_uri: S3Uri, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "dozen"), "zip", dozen)
    versions = {
        import_dataset(path, bucket_uri / "d", SplitOptions()).dataset.manifest.version
        for path in (dozen, Path(archive))
    }
    assert len(versions) == 1


def test_duplicates_wrong_sizes_and_damaged_files_are_named(bucket_uri: S3Uri, tmp_path: Path) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    for folder in (images, labels):
        folder.mkdir()
    for number in range(8):
        image, truth = generated_image(number, 64, 64)
        (images / f"Cell {number}.png").write_bytes(encode_png(image))
        (labels / f"Cell {number}.png").write_bytes(encode_png(truth))
    shutil.copy(images / "Cell 1.png", images / "copy.png")
    shutil.copy(labels / "Cell 1.png", labels / "copy.png")
    (labels / "Cell 2.png").write_bytes(encode_png(np.zeros((64, 65), np.uint16)))
    (images / "Cell 3.png").write_bytes((images / "Cell 3.png").read_bytes()[:200])
    (labels / "Cell 4.png").unlink()
    manifest = import_dataset(tmp_path, bucket_uri / "d", SplitOptions()).dataset.manifest
    assert sorted(sample.name for sample in manifest.samples) == ["cell-0", "cell-1", "cell-5", "cell-6", "cell-7"]
    (copy,) = manifest.duplicates
    assert (copy.title, "Cell 1" in copy.reason) == ("copy", True)
    reasons = {item.title: item.reason for item in manifest.left_out}
    assert set(reasons) == {"Cell 2", "Cell 3", "Cell 4"}
    assert re.search("64 x 64 .*65 x 64", reasons["Cell 2"])
    assert "Cell 3.png" in reasons["Cell 3"]
    assert "mask" in reasons["Cell 4"]


def test_links_are_imported_and_what_cannot_be_read_is_counted(bucket_uri: S3Uri, tmp_path: Path) -> None:
    """Kaggle's layout, partly on another disk; a folder that is gone, an image that is a link to nothing, strays."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, number in ((here, 0), (here, 1), (here, 2), (there, 3), (there, 4)):
        image, labels = generated_image(number, 64, 64)
        for kind, pixels in {"images": image, "masks": ((labels > 0) * 255).astype(np.uint8)}.items():
            path = folder / f"s{number}" / kind / "x.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(encode_png(pixels))
    (here / "s3").symlink_to(there / "s3")
    (here / "s4").mkdir()
    for kind in ("images", "masks"):
        (here / "s4" / kind).symlink_to(there / "s4" / kind)
    (here / "s4" / "circle").symlink_to(here)
    (here / "s5").symlink_to(there / "s5")
    (here / "s0" / "images" / "gone.png").symlink_to("nowhere.png")
    (here / "stray").mkdir()
    (here / "stray" / "a.png").write_bytes(b"no image")
    (here / "s0" / "images" / "._x.png").write_bytes(b"of macOS")
    manifest = import_dataset(here, bucket_uri / "d", SplitOptions(val=0.2, test=0.2)).dataset.manifest
    assert sorted(sample.name for sample in manifest.samples) == ["s0", "s1", "s2", "s3", "s4"]
    assert {item.title for item in manifest.left_out} == {"s5", "s0/images/gone.png", "stray"}
    assert manifest.duplicates == []


def test_a_full_disk_ends_an_import(bucket_uri: S3Uri, dozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"nucleus-import-.*MiB are free.*TMPDIR"):
        import_dataset(dozen, bucket_uri / "d", SplitOptions())


def write_pairs(folder: Path, nuclei: Callable[[int], bool], number: int = 12) -> Path:
    """Images with labels; only those whose number is chosen have nuclei."""
    for index in range(number):
        image, labels = generated_image(index, 64, 64)
        for kind, pixels in {"images": image, "labels": labels * nuclei(index)}.items():
            path = folder / kind / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(pixels))
    return folder


def test_a_dataset_without_nuclei_is_told_and_not_trained_on(bucket_uri: S3Uri, tmp_path: Path) -> None:
    uri = bucket_uri / "datasets" / "d"
    source = write_pairs(tmp_path, lambda _: False)
    for created in (True, False):  # also if the version is there already
        imported = import_dataset(source, uri, SplitOptions())
        assert imported.created == created
        (warning,) = imported.warnings
        assert "12 images" in warning
    with pytest.raises(DataError, match="'train'"):
        check_has_nuclei(imported.dataset)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_without_nuclei_is_told(split: str, bucket_uri: S3Uri, tmp_path: Path) -> None:
    source = write_pairs(tmp_path, lambda _: True)
    splits = {
        s.name: s.split for s in import_dataset(source, bucket_uri / "d", SplitOptions()).dataset.manifest.samples
    }
    write_pairs(tmp_path, lambda index: splits[str(index)] != split)
    imported = import_dataset(source, bucket_uri / "d", SplitOptions())
    assert {s.name: s.split for s in imported.dataset.manifest.samples} == splits
    assert imported.dataset.manifest.splits_without_nuclei == [split]
    assert any(f"split {split}" in warning for warning in imported.warnings)
    if split == "test":
        check_has_nuclei(imported.dataset)
    else:
        with pytest.raises(DataError, match=f"'{split}'"):
            check_has_nuclei(imported.dataset)


def test_the_content_of_masks_decides_not_their_folder(bucket_uri: S3Uri, tmp_path: Path) -> None:
    scenes = [generated_image(number, 128, 128) for number in range(6)]
    for folder, write in {
        "labels": lambda truth: 255 * (truth > 0).astype(np.uint8),
        "masks": lambda truth: truth,
    }.items():
        for number, (image, truth) in enumerate(scenes):
            for kind, pixels in {"images": image, folder: write(truth)}.items():
                path = tmp_path / f"in-{folder}" / kind / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_png(pixels))
    binary = import_dataset(tmp_path / "in-labels", bucket_uri / "binary", SplitOptions())
    labels = import_dataset(tmp_path / "in-masks", bucket_uri / "labels", SplitOptions())
    assert any("binary mask where labels were expected" in warning for warning in binary.warnings)
    assert labels.warnings == []
    for sample in labels.dataset.manifest.samples:
        assert sample.nuclei == scenes[int(sample.name)][1].max() > 1
    for sample in binary.dataset.manifest.samples:
        mask = (scenes[int(sample.name)][1] > 0).astype(np.uint8)
        assert sample.nuclei == cv2.connectedComponents(mask)[0] - 1


def test_masks_that_can_be_none_leave_their_images_out(bucket_uri: S3Uri, tmp_path: Path) -> None:
    write_pairs(tmp_path, lambda _: True)
    inverted = cv2.imread(str(tmp_path / "labels" / "3.png"), cv2.IMREAD_UNCHANGED) == 0
    (tmp_path / "labels" / "3.png").write_bytes(encode_png(255 * inverted.astype(np.uint8)))
    manifest = import_dataset(tmp_path, bucket_uri / "d", SplitOptions()).dataset.manifest
    (item,) = manifest.left_out
    assert (item.title, "inverted" in item.reason) == ("3", True)


def test_notebook_layout_keeps_its_test_split(bucket_uri: S3Uri, tmp_path: Path) -> None:
    for split, numbers in {"train": range(9), "test": range(20, 23)}.items():
        for number in numbers:
            image, labels = generated_image(number, 64, 64)
            mask = cv2.erode((labels > 0).astype(np.uint8) * 255, np.ones((3, 3)))
            for kind, pixels in {"inputs": image, "masks": mask}.items():
                path = tmp_path / split / kind / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_png(pixels))
    dataset = import_dataset(tmp_path, bucket_uri / "d", SplitOptions()).dataset
    assert dataset.manifest.layout == "paired"
    assert {s.name for s in dataset.manifest.split_samples("test")} == {"20", "21", "22"}
    assert all(sample.nuclei >= 1 for sample in dataset.manifest.samples)
    assert sum(sample.nuclei for sample in dataset.manifest.samples) > 12


def test_tiles_never_fall_on_both_sides(bucket_uri: S3Uri, tmp_path: Path) -> None:
    for number in (0, 1, 2, 3, 5, 7):  # of 0 to 9 those whose tiles all meet in content, not in empty ground
        image, labels = generated_image(number, 512, 512)
        for y in (0, 256):
            for x in (0, 256):
                part = np.s_[y : y + 256, x : x + 256]
                for kind, pixels in {"images": image[part], "labels": labels[part]}.items():
                    path = tmp_path / kind / f"p{number}_{y}_{x}.png"
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(encode_png(np.ascontiguousarray(pixels)))
    manifest = import_dataset(tmp_path, bucket_uri / "d", SplitOptions()).dataset.manifest
    splits = defaultdict(set)
    for sample in manifest.samples:
        splits[sample.name.split("_")[0]].add(sample.split)
    assert all(len(found) == 1 for found in splits.values()), splits
    assert {sample.split for sample in manifest.samples} == set(SPLITS)


def test_nothing_is_left_half_written(dozen: Path, bucket_uri: S3Uri) -> None:
    uri = bucket_uri / "d"
    dataset = import_dataset(dozen, uri, SplitOptions()).dataset
    shards = [shard.file for shard in dataset.manifest.shards]
    # An import that stopped before its manifest: no command sees it.
    other = bucket_uri / "half"
    for name in shards[:3]:
        Bucket(other).put(f"{dataset.manifest.version}/{name}", b"half")
    with pytest.raises(DataError, match="nucleus data import"):
        open_dataset(DatasetLocation(other, "latest"))
    assert list_versions(other) == []
    again = import_dataset(dozen, other, SplitOptions())
    assert again.created
    assert verify_dataset(again.dataset) == []


def test_damage_is_found(dozen: Path, bucket_uri: S3Uri, tmp_path: Path) -> None:
    dataset = import_dataset(dozen, bucket_uri / "d", SplitOptions()).dataset
    assert verify_dataset(dataset) == []
    shard = dataset.manifest.shards[0]
    bucket = Bucket(dataset.version_uri)
    ShardCache(tmp_path / "good").open(dataset, shard)
    (good,) = (tmp_path / "good").rglob(shard.file)
    kept = good.read_bytes()
    bucket.put(shard.file, kept[:-1] + b"\0")
    (problem,) = verify_dataset(dataset)
    assert all(fact in problem for fact in (shard.file, str(shard.size), shard.sha256))
    assert len(ShardCache(tmp_path / "good").open(dataset, shard)) == shard.records  # the cached copy is right
    with pytest.raises(IntegrityError, match=shard.sha256):
        ShardCache(tmp_path / "other").open(dataset, shard)
    assert not list((tmp_path / "other").rglob("*.tfrecord"))
    good.write_bytes(b"damaged on disk")
    bucket.put(shard.file, kept)
    ShardCache(tmp_path / "good").open(dataset, shard)
    assert good.read_bytes() == kept


def test_bad_sources(bucket_uri: S3Uri, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        import_dataset(tmp_path, bucket_uri / "d", SplitOptions())
    with pytest.raises(BucketNotFoundError):
        import_dataset(tmp_path, parse_uri("s3://nowhere/d"), SplitOptions())
    write_generated(tmp_path, 2, side=64)
    with pytest.raises(DataError, match=r"\b3\b"):
        import_dataset(tmp_path, bucket_uri / "d", SplitOptions())
    with pytest.raises(UsageError, match="fractions"):
        SplitOptions(val=0.6, test=0.5)
    with pytest.raises(DataError, match="nucleus data list"):
        open_dataset(locate_dataset(f"{bucket_uri}/d@0123456789ab"))
