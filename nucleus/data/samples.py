"""The images of a dataset version, as columns: of a million, a worker reads only the columns that it needs.

Up to some ten thousand samples stand in the manifest itself. More stand beside it, a file per column: an array of NumPy
without pickled objects (numpy.org/doc/stable/reference/generated/numpy.lib.format.html), which the light install reads;
Parquet would need pyarrow, 130 MiB for this alone. Their SHA-256 stand in the manifest.
"""

from __future__ import annotations

import hashlib
import io
import json
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, TypeAdapter

from nucleus.config.names import Kind
from nucleus.errors import IntegrityError
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri
from nucleus.text import SPLIT_NAMES

__all__ = [
    "MOST_IN_MANIFEST",
    "SPLITS",
    "ColumnFile",
    "Count",
    "Sample",
    "SampleColumns",
    "SampleList",
    "Samples",
    "Sha256",
    "column_key",
]

MOST_IN_MANIFEST = 10_000
"""Number of samples up to which they stand in the manifest, where older versions of this package read them too."""
SPLITS = tuple(SPLIT_NAMES)
_FOLDER = "samples"
_CHUNK = 10_000

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Column = NDArray[Any]


class Sample(BaseModel):
    """An image with its labels.

    Attributes:
        name: Unique name in the dataset; also the stem of files made from the image.
        split: `train`, `val` or `test`.
        kind: Kind of image.
        group: Number of the group; images of one group are never in different splits.
        height: Height, pixels.
        width: Width, pixels.
        nuclei: Number of labels.
        image_sha256: SHA-256 of the RGB pixels.
        labels_sha256: SHA-256 of the label pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")]
    split: Annotated[str, Field(pattern=rf"^({'|'.join(SPLITS)})$")]
    kind: Kind
    group: Count
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    nuclei: Count
    image_sha256: Sha256
    labels_sha256: Sha256


_NAMES = tuple(Sample.model_fields)
_TEXTS = {"name", "split", "kind"}
_SUMS = {"image_sha256", "labels_sha256"}
_LIST = TypeAdapter(list[Sample])


class ColumnFile(BaseModel):
    """A column of the samples, in a file of its own.

    Attributes:
        size: Size of the file, bytes.
        sha256: SHA-256 of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Count
    sha256: Sha256


