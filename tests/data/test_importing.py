import errno
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest

from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset, DatasetLocation, list_versions, locate_dataset, open_dataset, verify_dataset
from nucleus.data.images import encode_png
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.data.shards import decode_record
from nucleus.data.splits import SPLITS
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
