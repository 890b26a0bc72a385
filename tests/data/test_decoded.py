"""Decoded records beside a shard: the same pixels, whoever wrote them, and never a damaged one."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.data import decoded
from nucleus.data.decoded import DecodedFile, decoded_bytes, decoded_image, decoded_sample
from nucleus.data.shards import ShardFile, decode_record, encode_record, write_shard
from nucleus.data.synthetic import generated_image
from nucleus.errors import IntegrityError

SHA256 = "ab" * 32
SHAPES = [(40, 60), (33, 1300), (64, 64), (50, 20)]
OPTIONS = NormalizationOptions()
NUMBERS = (0, 1, 6, 3)  # the third is coloured


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A shard, and an empty file for its decoded records."""
    shard, pixels = tmp_path / "s.tfrecord", tmp_path / "s.pixels"
    images = (generated_image(number, *shape) for number, shape in zip(NUMBERS, SHAPES, strict=True))
    write_shard(shard, (encode_record(f"n{i}", *pair) for i, pair in enumerate(images)))
    sizes = np.array(SHAPES)
    with pixels.open("wb") as file:
        os.ftruncate(file.fileno(), decoded_bytes(sizes))
        DecodedFile.create(file.fileno(), SHA256, sizes)
    return shard, pixels


def opened(files: tuple[Path, Path], sizes: NDArray[np.int64] | None = None) -> ShardFile:
    """As another process opens them."""
    decoded._verified.clear()
    pixels = DecodedFile(os.open(files[1], os.O_RDWR), SHA256, np.array(SHAPES) if sizes is None else sizes)
    return ShardFile(os.open(files[0], os.O_RDONLY), "s", pixels)


def check(shard: ShardFile, record: int, options: NormalizationOptions = OPTIONS) -> None:
    """Windows of a record are those of its PNG."""
    _, image, labels = decode_record(shard.read(record))
    sample = decoded_sample(shard, record, options)
    height, width = sample.shape
    assert (height, width) == labels.shape
    for rows, columns in (
        (slice(0, height), slice(0, width)),
        (slice(3, 17), slice(5, 18)),
        (slice(height - 9, height), slice(max(width - 700, 0), width)),
    ):
        found, found_labels = sample.read(rows, columns)
        found = found if found.ndim == 3 else np.repeat(found[..., np.newaxis], 3, axis=2)
        assert (found == image[rows, columns]).all()
        assert (found_labels == labels[rows, columns]).all()
    fresh = decoded.sample_of_record(shard.read(record), options)
    assert (sample.table == fresh.table).all()


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by each PNG that is decoded for a sample, and each table that is computed."""
    seen: list[int] = []
    for name in ("_decoded", "_table_of"):
        original = getattr(decoded, name)
        monkeypatch.setattr(decoded, name, lambda *given, original=original: seen.append(1) or original(*given))
    return seen


def test_windows_are_those_of_the_image(files: tuple[Path, Path]) -> None:
    for _ in range(3):  # written, read, and read by another process
        shard = opened(files)
        for record in range(len(SHAPES)):
            check(shard, record)
            check(shard, record)


def test_each_record_is_decoded_once(files: tuple[Path, Path], decodings: list[int]) -> None:
    shard = opened(files)
    for _ in range(2):
        decoded_sample(shard, 2, OPTIONS)
    assert len(decodings) == 2  # its pixels, and its table
    decoded_sample(opened(files), 2, OPTIONS)
    assert len(decodings) == 2
    other = NormalizationOptions(method="percentile")
    for _ in range(2):
        decoded_sample(shard, 2, other)
    assert len(decodings) == 3  # another table alone
    check(opened(files), 2, other)
    check(opened(files), 2)


def test_whole_images_are_decoded_once(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    true = [decode_record(opened(files).read(record)) for record in range(len(SHAPES))]
    seen: list[bytes] = []
    monkeypatch.setattr(decoded, "decode_record", lambda data: seen.append(data) or decode_record(data))
    for _ in range(3):  # written, read, and read by another process
        shard = opened(files)
        for record, (name, image, labels) in enumerate(true):
            for found, wanted in zip(decoded_image(shard, record, name), (image, labels), strict=True):
                assert found.shape == wanted.shape
                assert found.dtype == wanted.dtype
                assert found.flags.writeable
                assert (found == wanted).all()
    assert len(seen) == len(SHAPES)
    plain = ShardFile(os.open(files[0], os.O_RDONLY), "s")  # without a file of decoded records
    assert (decoded_image(plain, 1, "n1")[0] == true[1][1]).all()
    with pytest.raises(IntegrityError, match=r"'other' as record 1 of s.*'n1'"):
        decoded_image(plain, 1, "other")
    decoded_sample(shard, 0, OPTIONS)  # a crop reads what was written for a whole image
    check(shard, 0)


@pytest.mark.parametrize("where", ["pixels", "labels", "entry", "table", "cut off"])
def test_what_is_torn_or_damaged_is_not_used(where: str, files: tuple[Path, Path]) -> None:
    shard = opened(files)
    for record in range(len(SHAPES)):
        decoded_sample(shard, record, OPTIONS)
    file = shard.pixels
    assert file is not None
    start = {"pixels": file._start(2) + 100, "labels": file._start(3) - 100, "entry": file._entry(2)}
    place = start.get(where, file._entry(2) + 40)
    data = bytearray(files[1].read_bytes())
    if where == "cut off":
        data[file._start(2) + 50 : file._start(3)] = bytes(file._start(3) - file._start(2) - 50)
    else:
        data[place : place + 4] = bytes(255 - value for value in data[place : place + 4])
    files[1].write_bytes(data)
    for _ in range(2):  # the second time from what was written anew
        shard = opened(files)
        for record in range(len(SHAPES)):
            check(shard, record)


def test_files_of_other_shards_are_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(IntegrityError, match="another one"):
        DecodedFile(os.open(files[1], os.O_RDWR), "cd" * 32, np.array(SHAPES))
    with pytest.raises(IntegrityError, match="another one"):
        DecodedFile(os.open(files[1], os.O_RDWR), SHA256, np.array(SHAPES[:3]))
    os.truncate(files[1], 500)
    with pytest.raises(IntegrityError, match="another one"):
        opened(files)


def test_a_record_of_another_size_is_an_error(files: tuple[Path, Path]) -> None:
    swapped = np.array([SHAPES[1], SHAPES[0], *SHAPES[2:]])
    with pytest.raises(IntegrityError, match=r"33 x 1300 px, as the manifest .* 40 x 60 px"):
        decoded_sample(opened(files, swapped), 0, OPTIONS)


def test_a_full_disk_is_said_once(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    shard = opened(files)
    monkeypatch.setattr(decoded, "write_at", refuse)
    with caplog.at_level(logging.WARNING):
        for record in range(len(SHAPES)):
            check(shard, record)
    assert len(caplog.records) == 1
    assert "No room on the disk" in caplog.text
