"""Pictures of the report: their selection, captions and encoding."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2

from nucleus.data.images import RgbImage, decode_image
from nucleus.pictures import resize_to_side
from nucleus.report.drawing import thinned
from nucleus.runs.record import ExampleImage, RunRecord, TestImage, WatchedImage
from nucleus.text import KINDS, plural, score_text

__all__ = [
    "LONGEST_SIDE",
    "Caption",
    "EncodedPicture",
    "PictureFolder",
    "PictureGroup",
    "embedded",
    "example_groups",
    "mistakes_in_words",
    "tested_groups",
    "watched_groups",
]

LONGEST_SIDE = 384
"""Pixels; the workers draw no larger pictures."""
_QUALITY = 75
_MOST_EXAMPLES = 6
_MOST_WATCHED = 6
_MOST_EPOCHS = 5
_MOST_OF_GROUP = 12


@dataclass(frozen=True)
class EncodedPicture:
    """A picture embedded in the page.

    Attributes:
        uri: `data:image/jpeg;base64,...`.
        width: Width, px.
        height: Height, px.
    """

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class PictureFolder:
    """The PNG pictures of a run; the key of a picture is its path below the folder, without suffix."""

    folder: Path

    def read(self, key: str) -> RgbImage | None:
        """Return a picture, H x W x 3; None if it is missing, damaged or outside the folder."""
        try:
            path = (self.folder / f"{key}.png").resolve()
            if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
                return None
            return decode_image(path.read_bytes(), key)
        except (OSError, ValueError):  # not an image (`ImageError`), or not a possible file name
            return None


def embedded(folder: PictureFolder, keys: Iterable[str], most_bytes: int) -> dict[str, EncodedPicture | None]:
    """Encode pictures in the order of their keys, up to `most_bytes` in all.

    Returns:
        Pictures by key: None for those that do not fit, no entry for those that cannot be read.
    """
    encoded: dict[str, EncodedPicture | None] = {}
    room = most_bytes
    for key in keys:
        picture = folder.read(key)
        if picture is None:
            continue
        found = _jpeg(picture) if room > 0 else None
        room -= len(found.uri) if found else 0
        encoded[key] = found if room >= 0 else None
    return encoded


def _jpeg(picture: RgbImage) -> EncodedPicture:
    picture = resize_to_side(picture, LONGEST_SIDE)
    # 4:4:4, because outlines of one pixel would lose their colours at half the colour resolution.
    options = [
        cv2.IMWRITE_JPEG_QUALITY, _QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]  # fmt: skip
    _, data = cv2.imencode(".jpg", picture[..., ::-1], options)
    text = base64.b64encode(data.tobytes()).decode()
    return EncodedPicture(f"data:image/jpeg;base64,{text}", picture.shape[1], picture.shape[0])


@dataclass(frozen=True)
class Caption:
    """The caption of a picture.

    Attributes:
        key: Path of the picture below `pictures/`, without suffix.
        text: A few words below the picture.
        alt: Alternative text, for screen readers.
    """

    key: str
    text: str
    alt: str


@dataclass(frozen=True)
class PictureGroup:
    """The pictures of one image.

    Attributes:
        title: Name of the image.
        note: One line about the image.
        pictures: Captions of the pictures.
    """

    title: str
    note: str
    pictures: list[Caption]

    @property
    def key(self) -> str:
        """The key of the picture without outlines, which is the first."""
        return self.pictures[0].key


def example_groups(record: RunRecord) -> list[PictureGroup]:
    """Return training images with their labels, before and after augmentation."""
    return [_example(image) for image in record.examples[:_MOST_EXAMPLES]]


def watched_groups(record: RunRecord) -> list[PictureGroup]:
    """Return validation images with predictions from before training to the best weights."""
    return [_watched(image, record.best_epoch) for image in record.watched[:_MOST_WATCHED]]


def tested_groups(record: RunRecord, group: str) -> list[PictureGroup]:
    """Return the `best` or `worst` images of the test split; images without mistakes are left out of the worst."""
    images = [image for image in record.test_images if image.group == group]
    if group == "worst":
        images = [image for image in images if any(_mistakes(image).values())]
    return [_tested(place, image) for place, image in enumerate(images[:_MOST_OF_GROUP], start=1)]


def mistakes_in_words(image: TestImage) -> str:
    """Return the mistakes of a prediction as text, such as `3 missed, 2 merged`."""
    return ", ".join(f"{number} {name}" for name, number in _mistakes(image).items() if number) or "no mistakes"


def _mistakes(image: TestImage) -> dict[str, int]:
    return {"missed": image.missed, "extra": image.extra, "merged": image.merged, "split": image.split}


def _example(image: ExampleImage) -> PictureGroup:
    what = f"training image {image.name}, {KINDS[image.kind]}"
    shown = (
        ("image", "image", f"The {what}."),
        ("labels", "its nuclei", f"The {what}, with each of its labelled nuclei outlined."),
        ("augmented", "augmented", f"A crop of the {what}, changed at random as in training."),
        ("augmented-labels", "augmented, its nuclei", f"The changed crop of the {what}, with its nuclei outlined."),
    )
    pictures = [Caption(f"examples/{image.name}/{file}", text, alt) for file, text, alt in shown]
    return PictureGroup(image.name, KINDS[image.kind], pictures)


def _watched(image: WatchedImage, best: int) -> PictureGroup:
    folder, what = f"watched/{image.name}", f"validation image {image.name}"
    pictures = [
        Caption(f"{folder}/image", "image", f"The {what}."),
        Caption(f"{folder}/truth", "truth", f"The {what}, with its true nuclei outlined."),
    ]
    for epoch in thinned(sorted(image.epochs), _MOST_EPOCHS):
        when = "before training" if epoch == 0 else f"after {plural(epoch, 'epoch')}"
        alt = f"The {what}, with outlines of the nuclei that the network finds {when}."
        pictures.append(Caption(f"{folder}/epoch-{epoch:05d}", when, alt))
    alt = f"The {what}, with outlines of the nuclei that the network finds with the best weights (epoch {best})."
    pictures.append(Caption(f"{folder}/best", f"best (epoch {best})", alt))
    return PictureGroup(image.name, KINDS[image.kind], pictures)


def _tested(place: int, image: TestImage) -> PictureGroup:
    mistakes = mistakes_in_words(image)
    what = f"test image {image.name}, {KINDS[image.kind]}"
    counts = f"{plural(image.nuclei, 'nucleus', 'nuclei')}, {image.predicted} predicted"
    ap, ap_50 = (score_text(image.scores.get(key), digits=2) for key in ("map", "ap_50"))
    pictures = [
        Caption(f"test/{image.name}/image", "image", f"The {what}."),
        Caption(f"test/{image.name}/truth", "truth", f"The {what}, with its true nuclei outlined."),
        Caption(
            f"test/{image.name}/mistakes",
            "prediction",
            f"The {what}, with its nuclei outlined in a colour per result: {counts}, {mistakes}; mAP {ap}.",
        ),
    ]
    note = f"{KINDS[image.kind]}; mAP {ap}, AP.5 {ap_50}; {counts}: {mistakes}"
    return PictureGroup(f"{place}. {image.name}", note, pictures)
