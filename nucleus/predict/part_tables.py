"""Tables of images in a bucket: that of each part, and those of all, in Parquet.

A part's table has the rows of its nuclei; its metadata has the rows of the images, and which objects it is of. The
tables of all images are made of those of the parts, in the order of the keys: `nuclei.parquet` and `images.parquet`, or
for more than 10,000 objects datasets of such tables, `nuclei/part-00000.parquet` and so on, each made by itself. All of
a dataset have the same columns. While they are written there is no `_SUCCESS` in their folder.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from nucleus.config.names import FormatName
from nucleus.data.images import encode_png
from nucleus.lazy import pa, pads, pq
from nucleus.predict.bucket_images import BucketImage, PredictionSettings
from nucleus.predict.formats import TABLE_FORMATS
from nucleus.predict.image_parts import PartName
from nucleus.predict.measurement import image_columns, nucleus_columns, table_schema
from nucleus.predict.plates import PLATE_ENDING, PlateSums, Wells, add_to_plates, draw_plate, means_of_plates
from nucleus.predict.table_files import csv_of_parquet, write_anndata
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import temporary_folder
from nucleus.storage.uri import parse_uri

__all__ = [
    "IMAGES_OF_A_TABLE",
    "ImageRows",
    "ObjectRows",
    "TableShare",
    "clear_tables",
    "finish_dataset",
    "join_share",
    "read_part",
    "table_shares",
    "write_part",
    "write_plates",
]

IMAGES_OF_A_TABLE = 10_000
"""Objects of one table of all images, about; of more, there are several tables."""
_NUCLEI, _IMAGES = "nuclei", "images"
_SUCCESS = "_SUCCESS"
_TABLE = re.compile(r"(nuclei|images)(/part-[0-9]{5,})?\.(parquet|csv|h5ad)|(nuclei|images)/_SUCCESS")
_OBJECTS = "objects"
_ROWS_IN_MEMORY = 20_000
_SMALLEST_GROUP, _LARGEST_GROUP = 1 << 16, 1 << 20
_AT_ONCE = 16


class ImageRows:
    """The rows of one image: in memory, or in a file if they are many.

    Args:
        path: The file.
        channels: Number of channels that the columns are for.
        plate: Whether the image is of a plate.
        cells: Whether nuclei have cells around them.

    Attributes:
        num_rows: Number of rows.
    """

    def __init__(self, path: Path, channels: int, *, plate: bool, cells: bool) -> None:
        self._path = path
        self._columns = nucleus_columns(channels, plate=plate, cells=cells)
        self._rows: list[dict[str, Any]] = []
        self.num_rows = 0
        self._writer: pq.ParquetWriter | None = None

    def writerows(self, rows: Iterable[dict[str, Any]], /) -> None:
        """Add rows from `nucleus.predict.measure_nuclei`."""
        before = len(self._rows)
        self._rows.extend(rows)
        self.num_rows += len(self._rows) - before
        if len(self._rows) > _ROWS_IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        schema = table_schema(self._columns)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, schema, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=schema))
        self._rows = []

    @property
    def in_memory(self) -> list[dict[str, Any]] | None:
        """The rows; None if they are in a file."""
        return self._rows if self._writer is None and not self._path.exists() else None

    def tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """Yield the rows, with the columns of a schema that has at least those of the image."""
        if self._writer is not None:
            self._spill()
            self._writer.close()
            self._writer = None
        if self._path.exists():
            stored = pq.ParquetFile(self._path)
            yield from (_widened(pa.Table.from_batches([batch]), schema) for batch in stored.iter_batches())
        if self._rows:
            yield pa.Table.from_pylist(self._rows, schema=schema)


@dataclass
class ObjectRows:
    """What a part's table has of an object.

    Attributes:
        image: The object.
        whole: Whether all images of the object were predicted.
        channels: Number of channels that the columns are for.
        plate: Whether its images are of a plate.
        images: Row of each image, in order.
        nuclei: Rows of the nuclei of each image, or of all, in order.
    """

    image: BucketImage
    whole: bool = True
    channels: int = 1
    plate: bool = False
    images: list[dict[str, Any]] = field(default_factory=list)
    nuclei: list[ImageRows | pa.Table] = field(default_factory=list)


def write_part(path: Path, objects: Sequence[ObjectRows], *, cells: bool) -> None:
    """Write the table of a part.

    Args:
        path: The file to write.
        objects: The objects with rows, sorted by key.
        cells: Whether nuclei have cells around them.
    """
    channels, plate = max(each.channels for each in objects), any(each.plate for each in objects)
    schema = table_schema(nucleus_columns(channels, plate=plate, cells=cells))
    about = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        waiting: list[pa.Table] = []
        for table in _tables_of((found for each in objects for found in each.nuclei), schema):
            waiting.append(table)
            if sum(table.num_rows for table in waiting) > _ROWS_IN_MEMORY:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        for each in objects:
            rows, image = sum(found.num_rows for found in each.nuclei), each.image
            facts = {"key": image.key, "etag": image.etag, "size": image.size, "whole": each.whole, "nuclei": rows}
            about.append({**facts, "channels": each.channels, "plate": each.plate, "images": each.images})
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
        writer.add_key_value_metadata({_OBJECTS: json.dumps(about)})


def _tables_of(nuclei: Iterable[ImageRows | pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the rows of images with the columns of a schema; those of many images with few at once, which is faster."""
    rows: list[dict[str, Any]] = []
    for each in nuclei:
        few = each.in_memory if isinstance(each, ImageRows) else None
        if few is not None and len(rows) + len(few) <= _ROWS_IN_MEMORY:
            rows += few
            continue
        if rows:
            yield pa.Table.from_pylist(rows, schema=schema)
            rows = []
        yield from each.tables(schema) if isinstance(each, ImageRows) else [_widened(each, schema)]
    if rows:
        yield pa.Table.from_pylist(rows, schema=schema)


