"""OME-Zarr in a bucket: the same pixels, each object read once, and what happens when a read fails."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nucleus.data import zarr_planes
from nucleus.data.zarr_plates import open_zarr
from nucleus.errors import AccessDeniedError, ImageError, StorageError, TransientStorageError
from nucleus.storage.bucket import Bucket
from nucleus.storage.local_server import RunningStore
from nucleus.storage.retries import set_retry_clock, set_storage_timeout
from nucleus.storage.uri import S3Uri
from tests.data.test_zarr_images import filled, part_of, pixels_of
from tests.faults.credentials import without_keys
from tests.faults.proxy import Fault, Proxy, Request, proxied
from tests.faults.test_requests import DrivenClock
from tests.zarr_files import VERSIONS, write_image, write_plate

versions = pytest.mark.parametrize("version", VERSIONS)


def uploaded(folder: Path, bucket: Bucket) -> S3Uri:
    """Copy a Zarr to the bucket."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            bucket.put(f"{folder.name}/{path.relative_to(folder).as_posix()}", path)
    return bucket.uri / folder.name


@pytest.fixture
def line(store: RunningStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy between this process and the store; retries take no time, and an answer may take 20 s."""
    set_retry_clock(DrivenClock())
    set_storage_timeout(60.0)
    with proxied(store.port, stall_seconds=0.05) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy
    set_retry_clock(time)


def failing(part: str, fault: Fault) -> Any:
    """Fail the requests whose path ends in `part`."""
    return lambda request: fault if request.path.split("?")[0].endswith(part) else None


def asked(proxy: Proxy) -> Counter[str]:
    """Number of requests by path and range."""
    return Counter(f"{request.path} {request.headers.get('range', '')}" for request in proxy.log)


@versions
def test_a_plate_in_a_bucket_has_the_pixels_of_the_one_on_disk(tmp_path: Path, bucket: Bucket, version: int) -> None:
    plate = write_plate(tmp_path / "p.zarr", version, absent=["B/3"])
    told: list[str] = []
    found = open_zarr(str(uploaded(plate, bucket)), tell=told.append)
    assert [stack.name for stack in found] == ["p.zarr/A/1/0", "p.zarr/A/1/1"]
    assert ["B/3" in line for line in told] == [True]
    for here, there in zip(open_zarr(plate), found, strict=True):
        assert np.array_equal(filled(here.plane(0, 0)), filled(there.plane(0, 0)))


@versions
def test_each_object_is_requested_once(
    tmp_path: Path, bucket: Bucket, line: Proxy, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two passes of bands, with no decoded pixels kept; the chunk that is not there is asked for once too."""
    monkeypatch.setattr(zarr_planes, "_BLOCK_SIDE", 32)
    monkeypatch.setattr(zarr_planes, "_KEPT_BYTES", 1)
    pixels = pixels_of((100, 90))
    pixels[32:64, 64:] = 0
    folder = write_image(tmp_path / "a.zarr", pixels, version, axes="yx")
    address = uploaded(folder, bucket)
    line.log.clear()
    plane = open_zarr(address)[0].plane(0, 0)
    for _ in range(2):
        bands = [part_of(plane, slice(top, top + 20), slice(0, 90)) for top in range(0, 100, 20)]
        assert np.array_equal(np.concatenate(bands)[..., 0], pixels)
    chunks = {path: number for path, number in asked(line).items() if re.search(r"/0/(c/\d+/\d+|\d+\.\d+) $", path)}
    assert (len(chunks), set(chunks.values())) == (4 * 3, {1})


def test_shards_are_requested_by_ranges(
    tmp_path: Path, bucket: Bucket, line: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = pixels_of((256, 256))
    folder = write_image(tmp_path / "a.zarr", pixels, axes="yx", array={"shards": (256, 256)})
    address = uploaded(folder, bucket)
    line.log.clear()
    monkeypatch.setattr(zarr_planes, "_BLOCK_SIDE", 32)
    plane = open_zarr(address)[0].plane(0, 0)
    assert np.array_equal(part_of(plane, slice(40, 60), slice(0, 40))[..., 0], pixels[40:60, :40])
    ranges = [request.headers["range"] for request in line.log if "range" in request.headers]
    assert len(ranges) == 1 + 2  # the index at the end of the shard, and the two chunks
    assert len(set(ranges)) == len(ranges)


def test_a_server_without_ranges_is_named(bucket: Bucket, store: RunningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("x", b"0123456789")
    assert Bucket(bucket.uri).get("x", "bytes=2-4") == b"234"
    assert Bucket(bucket.uri).get("x", "bytes=-3") == b"789"
    with proxied(store.port, dropped=["range"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with pytest.raises(StorageError, match="Range"):
            Bucket(bucket.uri).get("x", "bytes=2-4")


@versions
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault.DENIED, ImageError),
        (Fault.UNKNOWN_KEY, AccessDeniedError),
        (Fault.ERROR_500, TransientStorageError),
        (Fault.SLOW_DOWN, TransientStorageError),
        (Fault.STALL, TransientStorageError),
    ],
)
def test_a_failed_read_is_an_error_that_names_the_chunk(
    tmp_path: Path, bucket: Bucket, line: Proxy, version: int, fault: Fault, kind: type[Exception]
) -> None:
    """And never the fill value."""
    chunk = "0/c/0/1" if version == 3 else "0/0.1"
    address = uploaded(write_image(tmp_path / "a.zarr", pixels_of((64, 64)), version, axes="yx"), bucket)
    plane = open_zarr(address)[0].plane(0, 0)
    line.decide = failing(chunk, fault)
    with pytest.raises(kind, match=f"a.zarr/{chunk}"):
        filled(plane)
    line.decide = lambda _: None
    assert np.array_equal(filled(plane)[..., 0], pixels_of((64, 64)))


def test_a_read_that_fails_once_is_repeated(tmp_path: Path, bucket: Bucket, line: Proxy) -> None:
    address = uploaded(write_image(tmp_path / "a.zarr", pixels_of((64, 64)), axes="yx"), bucket)
    failed: set[str] = set()

    def once(request: Request) -> Fault | None:
        if request.path in failed:
            return None
        failed.add(request.path)
        return Fault.SLOW_DOWN

    line.decide = once
    assert np.array_equal(filled(open_zarr(address)[0].plane(0, 0))[..., 0], pixels_of((64, 64)))


def test_public_buckets_need_no_keys(
    tmp_path: Path, bucket: Bucket, line: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = uploaded(write_image(tmp_path / "a.zarr", pixels_of((64, 64)), axes="yx"), bucket)
    without_keys(monkeypatch)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(AccessDeniedError, match="--anonymous"):
        open_zarr(address)
    line.log.clear()
    found: NDArray[Any] = filled(open_zarr(address, anonymous=True)[0].plane(0, 0))[..., 0]
    assert np.array_equal(found, pixels_of((64, 64)))
    assert line.log
    assert not [request for request in line.log if "authorization" in request.headers]
