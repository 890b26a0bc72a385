"""Parquet tables of nuclei: one per image in a bucket, joined at the end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nucleus.lazy import pa, pads, pq
from nucleus.predict.measurement import IMAGE_COLUMNS, nucleus_columns
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import temporary_folder

__all__ = ["ImageTable", "image_table", "write_tables"]

_IMAGE_ROW = "image"
_INTEGERS = {"label", "area", "width", "height", "nuclei"}
_SMALLEST_GROUP, _LARGEST_GROUP = 1 << 16, 1 << 20
_AT_ONCE = 16


class ImageTable:
    """Parquet file of the nuclei of one image; its metadata contains the row of the image itself."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer = writer
        self._schema = schema

    def writerows(self, rows: Iterable[dict[str, Any]], /) -> None:
        """Add rows from `measure_nuclei`."""
        self._writer.write_table(pa.Table.from_pylist(list(rows), schema=self._schema))

    def set_image(self, row: dict[str, Any]) -> None:
        """Store the row of the image, from `image_row`, in the metadata."""
        self._writer.add_key_value_metadata({_IMAGE_ROW: json.dumps(row)})


@contextmanager
def image_table(path: Path, channels: int) -> Iterator[ImageTable]:
    """Provide a new table for an image of `channels` channels; the file is complete when the block ends."""
    schema = _schema(nucleus_columns(channels))
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        yield ImageTable(writer, schema)


def write_tables(bucket: Bucket, keys: Sequence[str], nuclei: Path, images: Path) -> None:
    """Join the tables of images into a table of all nuclei and a table of all images, in the order of the keys.

    The table of nuclei has columns for as many channels as the image with the most channels; they are null for images
    with fewer channels.

    Args:
        bucket: Bucket that contains the tables of the images.
        keys: Keys of these tables.
        nuclei: Parquet file to write, with one row per nucleus.
        images: Parquet file to write, with one row per image.
    """
    with temporary_folder("tables") as temporary:
        paths = [temporary / f"{number:07d}.parquet" for number in range(len(keys))]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(bucket.download, keys, paths))
        found = [pq.read_metadata(path) for path in paths]
        rows = [json.loads(metadata.metadata[_IMAGE_ROW.encode()]) for metadata in found]
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema(IMAGE_COLUMNS)), images, compression="zstd")
        widest = max((metadata.schema.to_arrow_schema() for metadata in found), key=len)
        joined = temporary / "joined"
        pads.write_dataset(
            pads.dataset([str(path) for path in paths], schema=widest.remove_metadata(), format="parquet"),
            joined,
            format="parquet",
            file_options=pads.ParquetFileFormat().make_write_options(compression="zstd"),
            basename_template="{i}.parquet",
            min_rows_per_group=_SMALLEST_GROUP,
            max_rows_per_group=_LARGEST_GROUP,
            preserve_order=True,
        )
        (joined / "0.parquet").rename(nuclei)


def _schema(columns: Sequence[str]) -> pa.Schema:
    return pa.schema([(column, _type(column)) for column in columns])


def _type(column: str) -> pa.DataType:
    if column == "image":
        return pa.string()
    if column == "touches_edge":
        return pa.bool_()
    return pa.int64() if column in _INTEGERS else pa.float64()
