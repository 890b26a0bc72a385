"""Tables of nuclei: CSV for image files; for images in a bucket, Parquet per image, joined into one at the end."""

import csv
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, TextIO

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from nucleus.predict.measurement import IMAGE_COLUMNS, nucleus_columns
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import atomic_path

__all__ = ["CsvTable", "ImageTable", "RowWriter", "csv_table", "image_table", "write_tables"]


_IMAGE_ROW = "image"
_INTEGERS = {"label", "area", "width", "height", "nuclei"}
_SMALLEST_GROUP, _LARGEST_GROUP = 1 << 16, 1 << 20
_AT_ONCE = 16


class ImageTable:
    """A Parquet file of the nuclei of one image; the image's own row is in the file's metadata."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer = writer
        self._schema = schema

    def writerows(self, rows: Iterable[dict[str, Any]], /) -> None:
        """Add rows of `measure_nuclei`."""
        self._writer.write_table(pa.Table.from_pylist(list(rows), schema=self._schema))

    def set_image(self, row: dict[str, Any]) -> None:
        """Store the image's own row, of `image_row`."""
        self._writer.add_key_value_metadata({_IMAGE_ROW: json.dumps(row)})


@contextmanager
def image_table(path: Path, channels: int) -> Iterator[ImageTable]:
    """Provide a new table for an image of `channels` channels, complete when the block ends."""
    schema = _schema(nucleus_columns(channels))
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        yield ImageTable(writer, schema)


def write_tables(bucket: Bucket, keys: Sequence[str], nuclei: Path, images: Path) -> None:
    """Join the tables of images into a table of all nuclei and a table of all images, in the order of the keys.

    The table of nuclei has columns for as many channels as the image with the most channels; they are null for images
    that have fewer.

    Args:
        bucket: The bucket that holds the tables of the images.
        keys: Their keys.
        nuclei: Parquet file to write, a row per nucleus.
        images: Parquet file to write, a row per image.
    """
    with tempfile.TemporaryDirectory(prefix="nucleus-tables-") as temporary:
        paths = [Path(temporary) / f"{number:07d}.parquet" for number in range(len(keys))]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(bucket.download, keys, paths))
        found = [pq.read_metadata(path) for path in paths]
        rows = [json.loads(metadata.metadata[_IMAGE_ROW.encode()]) for metadata in found]
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema(IMAGE_COLUMNS)), images, compression="zstd")
        widest = max((metadata.schema.to_arrow_schema() for metadata in found), key=len)
        joined = Path(temporary) / "joined"
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


class RowWriter(Protocol):
    """A table that takes rows, as `csv.DictWriter` does."""

    def writerows(self, rowdicts: Iterable[dict[str, Any]], /) -> None:
        """Add rows."""


class CsvTable:
    """A CSV file with a header of column names."""

    def __init__(self, file: TextIO, columns: Sequence[str]) -> None:
        self._file = file
        self._columns = columns
        self._writer(file).writeheader()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self._writer(self._file).writerow(row)

    @contextmanager
    def rows(self) -> Iterator["csv.DictWriter[str]"]:
        """Provide a writer for the rows of an image, kept on disk and added if the block ends without error."""
        with tempfile.TemporaryFile("w+", newline="", encoding="utf-8") as spooled:
            yield self._writer(spooled)
            spooled.seek(0)
            shutil.copyfileobj(spooled, self._file)

    def _writer(self, file: IO[str]) -> "csv.DictWriter[str]":
        return csv.DictWriter(file, self._columns, restval="", lineterminator="\n")


@contextmanager
def csv_table(path: Path, columns: Sequence[str]) -> Iterator[CsvTable]:
    """Provide a CSV file that appears under its name if the block ends without error."""
    with atomic_path(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        yield CsvTable(file, columns)