def _widened(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with the columns of a schema; those that it lacks are null."""
    there = set(table.schema.names)
    return pa.table(
        [table[each.name] if each.name in there else pa.nulls(table.num_rows, each.type) for each in schema],
        schema=schema,
    )


def read_part(data: bytes) -> list[ObjectRows]:
    """Return what the table of a part has, by its bytes."""
    stored = pq.ParquetFile(io.BytesIO(data))
    table, first, found = stored.read(), 0, []
    for each in _objects_of(stored.metadata):
        image = BucketImage(each["key"], each["etag"], each["size"])
        rows = [table.slice(first, each["nuclei"])]
        found.append(ObjectRows(image, each["whole"], each["channels"], each["plate"], each["images"], [*rows]))
        first += each["nuclei"]
    return found


def _objects_of(metadata: pq.FileMetaData) -> list[dict[str, Any]]:
    return list(json.loads(metadata.metadata[_OBJECTS.encode()]))


@dataclass(frozen=True)
class TableShare:
    """The parts of one table of nuclei, and one of images.

    Attributes:
        number: Number of the table in its dataset, from 0; None for the only one.
        names: Tables of its parts, in order.
        channels: Number of channels that the columns are for, the same in each table of a dataset.
        plate: Whether some images are of plates, in any table.
    """

    number: int | None
    names: tuple[str, ...]
    channels: int
    plate: bool

    def file(self, table: str, ending: str) -> str:
        """Return the name of a table below the output."""
        return f"{table}{ending}" if self.number is None else f"{table}/part-{self.number:05d}{ending}"


def table_shares(parts: Sequence[tuple[PartName, int]]) -> list[TableShare]:
    """Divide parts, with the number of objects of each and in order, into the tables that are made of them."""
    shares: list[list[str]] = []
    filled = 0
    for name, images in parts:
        if not shares or filled >= IMAGES_OF_A_TABLE:
            shares.append([])
            filled = 0
        shares[-1].append(str(name))
        filled += images
    channels, plate = max((name.channels for name, _ in parts), default=1), any(name.plate for name, _ in parts)
    several = len(shares) > 1
    return [
        TableShare(number if several else None, tuple(names), channels, plate) for number, names in enumerate(shares)
    ]


def join_share(settings: PredictionSettings, share: TableShare) -> PlateSums:
    """Write one table of nuclei and one of images, of the parts of a share, in the formats of tables.

    Returns:
        The nuclei and images of each well of each plate among them.

    Raises:
        StorageError: The bucket cannot be read or written.
        OutputError: The folder for temporary files has no room.
    """
    out = Bucket(parse_uri(settings.out))
    with temporary_folder("tables") as temporary:
        paths = [temporary / f"{number:07d}.parquet" for number in range(len(share.names))]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(out.download, [f"{settings.tables}/{name}" for name in share.names], paths))
        objects = [each for path in paths for each in _objects_of(pq.read_metadata(path))]
        rows = [row for each in objects for row in each["images"]]
        nuclei, images = temporary / f"{_NUCLEI}.parquet", temporary / f"{_IMAGES}.parquet"
        schema = table_schema(image_columns(plate=share.plate))
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), images, compression="zstd")
        columns = nucleus_columns(share.channels, plate=share.plate, cells=settings.expand is not None)
        _join(paths, table_schema(columns), nuclei)
        for path in [nuclei, images, *_other_tables((nuclei, images), settings.formats)]:
            out.put(share.file(path.stem, path.suffix), path)
    plates: PlateSums = {}
    add_to_plates(plates, ((row["image"], row["nuclei"]) for row in rows))
    return plates


def _join(tables: Sequence[Path], schema: pa.Schema, joined: Path) -> None:
    """Join tables of parts; columns that some lack are null there."""
    folder = joined.with_name("joined")
    pads.write_dataset(
        pads.dataset([str(path) for path in tables], schema=schema, format="parquet"),
        folder,
        format="parquet",
        file_options=pads.ParquetFileFormat().make_write_options(compression="zstd"),
        basename_template="{i}.parquet",
        min_rows_per_group=_SMALLEST_GROUP,
        max_rows_per_group=_LARGEST_GROUP,
        preserve_order=True,
    )
    (folder / "0.parquet").rename(joined)


def _other_tables(tables: Sequence[Path], formats: Sequence[FormatName]) -> list[Path]:
    """Make the tables of nuclei and of images in other formats than Parquet, beside them."""
    nuclei, images = (table.with_suffix(".csv") for table in tables)
    if {"csv", "h5ad"} & set(formats):
        for table, path in zip(tables, (nuclei, images), strict=True):
            csv_of_parquet(table, path)
    if "h5ad" in formats:
        write_anndata(nuclei, images, nuclei.with_suffix(".h5ad"))
    return [nuclei, images] * ("csv" in formats) + [nuclei.with_suffix(".h5ad")] * ("h5ad" in formats)


def clear_tables(settings: PredictionSettings, shares: Sequence[TableShare]) -> None:
    """Remove the tables of all images that would be left of an earlier prediction, beside the new ones.

    Raises `AccessDeniedError` if they cannot be removed: nobody could tell the old from the new.
    """
    out = Bucket(parse_uri(settings.out))
    endings = [f".{name}" for name in ("parquet", *TABLE_FORMATS & set(settings.formats))]
    new = {share.file(table, ending) for share in shares for table in (_NUCLEI, _IMAGES) for ending in endings}
    for table in (_NUCLEI, _IMAGES):
        for item in [*out.objects(f"{table}/{_SUCCESS}"), *out.objects(f"{table}."), *out.objects(f"{table}/part-")]:
            if _TABLE.fullmatch(item.key) and item.key not in new:
                out.delete(item.key)


def finish_dataset(settings: PredictionSettings) -> None:
    """Say that all tables of the datasets are there."""
    for table in (_NUCLEI, _IMAGES):
        Bucket(parse_uri(settings.out)).put(f"{table}/{_SUCCESS}", b"")


def write_plates(settings: PredictionSettings, sums: PlateSums) -> dict[str, Wells]:
    """Write the picture of each plate; return the mean number of nuclei per image of each of its wells."""
    plates = means_of_plates(sums)
    for plate, wells in plates.items():
        picture = encode_png(draw_plate(PurePosixPath(plate).name, wells))
        Bucket(parse_uri(settings.out)).put(f"{plate}{PLATE_ENDING}", picture)
    return plates