class SampleColumns(BaseModel):
    """The columns of samples that do not stand in the manifest.

    Attributes:
        rows: Number of samples.
        files: The file of each column, `samples/<column>.npy`, by the name of the column.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Count
    files: dict[str, ColumnFile]


class Samples(Sequence[Sample]):
    """Samples in columns, in the order of their import. An element is a `Sample`; a slice is `Samples` again.

    Args:
        columns: The columns by name, arrays of one length: texts as ASCII, sums as 32 bytes (N x 32, uint8), the others
            as int64.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self._columns = columns

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Samples:
        """Return samples in columns."""
        if isinstance(samples, Samples):
            return samples
        return cls({name: _column(name, [getattr(sample, name) for sample in samples]) for name in _NAMES})

    @classmethod
    def stored(cls, version: S3Uri, columns: SampleColumns) -> Samples:
        """Return samples whose columns are read from a bucket when they are needed.

        Args:
            version: Folder of the version.
            columns: Its columns.
        """
        return cls(_StoredColumns(version, columns))

    def column(self, name: str) -> Column:
        """Return a column.

        Raises:
            IntegrityError: Its file in the bucket is not the one that the manifest names.
            StorageError: The bucket cannot be read.
        """
        return self._columns[name]

    def texts(self, name: str) -> list[str]:
        """Return a column of texts: `name`, `split` or `kind`."""
        return [text.decode() for text in self.column(name).tolist()]

    @property
    def nuclei(self) -> int:
        """Number of nuclei of all samples."""
        return int(self.column("nuclei").sum(dtype=np.int64))

    @property
    def kinds(self) -> dict[Kind, int]:
        """Number of samples of each kind."""
        counts = Counter(self.texts("kind"))
        return {kind: counts[kind] for kind in Kind}

    def where(self, name: str, value: str) -> Samples:
        """Return the samples with a text in a column."""
        return Samples(_Chosen(self._columns, np.flatnonzero(self.column(name) == value.encode())))

    def __len__(self) -> int:
        """Return the number of samples."""
        if isinstance(self._columns, _StoredColumns | _Chosen):
            return self._columns.rows
        return len(self._columns["split"])

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> Samples: ...
    def __getitem__(self, place: int | slice) -> Sample | Samples:
        """Return a sample, or the samples of a slice."""
        if isinstance(place, slice):
            return Samples(_Chosen(self._columns, np.arange(len(self))[place]))
        at = range(len(self))[operator.index(place)]
        return next(self._built(slice(at, at + 1)))

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples."""
        for start in range(0, len(self), _CHUNK):
            yield from self._built(slice(start, start + _CHUNK))

    def _built(self, part: slice) -> Iterator[Sample]:
        values = [_values(name, self.column(name)[part]) for name in _NAMES]
        for row in zip(*values, strict=True):
            yield Sample.model_construct(**dict(zip(_NAMES, row, strict=True)))

    def __eq__(self, other: object) -> bool:
        """Return whether other samples are the same, in the same order."""
        if not isinstance(other, Samples):
            return isinstance(other, Sequence) and list(self) == list(other)
        return len(self) == len(other) and all(np.array_equal(self.column(n), other.column(n)) for n in _NAMES)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Samples: {len(self)} images>"

    def json(self) -> Iterator[str]:
        """Yield samples as the elements of a list in JSON, many at a time, with sorted keys and without spaces."""
        names = sorted(_NAMES)
        for start in range(0, len(self), _CHUNK):
            rows = zip(*(_values(name, self.column(name)[start : start + _CHUNK]) for name in names), strict=True)
            yield json.dumps([dict(zip(names, row, strict=True)) for row in rows], separators=(",", ":"))[1:-1]

    def files(self) -> dict[str, bytes]:
        """Return the content of the file of each column, by the name of the column."""
        found = {}
        for name in _NAMES:
            file = io.BytesIO()
            np.lib.format.write_array(file, np.ascontiguousarray(self.column(name)), allow_pickle=False)
            found[name] = file.getvalue()
        return found


def column_key(name: str) -> str:
    """Return the key of a column below the folder of its version."""
    return f"{_FOLDER}/{name}.npy"


def _validated(value: object) -> Samples:
    return value if isinstance(value, Samples) else Samples.of(_LIST.validate_python(value))


def _listed(samples: Samples) -> list[dict[str, Any]]:
    return [sample.model_dump(mode="json") for sample in samples]


SampleList = Annotated[Samples, PlainValidator(_validated), PlainSerializer(_listed)]
"""Samples in a document of pydantic, where they are a list of `Sample`."""


def _column(name: str, values: list[Any]) -> Column:
    if name in _SUMS:
        return np.frombuffer(bytes.fromhex("".join(values)), np.uint8).reshape(-1, 32)
    if name in _TEXTS:
        return np.array([str(value).encode() for value in values], dtype=None if values else "S1")
    return np.array(values, np.int64)


def _values(name: str, column: Column) -> list[Any]:
    """Return the values of a column as they are in a `Sample`."""
    if name in _SUMS:
        return [row.tobytes().hex() for row in column]
    if name not in _TEXTS:
        return list(column.tolist())
    texts = [text.decode() for text in column.tolist()]
    return [Kind(text) for text in texts] if name == "kind" else texts


class _Chosen(Mapping[str, Column]):
    """The columns of some of the samples, which are taken when they are needed."""

    def __init__(self, columns: Mapping[str, Column], places: NDArray[np.int64]) -> None:
        self._columns, self._places = columns, places

    @property
    def rows(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> Column:
        return self._columns[name][self._places]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


class _StoredColumns(Mapping[str, Column]):
    """The columns of a version in a bucket, each read and checked when it is first needed."""

    def __init__(self, version: S3Uri, columns: SampleColumns) -> None:
        self._version, self._description = version, columns
        self._read: dict[str, Column] = {}

    @property
    def rows(self) -> int:
        return self._description.rows

    def __getitem__(self, name: str) -> Column:
        if name not in self._read:
            self._read[name] = self._checked(name)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read: a worker reads what it needs itself."""
        return {**self.__dict__, "_read": {}}

    def _checked(self, name: str) -> Column:
        key, expected = column_key(name), self._description.files.get(name)
        data = Bucket(self._version).get(key) if expected else b""
        if expected is None or hashlib.sha256(data).hexdigest() != expected.sha256:
            raise IntegrityError(
                f"Expected the column {name} of the samples at {self._version / key}, as its manifest names it; found "
                "another one. It was damaged or replaced: import the images again, or use another version."
            )
        return _array(data, self.rows, f"{self._version / key}")


def _array(data: bytes, rows: int, where: str) -> Column:
    """Return the array in a file. Nothing in it may run code."""
    try:
        array: Column = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise IntegrityError(f"Expected an array of NumPy at {where}; it is damaged: {error}.") from error
    if len(array) != rows:
        raise IntegrityError(f"Expected {rows} samples at {where}; found {len(array)}. Import the images again.")
    return array
