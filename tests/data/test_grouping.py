import re
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from nucleus.config.names import Kind
from nucleus.data.fingerprints import fingerprint
from nucleus.data.grouping import group_images
from nucleus.data.images import decode_image, kind_of
from nucleus.data.sources import open_source
from nucleus.data.synthetic import generated_image
from tests.all_pairs import groups_of_all_pairs


def groups(images: list[np.ndarray], pictures: list[str | None] | None = None) -> list[int]:
    return group_images([fingerprint(image) for image in images], pictures or [None] * len(images))


def picture(seed: int, side: int = 512) -> np.ndarray:
    return generated_image(seed, side, side)[0]


def test_unrelated_images_stay_apart() -> None:
    assert groups([picture(seed, 256) for seed in range(20)]) == list(range(20))


def test_tiles_of_one_picture_are_one_group() -> None:
    whole = picture(7)
    tiles = [whole[y : y + 256, x : x + 256] for y in (0, 256) for x in (0, 256)]
    assert groups([picture(6, 256), *tiles, picture(8, 256)]) == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(("dy", "dx"), [(0, 90), (70, 0), (61, 83)])
def test_overlapping_tiles_are_one_group(dy: int, dx: int) -> None:
    whole = picture(7)
    assert groups([whole[:256, :256], whole[dy : dy + 256, dx : dx + 256]]) == [0, 0]


def test_near_duplicates_are_one_group() -> None:
    image = picture(6, 256)
    brighter = np.clip(image.astype(int) + 20, 0, 255).astype(np.uint8)
    jpeg = decode_image(cv2.imencode(".jpg", image[..., ::-1])[1].tobytes(), "j")
    smaller = cv2.resize(image, (200, 200), interpolation=cv2.INTER_AREA)
    assert groups([image, brighter, jpeg, smaller, np.rot90(image), image[:, ::-1], picture(7, 256)]) == [0] * 6 + [1]


def test_many_unrelated_images_do_not_chain() -> None:
    """Of 1,000 images, 329 would be linked by chance if border lines had to be as alike as those of ten must."""
    prints = [fingerprint(picture(seed, 96)) for seed in range(1000)]
    told: list[str] = []
    found = group_images(prints, [None] * len(prints), warn=told.append)
    (warning,) = told
    assert re.search(r"\(1000\) match by chance.* more than 0\.9\d\d \(usually 0\.7\).*--group-by", warning)
    assert group_images(prints[:50], [None] * 50, warn=told.append)
    assert told == [warning]
    assert sum(size for size in Counter(found).values() if size > 1) <= 110
    assert max(Counter(found).values()) <= 4
    assert found == groups_of_all_pairs(prints)


def test_names_can_say_what_belongs_together() -> None:
    images = [picture(seed, 128) for seed in range(4)]
    assert groups(images, ["a", None, "a", "b"]) == [0, 1, 0, 2]


def test_constant_images_do_not_chain() -> None:
    flat = [np.full((64, 64, 3), value, np.uint8) for value in (0, 0, 90)]
    assert groups([*flat, picture(1, 64)]) == [0, 1, 2, 3]


@pytest.mark.parametrize(("seed", "kind"), [(0, Kind.DARK_FIELD), (6, Kind.STAIN), (8, Kind.BRIGHT_FIELD)])
def test_kinds_of_generated_images(seed: int, kind: Kind) -> None:
    assert kind_of(picture(seed, 128)) is kind


def test_quadrants_of_real_images_are_found(real_images: Path) -> None:
    source = open_source(real_images)
    entries = [entry for entry in source.entries() if "/images/" in entry]
    whole = [decode_image(source.read(entry), entry) for entry in entries[::4]]
    large = [image for image in whole if min(image.shape[:2]) >= 500][:12]
    tiles = [
        image[y : y + image.shape[0] // 2, x : x + image.shape[1] // 2]
        for image in large
        for y in (0, image.shape[0] // 2)
        for x in (0, image.shape[1] // 2)
    ]
    found = groups(tiles)
    together = sum(len(set(found[i : i + 4])) == 1 for i in range(0, len(tiles), 4))
    mixed = sum(bool(set(found[i : i + 4]) & set(found[:i])) for i in range(4, len(tiles), 4))
    assert together >= 0.5 * len(large)  # neighbours that meet in empty ground cannot be told
    assert mixed <= 2
