"""Parts of the images below a prefix: what a worker predicts at a time, and what one table says that it is done.

Parts are cut from the sorted stream of images by the keys alone: a part ends after a key whose hash is divisible by 8,
and an image of 4 MiB or more is one by itself. So a part has 8 images in the mean, and an image that is added, removed
or changed changes no other part; only where it ends a part itself, its neighbours are regrouped (and predicted again,
32 images at most).

The table of a part is called `<place>-<content>-<channels>[-plate][-in-part].parquet`: `place` is a hash of the key
that ended the part before, `content` one of the keys and ETags of its images. So one listing tells which parts are
done, and of one that has changed, which table has its former images; nobody keeps their names. `in-part` means that
some of its images could not be read: they are tried again.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nucleus.predict.bucket_images import BucketImage, PredictionSettings
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import parse_uri

__all__ = ["IMAGES_OF_A_PART", "ImagePart", "PartName", "done_parts", "parts_of_listing"]

IMAGES_OF_A_PART = 8
"""Images of a part in the mean."""
_MOST_IMAGES = 32
_ALONE_BYTES = 4 << 20
_DIGITS = 12
_NAME = re.compile(r"([0-9a-f]{12})-([0-9a-f]{12})-([0-9]+)(-plate)?(-in-part)?\.parquet")


@dataclass(frozen=True, slots=True)
class PartName:
    """The name of a part's table.

    Attributes:
        place: 12 hexadecimal digits, by which a part is found again after its images changed.
        content: 12 hexadecimal digits of the keys and ETags of its images.
        channels: Number of channels of the image with the most, which says how many columns the table has.
        plate: Whether there are images of plates.
        whole: Whether all images of the part were predicted.
    """

    place: str
    content: str
    channels: int
    plate: bool = False
    whole: bool = True

    @classmethod
    def parsed(cls, name: str) -> "PartName | None":
        """Return what a name says; None if it is none of a part's table."""
        found = _NAME.fullmatch(name)
        return found and cls(found[1], found[2], int(found[3]), bool(found[4]), not found[5])

    def __str__(self) -> str:
        plate, some = "-plate" if self.plate else "", "" if self.whole else "-in-part"
        return f"{self.place}-{self.content}-{self.channels}{plate}{some}.parquet"


@dataclass(frozen=True)
class ImagePart:
    """A part of the images.

    Attributes:
        place: See `PartName`.
        images: The images, sorted by key.
        earlier: Tables of this place that are stored, of the same images or of others.
    """

    place: str
    images: tuple[BucketImage, ...]
    earlier: tuple[PartName, ...] = ()

    @property
    def content(self) -> str:
        """See `PartName`."""
        return _digits("".join(f"{image.key}\n{image.etag}\n" for image in self.images))

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return sum(image.size for image in self.images)

    @property
    def done(self) -> PartName | None:
        """The table that has all of these images; None if there is none."""
        content = self.content
        return next((name for name in self.earlier if name.whole and name.content == content), None)


def parts_of_listing(listing: Iterable[BucketImage]) -> Iterator[ImagePart]:
    """Cut a sorted listing into parts, while it is read. Raises the errors of the listing."""
    images: list[BucketImage] = []
    before = ""
    for image in listing:
        if image.size >= _ALONE_BYTES:
            if images:
                yield ImagePart(_digits(f"after {before}"), tuple(images))
            yield ImagePart(_digits(f"at {image.key}"), (image,))
            images, before = [], image.key
            continue
        images.append(image)
        if int(_digits(image.key), 16) % IMAGES_OF_A_PART == 0 or len(images) == _MOST_IMAGES:
            yield ImagePart(_digits(f"after {before}"), tuple(images))
            images, before = [], image.key
    if images:
        yield ImagePart(_digits(f"after {before}"), tuple(images))


def done_parts(settings: PredictionSettings) -> dict[str, tuple[PartName, ...]]:
    """Return the tables of parts that are stored for these settings, by place: a few bytes for each."""
    found: dict[str, tuple[PartName, ...]] = {}
    for item in Bucket(parse_uri(settings.out)).objects(f"{settings.tables}/"):
        name = PartName.parsed(item.key.removeprefix(f"{settings.tables}/"))
        if name is not None:
            found[name.place] = (*found.get(name.place, ()), name)
    return found


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
