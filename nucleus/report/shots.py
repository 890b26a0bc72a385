"""Which of the run's pictures the page shows, and what it says of each."""

from collections.abc import Sequence
from dataclasses import dataclass

from nucleus.report.record import ExampleImage, RunRecord, TestImage, WatchedImage
from nucleus.report.wording import KINDS, plural, score

__all__ = ["Scene", "Shot", "example_scenes", "mistakes_in_words", "tested_scenes", "watched_scenes"]

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
