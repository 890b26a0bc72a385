"""Chunks that unpack to more than their array says, and shapes that no image has: refused before they are decoded."""

import json
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from nucleus.data.zarr_codecs import chunk_packing
from nucleus.data.zarr_plates import open_zarr
from nucleus.errors import ImageError
from tests.data.test_zarr_images import changed_array, filled, part_of, pixels_of, versions
from tests.zarr_files import write_image

BOMB = bytes(1 << 22)
PACKINGS = {
    "blosc": numcodecs.Blosc(),
    "zstd": numcodecs.Zstd(),
    "gzip": numcodecs.GZip(),
    "zlib": numcodecs.Zlib(),
    "bz2": numcodecs.BZ2(),
    "lzma": numcodecs.LZMA(),
    "lz4": numcodecs.LZ4(),
}


def refused(folder: Path) -> str:
    """What is said of the first plane of an image that opens, or of one that does not."""
    with pytest.raises(ImageError) as found:
        filled(open_zarr(folder)[0].plane(0, 0))
    return str(found.value)


@pytest.mark.parametrize("name", PACKINGS)
def test_a_chunk_that_unpacks_to_more_is_not_unpacked(tmp_path: Path, name: str) -> None:
    packing = PACKINGS[name]
    pixels = pixels_of((64, 32))
    folder = write_image(tmp_path / "a.zarr", pixels, 2, axes="yx", array={"compressors": packing})
    assert np.array_equal(filled(open_zarr(folder)[0].plane(0, 0))[..., 0], pixels)
    (folder / "0" / "1.0").write_bytes(packing.encode(BOMB))
    assert "a.zarr/0/1.0" in (told := refused(folder))
    assert "unpacks to" in told


@versions
@pytest.mark.parametrize("packing", [None, "zstd", "blosc"])
@pytest.mark.parametrize("size", [0, 1 << 10, 1 << 12])
def test_a_chunk_of_another_size_is_named(tmp_path: Path, version: int, packing: str | None, size: int) -> None:
    """Of uint16, 32 x 32."""
    newer = {"zstd": zarr.codecs.ZstdCodec(), "blosc": zarr.codecs.BloscCodec(), None: None}
    older = {**PACKINGS, None: None}
    array = {"compressors": (newer if version == 3 else older)[packing]}
    folder = write_image(tmp_path / "a.zarr", pixels_of((32, 32)), version, axes="yx", array=array)
    chunk = "0/c/0/0" if version == 3 else "0/0.0"
    data = bytes(size)
    (folder / chunk).write_bytes(PACKINGS[packing].encode(data) if packing else data)
    assert f"a.zarr/{chunk}" in (told := refused(folder))
    assert f"unpacks to {size:,}" in told


def without_size(data: bytes) -> bytes:
    """A Zstandard frame that does not state its size, as those of streams."""
    assert data[4] >> 6 == 2  # four bytes of size
    single = data[4] >> 5 & 1
    return data[:4] + bytes([data[4] & 0b00011111, 0x68]) + data[(5 if single else 6) + 4 :]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("gzip", numcodecs.GZip().encode(b"small") + numcodecs.GZip().encode(BOMB)),
        ("bz2", numcodecs.BZ2().encode(b"small") + numcodecs.BZ2().encode(BOMB)),
        ("zstd", without_size(numcodecs.Zstd().encode(BOMB))),
    ],
)
def test_what_follows_or_is_not_stated_is_counted(name: str, data: bytes) -> None:
    assert len(PACKINGS[name].decode(data)) >= len(BOMB)
    document = {"dtype": "<u2", "shape": [64, 64], "chunks": [32, 32], "compressor": {"id": name}}
    with pytest.raises(ImageError, match="unpacks to"):
        chunk_packing(document, 2, "a").check(data, None, "a/0.0")


