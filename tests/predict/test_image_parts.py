"""Parts of a listing: cut by the keys alone, so that a change of one image leaves the other parts as they are."""

import random
from dataclasses import replace

import pytest

from nucleus.predict.bucket_images import BucketImage
from nucleus.predict.image_parts import ImagePart, PartName, parts_of_listing

MEBI = 1 << 20


def listed(count: int, size: int = 1000) -> list[BucketImage]:
    return [BucketImage(f"plate/{number:05d}.png", f"e{number}", size) for number in range(count)]


def by_place(images: list[BucketImage]) -> dict[str, str]:
    """The content of each part, by its place."""
    return {part.place: part.content for part in parts_of_listing(images)}


def test_parts_are_the_stream_in_its_order() -> None:
    images = listed(3000)
    parts = list(parts_of_listing(iter(images)))
    assert [image for part in parts for image in part.images] == images
    sizes = [len(part.images) for part in parts]
    assert max(sizes) <= 32
    assert 7 < sum(sizes) / len(sizes) < 9
    assert len({part.place for part in parts}) == len(parts)


def test_a_listing_is_taken_as_parts_are() -> None:
    taken: list[BucketImage] = []
    stream = (taken.append(image) or image for image in listed(1000))
    first = next(parts_of_listing(stream))
    assert len(taken) == len(first.images)


def test_large_images_are_parts_of_their_own() -> None:
    images = listed(40)
    for place in (0, 7, 8, 39):
        images[place] = replace(images[place], size=4 * MEBI)
    parts = list(parts_of_listing(images))
    assert [image for part in parts for image in part.images] == images
    large = [part for part in parts if part.size >= 4 * MEBI]
    assert [len(part.images) for part in large] == [1, 1, 1, 1]
    without = by_place([image for image in images if image.size < 4 * MEBI or image is images[7]])
    assert large[1].place in without


@pytest.mark.parametrize("seed", range(5))
def test_a_change_of_one_image_changes_one_part(seed: int) -> None:
    """Where one is added or removed that ends a part, its neighbours are regrouped: two parts at most."""
    chosen = random.Random(seed)
    images = listed(2000)
    before = by_place(images)
    place = chosen.randrange(len(images))

    def changed(now: list[BucketImage]) -> tuple[int, int]:
        """How many parts have other images, and how many places are not known."""
        after = by_place(now)
        return (
            sum(before.get(place) != content for place, content in after.items()),
            len(after.keys() - before.keys()),
        )

    again = replace(images[place], etag="other")
    assert changed([*images[:place], again, *images[place + 1 :]]) == (1, 0)
    for now in ([*images[:place], *images[place + 1 :]], sorted([*images, new_image(chosen)], key=lambda i: i.key)):
        parts, places = changed(now)
        assert parts <= 2
        assert places <= 1


def new_image(chosen: random.Random) -> BucketImage:
    return BucketImage(f"plate/{chosen.randrange(2000):05d}.a.png", "new", 1000)


def test_what_a_name_says() -> None:
    for name in (
        PartName("0123456789ab", "ba9876543210", 1),
        PartName("0123456789ab", "ba9876543210", 12, plate=True, whole=False),
        PartName("0123456789ab", "ba9876543210", 3, whole=False),
    ):
        assert PartName.parsed(str(name)) == name
    for other in ("a.png.e0.parquet", "x/0123456789ab-ba9876543210-1.parquet", "0123456789ab-ba9876543210.parquet"):
        assert PartName.parsed(other) is None


def test_a_part_is_done_when_all_of_it_is() -> None:
    part = next(parts_of_listing(listed(9)))
    whole = PartName(part.place, part.content, 1)
    former = PartName(part.place, "0" * 12, 1)
    assert part.done is None
    assert ImagePart(part.place, part.images, (former, whole)).done == whole
    assert ImagePart(part.place, part.images, (former, replace(whole, whole=False))).done is None
