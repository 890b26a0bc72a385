"""The run's pictures inside the page: JPEG without loss of colour resolution, as good as the page's size allows."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from nucleus.data.images import RgbImage, decode_image
from nucleus.pictures import MISTAKE_COLOURS
from nucleus.runs.record import ExampleImage, RunRecord, TestImage, WatchedImage
from nucleus.storage.files import atomic_path
from nucleus.text import KINDS, plain, plural, score

__all__ = [
    "Picture",
    "PictureFolder",
    "Scene",
    "Shot",
    "embedded",
    "example_scenes",
    "mistakes_in_words",
    "save_sheet",
    "tested_scenes",
    "watched_scenes",
]


# Longest side, px, and JPEG quality, from the best to the smallest.
_LADDER = (
    (1024, 95),
    (1024, 90),
    (768, 92),
    (768, 85),
    (640, 85),
    (640, 78),
    (512, 80),
    (512, 70),
    (448, 70),
    (384, 72),
    (384, 60),
    (320, 62),
    (320, 50),
    (256, 55),
    (256, 42),
    (192, 45),
    (192, 32),
    (128, 35),
    (128, 20),
)


@dataclass(frozen=True)
class Picture:
    """A picture that is part of the page.

    Attributes:
        uri: `data:image/jpeg;base64,...`.
        width: Pixels.
        height: Pixels.
    """

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class PictureFolder:
    """The PNG pictures of a run, by the part of their path below the folder and without suffix."""

    folder: Path

    def read(self, key: str) -> RgbImage | None:
        """A picture, H x W x 3; None if it was not kept, is damaged, or would lie outside the folder."""
        try:
            path = (self.folder / f"{key}.png").resolve()
            if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
                return None
            return decode_image(path.read_bytes(), key)
        except (OSError, ValueError):  # no picture (`ImageError`), or a name that no file can have
            return None


def embedded(
    folder: PictureFolder, sides: Mapping[str, int], fits: Callable[[Mapping[str, Picture]], bool]
) -> dict[str, Picture]:
    """Encode pictures as well as there is room; those that are missing are left out.

    Args:
        folder: Where they are.
        sides: Longest side in the page by picture, px.
        fits: Whether there is room for these pictures in the page.
    """
    low, high = 0, len(_LADDER) - 1
    while low < high:  # sizes fall along the ladder: the first step that fits, or the last
        middle = (low + high) // 2
        if fits(_encoded(folder, sides, *_LADDER[middle])):
            high = middle
        else:
            low = middle + 1
    return _encoded(folder, sides, *_LADDER[low])


def _encoded(folder: PictureFolder, sides: Mapping[str, int], longest: int, quality: int) -> dict[str, Picture]:
    pictures = ((key, folder.read(key), min(side, longest)) for key, side in sides.items())
    return {key: _jpeg(image, side, quality) for key, image, side in pictures if image is not None}


def _jpeg(image: RgbImage, side: int, quality: int) -> Picture:
    scale = side / max(image.shape[:2])
    if scale < 1:
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    # 4:4:4: with colours at half the resolution, outlines of one pixel would lose theirs.
    options = [
        cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]  # fmt: skip
    _, data = cv2.imencode(".jpg", image[..., ::-1], options)
    text = base64.b64encode(data.tobytes()).decode()
    return Picture(f"data:image/jpeg;base64,{text}", image.shape[1], image.shape[0])


_MOST_EXAMPLES = 12
_MOST_WATCHED = 6
_MOST_EPOCHS = 7
_MOST_OF_GROUP = 12
_EXAMPLE_SIDE = 512
_WATCHED_SIDE = 512
_TEST_SIDE = 1024


@dataclass(frozen=True)
class Shot:
    """A picture.

    Attributes:
        key: Its path below `pictures/`, without suffix.
        caption: A few words under it.
        alt: What can be seen on it, for those who cannot.
        side: Its longest side in the page, px, where there is room.
    """

    key: str
    caption: str
    alt: str
    side: int


@dataclass(frozen=True)
class Scene:
    """Pictures of one image.

    Attributes:
        title: The image's name.
        note: More about it.
        brief: The same in fewer words, for slides.
        shots: Its pictures.
    """

    title: str
    note: str
    brief: str
    shots: list[Shot]


def example_scenes(record: RunRecord) -> list[Scene]:
    """Training images, with their labels, before and after augmentation."""
    return [_example(image) for image in record.examples[:_MOST_EXAMPLES]]


def watched_scenes(record: RunRecord) -> list[Scene]:
    """Validation images, and what the network made of them as it learned."""
    return [_watched(image, record.best_epoch + 1) for image in record.watched[:_MOST_WATCHED]]


def tested_scenes(record: RunRecord, group: str) -> list[Scene]:
    """The `best` or `worst` images of the test split."""
    images = [image for image in record.test_images if image.group == group]
    return [_tested(place, image) for place, image in enumerate(images[:_MOST_OF_GROUP], start=1)]


def mistakes_in_words(image: TestImage) -> str:
    """What is wrong with a prediction, such as `3 missed, 1 merged`."""
    counts = {"missed": image.missed, "extra": image.extra, "merged": image.merged, "split": image.split}
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number) or "no mistakes"


def _example(image: ExampleImage) -> Scene:
    what = f"training image {image.name}, {KINDS[image.kind]}"
    shown = (
        ("image", "image", f"The {what}."),
        ("labels", "its nuclei", f"The {what}, with each of its labelled nuclei outlined."),
        ("augmented", "augmented", f"A crop of the {what}, changed at random as in training."),
        ("augmented-labels", "augmented, its nuclei", f"The changed crop of the {what}, with its nuclei outlined."),
    )
    shots = [Shot(f"examples/{image.name}/{file}", caption, alt, _EXAMPLE_SIDE) for file, caption, alt in shown]
    return Scene(image.name, KINDS[image.kind], KINDS[image.kind], shots)


def _watched(image: WatchedImage, best: int) -> Scene:
    folder, what = f"watched/{image.name}", f"validation image {image.name}"
    shots = [
        Shot(f"{folder}/image", "image", f"The {what}.", _WATCHED_SIDE),
        Shot(f"{folder}/truth", "truth", f"The {what}, with its true nuclei outlined.", _WATCHED_SIDE),
    ]
    for epoch in _spread(sorted(image.epochs)):
        when = "before training" if epoch == 0 else f"after {plural(epoch, 'epoch')}"
        alt = f"The {what}, with the nuclei outlined that the network finds {when}."
        shots.append(Shot(f"{folder}/epoch-{epoch:05d}", when, alt, _WATCHED_SIDE))
    alt = f"The {what}, with the nuclei outlined that the published weights find, those of epoch {best}."
    shots.append(Shot(f"{folder}/best", f"best (epoch {best})", alt, _WATCHED_SIDE))
    return Scene(image.name, KINDS[image.kind], KINDS[image.kind], shots)


def _tested(place: int, image: TestImage) -> Scene:
    mistakes = mistakes_in_words(image)
    what = f"test image {image.name}, {KINDS[image.kind]}"
    marked = (
        f"The {what}, with its nuclei outlined by what became of them: {plural(image.nuclei, 'nucleus', 'nuclei')}, "
    )
    marked += f"{image.predicted} predicted, {mistakes}; mAP {score(image.scores, 'map', 2)}."
    note = (
        f"{KINDS[image.kind]}; mAP {score(image.scores, 'map', 2)}, AP.5 {score(image.scores, 'ap_50', 2)}; "
        f"{plural(image.nuclei, 'nucleus', 'nuclei')}, {image.predicted} predicted: {mistakes}"
    )
    shots = [
        Shot(f"test/{image.name}/image", "image", f"The {what}.", _TEST_SIDE),
        Shot(f"test/{image.name}/mistakes", "prediction", marked, _TEST_SIDE),
    ]
    brief = f"mAP {score(image.scores, 'map', 2)}; {mistakes}"
    return Scene(f"{place}. {image.name}", note, brief, shots)


def _spread(epochs: Sequence[int]) -> list[int]:
    """At most `_MOST_EPOCHS`, evenly spread, the first and the last among them."""
    if len(epochs) <= _MOST_EPOCHS:
        return list(epochs)
    return [epochs[round(i * (len(epochs) - 1) / (_MOST_EPOCHS - 1))] for i in range(_MOST_EPOCHS)]


_DPI = 100
_WIDTH = 1920
_GAP = 10
_TITLE = 64
_CAPTION = 24
_LEGEND = 40
_SMALLEST_SIDE = 160


def save_sheet(
    path: Path, folder: PictureFolder, title: str, scenes: Sequence[Scene], across: int = 1, legend: bool = False
) -> None:
    """Write the pictures of scenes as one PNG, about 1,920 px wide.

    Args:
        path: The PNG.
        folder: Where the pictures are.
        title: Stands above all.
        scenes: Each becomes a part of a row; what was not kept stays white, and says so.
        across: Scenes a row.
        legend: Whether to explain the colours of mistakes.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = max((len(scene.shots) for scene in scenes), default=1)
    side = max(_SMALLEST_SIDE, (_WIDTH - _GAP) // (across * columns) - _GAP)
    top = _TITLE + (_LEGEND if legend else 0)
    head = (3 if columns > 2 else 2) * _CAPTION  # pairs of image and prediction need no captions
    row_height = side + head + 2 * _GAP
    width = across * columns * (side + _GAP) + _GAP
    height = top + -(-max(len(scenes), 1) // across) * row_height
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    writer = _Writer(figure, width, height)
    writer.write(_GAP, 20, plain(title), size=20, weight="bold")
    if legend:
        writer.legend(_TITLE)
    if not scenes:
        writer.write(_GAP, top, "no pictures were kept")
    for number, scene in enumerate(scenes):
        left = _GAP + number % across * columns * (side + _GAP)
        upper = top + number // across * row_height
        writer.write(left, upper, _fitting(scene.title, columns * side), weight="bold")
        writer.write(left, upper + _CAPTION, _fitting(scene.brief, columns * side))
        for place, shot in enumerate(scene.shots):
            x = left + place * (side + _GAP)
            if columns > 2:
                writer.write(x, upper + 2 * _CAPTION, _fitting(shot.caption, side))
            picture = folder.read(shot.key)
            if picture is None:
                writer.write(x, upper + head, "not kept")
            else:
                writer.paste(x, upper + head, _scaled(picture, side))
    with atomic_path(path) as beside:
        figure.savefig(beside, dpi=_DPI, facecolor="white")


class _Writer:
    """Puts text and pixels onto a figure at places counted from its upper left corner, px."""

    def __init__(self, figure: Any, width: int, height: int) -> None:
        self.figure = figure
        self.width = width
        self.height = height

    def write(self, x: int, y: int, text: str, size: float = 11, weight: str = "normal") -> None:
        """Write a line whose upper left corner is at (x, y)."""
        self.figure.text(
            x / self.width, 1 - y / self.height, text, fontsize=size, fontweight=weight, va="top", parse_math=False,
            fontfamily="DejaVu Sans",
        )  # fmt: skip

    def paste(self, x: int, y: int, picture: RgbImage) -> None:
        """Put a picture with its upper left corner at (x, y), pixel by pixel."""
        self.figure.figimage(picture, x, self.height - y - picture.shape[0], origin="upper")

    def legend(self, y: int) -> None:
        """The colours of mistakes, with their names."""
        for number, (name, colour) in enumerate(MISTAKE_COLOURS.items()):
            x = _GAP + 180 * number
            swatch = np.full((20, 36, 3), colour, np.uint8)
            swatch[[0, -1]] = swatch[:, [0, -1]] = 0
            self.paste(x, y, swatch)
            self.write(x + 46, y, name, size=13)


def _scaled(picture: RgbImage, side: int) -> RgbImage:
    """The picture, its longer side brought to `side` pixels; its own pixels stay squares with sharp edges."""
    times = -(-side // max(picture.shape[:2]))
    picture = np.repeat(np.repeat(picture, times, axis=0), times, axis=1)
    scale = side / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def _fitting(text: str, width: int) -> str:
    """As much of the text as fits into so many pixels, at 9 px a letter."""
    text, most = plain(text), max(8, width // 9)
    return text if len(text) <= most else f"{text[: most - 1]}…"