@pytest.mark.parametrize("part", [slice(0, 64), slice(0, 20)])
def test_chunks_in_a_shard_too(tmp_path: Path, part: slice) -> None:
    """Of which all bytes are read at once, or those of a chunk."""
    keys = {"shards": (64, 64), "compressors": {"name": "gzip", "configuration": {"level": 1}}}
    folder = write_image(tmp_path / "a.zarr", pixels_of((64, 64)), 3, axes="yx", array=keys)
    plane = open_zarr(folder)[0].plane(0, 0)
    assert np.array_equal(part_of(plane, part, part)[..., 0], pixels_of((64, 64))[part, part])
    shard = folder / "0" / "c" / "0" / "0"
    data, bomb = shard.read_bytes(), PACKINGS["gzip"].encode(BOMB)
    index = np.frombuffer(data[-68:-4], "<u8").copy()
    index[0], index[1] = len(data) - 68, len(bomb)  # the first chunk
    places = index.tobytes()
    shard.write_bytes(data[:-68] + bomb + bytes(numcodecs.CRC32C(location="end").encode(places)))
    with pytest.raises(ImageError, match=r"a\.zarr/0/c/0/0.*unpacks to"):
        part_of(open_zarr(folder)[0].plane(0, 0), part, part)


@versions
@pytest.mark.parametrize(
    ("shape", "chunk", "word"),
    [
        ([1 << 40, 8], [8, 8], "sides below"),
        ([1 << 30, 1 << 30], [8, 8], "sides below"),
        ([8, 8], [0, 8], "sides of a chunk"),
        ([8, 8], [8], "sides of a chunk"),
        ([8.5, 8], [8, 8], "whole numbers"),
        ([-8, 8], [8, 8], "whole numbers"),
        ("8", [8, 8], "whole numbers"),
    ],
)
def test_shapes_that_no_image_has(tmp_path: Path, version: int, shape: Any, chunk: Any, word: str) -> None:
    folder = write_image(tmp_path / "a.zarr", pixels_of((8, 8)), version, axes="yx")
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    keys = {"shape": shape, **({"chunks": chunk} if version == 2 else {"chunk_grid": grid})}
    assert word in refused(changed_array(folder, version, **keys))


@versions
def test_planes_and_channels_without_end(tmp_path: Path, version: int) -> None:
    folder = write_image(tmp_path / "a.zarr", np.zeros((1, 1, 1, 8, 8), np.uint8), version, chunk=8)
    for shape in ([1, 2000, 1, 8, 8], [2000, 1, 2000, 8, 8]):
        assert "channels" in refused(changed_array(folder, version, shape=shape))


@pytest.mark.parametrize(
    "keys", [{"filters": [{"id": "zlib"}]}, {"compressor": {"id": "lzma", "format": 3, "filters": [{"id": 33}]}}]
)
def test_packings_whose_size_cannot_be_told_are_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = write_image(tmp_path / "a.zarr", pixels_of((8, 8)), 2, axes="yx")
    assert "in the array" in refused(changed_array(folder, 2, **keys))


@pytest.mark.parametrize(
    "codecs",
    [
        [{"name": "bytes"}, {"name": "gzip"}, {"name": "zstd"}],
        [{"name": "bytes"}, {"name": "zstd"}, {"name": "numcodecs.shuffle"}],
        [{"name": "sharding_indexed", "configuration": {}}, {"name": "gzip"}],
    ],
)
def test_they_are_in_zarr_3_too(codecs: list[dict[str, Any]]) -> None:
    grid = {"name": "regular", "configuration": {"chunk_shape": [8, 8]}}
    document = {"shape": [8, 8], "data_type": "uint8", "chunk_grid": grid, "codecs": codecs}
    with pytest.raises(ImageError, match="in the array here"):
        chunk_packing(document, 3, "here")


@versions
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_consolidated_metadata_may_not_contradict(tmp_path: Path, version: int) -> None:
    folder = write_image(tmp_path / "a.zarr", pixels_of((8, 8)), version, axes="yx")
    zarr.consolidate_metadata(str(folder), zarr_format=version)  # type: ignore[arg-type]
    assert filled(open_zarr(folder)[0].plane(0, 0)).shape == (8, 8, 1)
    path = folder / ("zarr.json" if version == 3 else ".zmetadata")
    text = path.read_text()
    document = json.loads(text)
    found = document["consolidated_metadata"]["metadata"] if version == 3 else document["metadata"]
    found["0" if version == 3 else "0/.zarray"]["shape"] = [8, 9]
    path.write_text(json.dumps(document))
    assert "differs in shape" in refused(folder)
    if version == 2:
        path.write_text(text.replace("0.5", "0.7"))
        assert "differs in multiscales" in refused(folder)
