"""Import from a bucket: what is read of it, how often, and what ends the import."""

import io
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nucleus.data import bucket_sources
from nucleus.data.bucket_sources import open_bucket_source
from nucleus.data.images import encode_png
from nucleus.data.importing import import_dataset
from nucleus.data.splits import SplitOptions
from nucleus.data.synthetic import generated_image
from nucleus.errors import DataError, ImageError
from nucleus.storage.bucket import Bucket

OPTIONS = SplitOptions(seed=0, val=0.25, test=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with labels, and what an import leaves out."""
    root = tmp_path_factory.mktemp("source")
    for kind in ("images", "labels", "Zarr.zarr/0"):
        (root / kind).mkdir(parents=True)
    for seed in range(8):
        image, labels = generated_image(seed, 64, 64)
        (root / "images" / f"{seed}.png").write_bytes(encode_png(image))
        (root / "labels" / f"{seed}.png").write_bytes(encode_png(labels.astype(np.uint16)))
        (root / "Zarr.zarr/0" / str(seed)).write_bytes(b"chunk")
    (root / "images" / ".hidden.png").write_bytes(b"?")
    return root


def packed(folder: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder).as_posix())
    return file.getvalue()


def uploaded(folder: Path, bucket: Bucket) -> Bucket:
    place = Bucket(bucket.uri / "source")
    for path in folder.rglob("*"):
        if path.is_file():
            place.put(path.relative_to(folder).as_posix(), path)
    return place


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str | None]]:
    """How often each part of an object was read."""
    counts: Counter[tuple[str, str | None]] = Counter()
    read = bucket_sources._get

    def counted(bucket: Bucket, key: str, etag: str, span: str | None = None) -> bytes:
        counts[key, span] += 1
        return read(bucket, key, etag, span)

    monkeypatch.setattr(bucket_sources, "_get", counted)
    return counts


def test_a_prefix_gives_the_dataset_of_the_folder(
    folder: Path, bucket: Bucket, asked: Counter[tuple[str, str | None]]
) -> None:
    """Each image and mask is read once, and the millions of objects that a Zarr may have are passed over."""
    place = uploaded(folder, bucket)
    here = import_dataset(folder, bucket.uri / "datasets" / "a", OPTIONS)
    there = import_dataset(place.uri, bucket.uri / "datasets" / "b", OPTIONS)
    assert there.dataset.manifest.samples == here.dataset.manifest.samples
    assert there.dataset.manifest.version == here.dataset.manifest.version
    assert [item.title for item in there.left_out] == ["Zarr.zarr"]
    names = [f"{kind}/{seed}.png" for kind in ("images", "labels") for seed in range(8)]
    assert asked == Counter({(name, None): 1 for name in names})


def test_a_zip_gives_the_dataset_of_the_folder(
    folder: Path, bucket: Bucket, asked: Counter[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its list of contents and each entry are read once, and nothing else."""
    data = packed(folder)
    bucket.put("data.zip", data)
    monkeypatch.setattr(bucket_sources, "_TAIL", 4096)
    here = import_dataset(folder, bucket.uri / "datasets" / "a", OPTIONS)
    there = import_dataset(bucket.uri / "data.zip", bucket.uri / "datasets" / "b", OPTIONS)
    assert there.dataset.manifest.samples == here.dataset.manifest.samples
    assert max(asked.values()) == 1
    assert len(asked) == 1 + 16


def test_an_object_that_changed_ends_the_import(folder: Path, bucket: Bucket) -> None:
    place = uploaded(folder, bucket)
    source = open_bucket_source(place.uri)
    assert len(source.entries()) == 16
    place.put("images/3.png", b"something else")
    with pytest.raises(DataError, match=r"images/3\.png to stay as it is .* replaced"):
        source.read("images/3.png")
    place.delete("images/4.png")
    with pytest.raises(DataError, match=r"images/4\.png .* removed") as found:
        source.read("images/4.png")
    assert not isinstance(found.value, ImageError)  # such an error would leave out one image

    bucket.put("data.zip", packed(folder))
    archive = open_bucket_source(bucket.uri / "data.zip")
    bucket.put("data.zip", packed(folder) + b"\0")
    with pytest.raises(DataError, match="replaced"):
        archive.read("images/1.png")


def test_a_damaged_zip_is_told(folder: Path, bucket: Bucket) -> None:
    data = packed(folder)
    for name, content, message in (
        ("cut.zip", data[: len(data) // 2], "breaks off"),
        ("other.zip", b"\x1f\x8b" + bytes(500), "gzip"),
        ("empty.zip", b"", "neither"),
    ):
        bucket.put(name, content)
        with pytest.raises(DataError, match=message):
            open_bucket_source(bucket.uri / name)
    with pytest.raises(DataError, match="nothing is there"):
        open_bucket_source(bucket.uri / "none.zip")
    start = data.index(b"images/1.png") + len("images/1.png") + 40
    bucket.put("bits.zip", data[:start] + bytes(20) + data[start + 20 :])
    with pytest.raises(ImageError, match=r"Cannot read images/1\.png"):
        open_bucket_source(bucket.uri / "bits.zip").read("images/1.png")


def test_keys_that_are_no_paths_are_left_out(bucket: Bucket) -> None:
    bucket.put("images//a.png", b"1")
    bucket.put("images/b.png", b"2")
    source = open_bucket_source(bucket.uri)
    assert source.entries() == ["images/b.png"]
    assert list(source.left_out()) == ["images//a.png"]
