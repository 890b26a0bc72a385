"""The manifest of a dataset version: what it holds, and the sum of every file."""

import hashlib
import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from nucleus.data.kinds import Kind
from nucleus.errors import DataError
from nucleus.storage.documents import read_document

__all__ = [
    "DATASET_FORMAT",
    "SPLITS",
    "DatasetManifest",
    "LeftOut",
    "Sample",
    "Shard",
    "content_version",
    "read_manifest",
]

DATASET_FORMAT = 1

SPLITS = ("train", "val", "test")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sample(_Frozen):
    """One image with its labels.

    Attributes:
        name: Unique in the dataset; also the stem of files made from it.
        split: `train`, `val` or `test`.
        kind: Kind of image.
        group: Images of one group are never in different splits.
        height: Pixels.
        width: Pixels.
        nuclei: How many labels it has.
        image_sha256: Of the RGB pixels.
        labels_sha256: Of the label pixels.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")]
    split: Annotated[str, Field(pattern=r"^(train|val|test)$")]
    kind: Kind
    group: Count
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    nuclei: Count
    image_sha256: Sha256
    labels_sha256: Sha256


class Shard(_Frozen):
    """One TFRecord file. Record i of shard s is image i * S + s of the split's S shards (see `sampling`)."""

    file: Annotated[str, Field(pattern=r"^(train|val|test)-\d{5}-of-\d{5}\.tfrecord$")]
    split: Annotated[str, Field(pattern=r"^(train|val|test)$")]
    records: Annotated[int, Field(ge=1)]
    size: Annotated[int, Field(ge=1)]
    sha256: Sha256


class LeftOut(_Frozen):
    """An image of the source that is not in the dataset, and why."""

    title: str
    reason: str


class DatasetManifest(_Frozen):
    """All there is to know of a dataset version without opening a shard."""

    format: int
    name: str
    version: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    created: str
    source: str
    layout: str
    seed: int
    samples: list[Sample]
    shards: list[Shard]
    duplicates: list[LeftOut]
    left_out: list[LeftOut]

    def split_samples(self, split: str) -> list[Sample]:
        """The samples of a split."""
        return [sample for sample in self.samples if sample.split == split]

    def split_shards(self, split: str) -> list[Shard]:
        """The shards of a split, in the order of their numbers."""
        return sorted((shard for shard in self.shards if shard.split == split), key=lambda shard: shard.file)


def content_version(samples: list[Sample], shards: list[Shard]) -> str:
    """The version that a dataset's content gives: 12 hexadecimal digits of a SHA-256.

    It depends on what the samples say (pixels, labels, names, splits, kinds, groups) and on the number of shards;
    not on the moment of the import, nor on the seed where it leads to the same splits.
    """
    content = {
        "format": DATASET_FORMAT,
        "shards": {split: sum(shard.split == split for shard in shards) for split in SPLITS},
        "samples": [sample.model_dump(mode="json") for sample in samples],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_manifest(data: bytes, where: str) -> DatasetManifest:
    """Parse and check a manifest. Raises `DataError` if it is damaged or newer than this package."""
    return read_document(
        DatasetManifest, data, what="a dataset manifest", where=where, newest=DATASET_FORMAT, error=DataError
    )
