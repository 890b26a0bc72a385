"""Tables of nuclei as Parquet: one part for each image, and all parts as one table."""

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

__all__ = ["Part", "RowWriter", "new_part", "write_tables"]


_IMAGE_ROW = "image"
_INTEGERS = {"label", "area", "width", "height", "nuclei"}
_SMALLEST_GROUP, _LARGEST_GROUP = 1 << 16, 1 << 20
_AT_ONCE = 16


class Part:
    """The nuclei of one image in a Parquet file, its row of the table of images in the file's metadata."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer = writer
        self._schema = schema

    def writerows(self, rows: Iterable[dict[str, Any]], /) -> None:
        """Add nuclei, as `measure_nuclei` gives them."""
        self._writer.write_table(pa.Table.from_pylist(list(rows), schema=self._schema))

    def set_image(self, row: dict[str, Any]) -> None:
        """Note the image's own row, as `image_row` gives it."""
        self._writer.add_key_value_metadata({_IMAGE_ROW: json.dumps(row)})


@contextmanager
def new_part(path: Path, channels: int) -> Iterator[Part]:
    """A part of an image of so many channels, whole when the block has ended."""
    schema = _schema(nucleus_columns(channels))
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        yield Part(writer, schema)


def write_tables(parts: Bucket, keys: Sequence[str], nuclei: Path, images: Path) -> None:
    """Join parts to a table of nuclei and one of images, in the order of their keys.

    The table of nuclei has columns for as many channels as the image with the most of them; they are null for images
    that have fewer.

    Args:
        parts: Where they lie.
        keys: Which.
        nuclei: Parquet file to be written.
        images: Parquet file to be written.
    """
    with tempfile.TemporaryDirectory(prefix="nucleus-parts-") as temporary:
        paths = [Path(temporary) / f"{number:07d}.parquet" for number in range(len(keys))]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(parts.download, keys, paths))
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
    """Takes rows of a table, as `csv.DictWriter` does."""

    def writerows(self, rowdicts: Iterable[dict[str, Any]], /) -> None:
        """Add rows."""


class CsvTable:
    """A CSV file with a row of column names."""

    def __init__(self, file: TextIO, columns: Sequence[str]) -> None:
        self._file = file
        self._columns = columns
        self._writer(file).writeheader()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self._writer(self._file).writerow(row)

    @contextmanager
    def rows(self) -> Iterator["csv.DictWriter[str]"]:
        """Takes the rows of an image, which are added when the block ends well; memory does not grow with them."""
        with tempfile.TemporaryFile("w+", newline="", encoding="utf-8") as spooled:
            yield self._writer(spooled)
            spooled.seek(0)
            shutil.copyfileobj(spooled, self._file)

    def _writer(self, file: IO[str]) -> "csv.DictWriter[str]":
        return csv.DictWriter(file, self._columns, restval="", lineterminator="\n")


@contextmanager
def csv_table(path: Path, columns: Sequence[str]) -> Iterator[CsvTable]:
    """A CSV file that appears when the block ends well."""
    with atomic_path(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        yield CsvTable(file, columns)
