"""The tables of a prediction as files: CSV, to which rows are added whole, and what is made of it: Parquet and AnnData.

On disk the rows are first written as CSV, row by row; a table in another format is made of the whole file at the end.
In a bucket they are in Parquet first.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from nucleus.config.names import FormatName
from nucleus.lazy import anndata, pacsv, pandas, pq
from nucleus.predict.measurement import table_schema
from nucleus.storage.files import atomic_path

__all__ = [
    "IMAGES_TABLE",
    "NUCLEI_TABLE",
    "TABLE_FILES",
    "CsvTable",
    "csv_of_parquet",
    "csv_table",
    "finish_tables",
    "write_anndata",
]

NUCLEI_TABLE = "nuclei.csv"
IMAGES_TABLE = "images.csv"
_PARQUET, _ANNDATA = ".parquet", ".h5ad"
_MADE = {
    "parquet": ("nuclei.parquet", "images.parquet"),
    "h5ad": ("nuclei.h5ad",),
}
"""Tables that are made of CSV files, by their format."""
TABLE_FILES = (NUCLEI_TABLE, IMAGES_TABLE, *(name for names in _MADE.values() for name in names))
"""Names of all tables on disk."""
_SPOOLED = 1 << 20
"""Characters of rows that are kept in memory until they are added."""
_TEXTS = ("image", "plate", "row", "column", "field")
_OBSERVED = (*_TEXTS, "z", "t", "label", "touches_edge")
_CENTROID = ("centroid_x", "centroid_y")


class CsvTable:
    """A CSV file with a header of column names, to which rows are added whole or, if the disk is full, not at all."""

    def __init__(self, file: io.FileIO, columns: Sequence[str], folder: Path) -> None:
        self._file = file
        self._columns = columns
        self._folder = folder
        self._before = 0
        with self._spooled() as header:
            header.writeheader()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        with self._spooled() as rows:
            rows.writerow(row)

    @contextmanager
    def rows(self) -> Iterator[csv.DictWriter[str]]:
        """Provide a writer for the rows of an image: kept on disk, and added if the block ends without error."""
        with self._spooled() as rows:
            yield rows

    def take_back(self) -> None:
        """Remove what was added last."""
        self._file.seek(self._before)
        self._file.truncate()

    @contextmanager
    def _spooled(self) -> Iterator[csv.DictWriter[str]]:
        folder = str(self._folder)
        with tempfile.SpooledTemporaryFile(_SPOOLED, "w+", newline="", encoding="utf-8", dir=folder) as spooled:
            yield csv.DictWriter(spooled, self._columns, restval="", lineterminator="\n")
            spooled.seek(0)
            self._append(spooled)

    def _append(self, text: IO[str]) -> None:
        self._before = self._file.tell()
        try:
            while block := text.read(_SPOOLED):
                rest = memoryview(block.encode())
                while rest:
                    rest = rest[self._file.write(rest) :]
        except OSError:
            self.take_back()
            raise


@contextmanager
def csv_table(path: Path, columns: Sequence[str]) -> Iterator[CsvTable]:
    """Provide a CSV file that appears at `path` if the block ends without error."""
    with atomic_path(path) as beside, io.FileIO(beside, "w") as file:
        yield CsvTable(file, columns, path.parent)


def finish_tables(folder: Path, formats: Sequence[FormatName]) -> None:
    """Make the tables in other formats from `nuclei.csv` and `images.csv`, and remove those of an earlier prediction.

    The CSV files go if Parquet was asked for, and CSV was not.

    Raises:
        OutputError: The folder has no room; the CSV files are still there.
    """
    tables = [folder / NUCLEI_TABLE, folder / IMAGES_TABLE]
    if "parquet" in formats:
        for table in tables:
            _write_parquet(table, table.with_suffix(_PARQUET))
    if "h5ad" in formats:
        write_anndata(tables[0], tables[1], tables[0].with_suffix(_ANNDATA))
    earlier = [folder / name for made, names in _MADE.items() if made not in formats for name in names]
    for path in earlier + (tables if "parquet" in formats and "csv" not in formats else []):
        path.unlink(missing_ok=True)


def _write_parquet(table: Path, path: Path) -> None:
    """Write a CSV table as Parquet, with the types of its columns; block by block."""
    with table.open(newline="", encoding="utf-8") as file:
        schema = table_schema(next(csv.reader(file)))
    options = pacsv.ConvertOptions(
        column_types=schema,
        null_values=[""],
        strings_can_be_null=True,
        true_values=["True"],
        false_values=["False"],
    )
    parsed = pacsv.ParseOptions(newlines_in_values=True)
    with atomic_path(path) as beside, pq.ParquetWriter(beside, schema, compression="zstd") as writer:
        for batch in pacsv.open_csv(table, parse_options=parsed, convert_options=options):
            writer.write_batch(batch)


def csv_of_parquet(table: Path, path: Path) -> None:
    """Write a Parquet table as CSV, as `CsvTable` does; block by block. Raises `OutputError`."""
    stored = pq.ParquetFile(table)
    with csv_table(path, stored.schema_arrow.names) as written:
        for batch in stored.iter_batches():
            with written.rows() as rows:
                rows.writerows(batch.to_pylist())


def write_anndata(nuclei: Path, images: Path, path: Path) -> None:
    """Write the nuclei as AnnData, which scanpy and squidpy open: an observation for each nucleus.

    `X` has the measurements, `obs` the columns that say which nucleus it is, `obsm["spatial"]` the centroids, x and y:
    in micrometres if the size of the pixels of every image with nuclei is known, else in pixels; `uns["spatial_unit"]`
    says which. `var["channel"]` has the names of channels if those of all images are the same.

    Args:
        nuclei: CSV table of the nuclei.
        images: CSV table of their images.
        path: The file to write.

    Raises:
        OutputError: The file cannot be written.
    """
    table, of = _read(nuclei), _read(images)
    measured = [name for name in table.columns if name not in {*_OBSERVED, *_CENTROID}]
    observed = table[[name for name in _OBSERVED if name in table.columns]].copy()
    for name in observed.columns.intersection(_TEXTS):
        known = _objects(sorted(observed[name].dropna().unique()))
        observed[name] = pandas.Categorical(observed[name], categories=known)
    observed.index = _objects([str(number) for number in range(len(observed))])
    found = anndata.AnnData(
        X=table[measured].to_numpy(np.float64, na_value=np.nan),
        obs=observed,
        var=pandas.DataFrame({"channel": _objects(_channels_of(measured, of))}, index=_objects(measured), dtype=object),
    )
    sizes = _pixel_sizes(table, of)
    known = not np.isnan(sizes).any()
    centroids = table[list(_CENTROID)].to_numpy(np.float64)
    found.obsm["spatial"] = centroids * sizes[:, np.newaxis] if known else centroids
    found.uns["spatial_unit"] = "um" if known else "px"
    with atomic_path(path) as beside:
        found.write_h5ad(beside, compression="gzip")


def _objects(texts: Sequence[str]) -> pandas.Index[Any]:
    """Return texts in the form that every version of AnnData writes."""
    return pandas.Index(texts, dtype=object)


def _read(table: Path) -> pandas.DataFrame:
    """Return a CSV table with the types of its columns; whole numbers and texts may be missing."""
    with table.open(newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file))
    texts = dict.fromkeys((*_TEXTS, "warning", "channels"), "object")
    kinds = {**texts, "z": "Int64", "t": "Int64", "label": "int64", "touches_edge": "bool"}
    types = {name: kinds.get(name, "float64") for name in columns}
    return pandas.read_csv(table, dtype=types, keep_default_na=False, na_values=[""])


def _pixel_sizes(nuclei: pandas.DataFrame, images: pandas.DataFrame) -> Any:
    """Return the side of the pixels of each nucleus's image, micrometres; NaN where it is unknown."""
    keys = ["image", "z", "t"]
    joined = nuclei[keys].merge(images[[*keys, "pixel_size_um"]], on=keys, how="left")
    return joined["pixel_size_um"].to_numpy(np.float64)


def _channels_of(measured: Sequence[str], images: pandas.DataFrame) -> list[str]:
    """Return the name of the channel that each measurement is of; empty for others, and where images differ."""
    stated = images["channels"].dropna().unique()
    names = str(stated[0]).split("; ") if len(stated) == 1 and images["channels"].notna().all() else []
    found = []
    for column in measured:
        what, _, number = column.rpartition("_")
        of_channel = what in {"mean", "integrated"} and number.isdecimal() and int(number) < len(names)
        found.append(names[int(number)] if of_channel else "")
    return found
