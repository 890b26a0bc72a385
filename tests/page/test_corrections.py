"""Corrections: a layout that imports take, one write per revision, and nobody's work lost, wherever a process dies."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nucleus.data.images import encode_png
from nucleus.data.intake import read_items, read_source
from nucleus.errors import IntegrityError, ObjectExistsError, OutputError, UriError, UsageError
from nucleus.page.corrections import (
    BucketPlace,
    CorrectedFile,
    CorrectionSet,
    FolderPlace,
    Place,
    correction_stem,
    place_of,
)
from nucleus.progress import no_progress
from nucleus.storage.bucket import Bucket

FACTS: dict[str, Any] = {
    "who": "Ada",
    "model": "nuclei@1",
    "image": "a b.png",
    "image_sha256": "0" * 64,
    "removed": 1,
    "drawn": 2,
}
PIXELS = np.random.default_rng(0).integers(0, 255, (40, 50), np.uint8)
FILE = CorrectedFile(".png", lambda: encode_png(PIXELS))
STEM = correction_stem("folder/a b.png", "f" * 64)


def labels_of(*places: int) -> NDArray[np.int32]:
    labels = np.zeros(PIXELS.shape, np.int32)
    for number, left in enumerate(places, 1):
        labels[5:15, left : left + 8] = number * 3
    return labels


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return FolderPlace(tmp_path / "corrections")
    return BucketPlace(request.getfixturevalue("bucket"))


def test_an_import_takes_a_set_as_it_is(tmp_path: Path) -> None:
    saved = CorrectionSet(FolderPlace(tmp_path), "first").save(STEM, FILE, labels_of(2, 20, 35), FACTS, None)
    CorrectionSet(FolderPlace(tmp_path), "first").save(STEM, FILE, labels_of(2, 20), FACTS, saved.tag)
    (tmp_path / "spool").mkdir()
    found = read_source(tmp_path / "first", partial(read_items, tmp_path / "spool"), no_progress)
    assert (found.left_out, found.duplicates) == ([], [])
    (image,) = found.images
    assert (image.title, image.shape, image.masks.nuclei) == (STEM, PIXELS.shape, 2)
    about = json.loads((tmp_path / f"first/about/{STEM}.json").read_text())
    assert (about["who"], about["model"], about["revision"], about["based_on"]) == ("Ada", "nuclei@1", 2, 1)


def test_names_in_any_script(place: Place) -> None:
    named = {**FACTS, "who": "Béa 核", "image": "Zürich 😀.png", "options": {"z": "µ"}}
    corrections = CorrectionSet(place, "first")
    saved = corrections.save(STEM, FILE, labels_of(2), named, None)
    found = corrections.find(STEM)
    assert found is not None
    assert (found.revision, found.revision.who, found.tag) == (saved.revision, "Béa 核", saved.tag)


def test_who_has_not_seen_the_latest_revision_cannot_replace_it(place: Place) -> None:
    corrections = CorrectionSet(place, "first")
    one = corrections.save(STEM, FILE, labels_of(2), FACTS, None)
    for base in (None, "another"):
        with pytest.raises(ObjectExistsError, match="Ada saved revision 1"):
            corrections.save(STEM, FILE, labels_of(20), {**FACTS, "who": "Bob"}, base)
    two = corrections.save(STEM, FILE, labels_of(20), {**FACTS, "who": "Bob"}, one.tag)
    assert (two.revision.revision, two.revision.who) == (2, "Bob")
    found = corrections.find(STEM)
    assert found is not None
    assert (found.revision, found.tag) == (two.revision, two.tag)
    assert np.array_equal(found.labels, labels_of(20))
    earlier = place.read(f"first/.revisions/{STEM}/000001.tif")
    assert earlier is not None
    assert earlier[0] == one.data


def test_of_two_at_once_one_wins(place: Place) -> None:
    """The second reads before the first has written, and writes after it."""
    corrections = CorrectionSet(place, "first")
    one = corrections.save(STEM, FILE, labels_of(2), FACTS, None)
    late = _Intercepted(place, lambda key: key.startswith("first/labels/"), lambda: None)
    late.before = lambda: corrections.save(STEM, FILE, labels_of(20), FACTS, one.tag)
    with pytest.raises(ObjectExistsError, match="revision 2"):
        CorrectionSet(late, "first").save(STEM, FILE, labels_of(35), FACTS, one.tag)
    found = corrections.find(STEM)
    assert found is not None
    assert np.array_equal(found.labels, labels_of(20))


class _Killed(BaseException):
    """The end of a process."""


@dataclass
class _Intercepted(Place):
    """A place before some of whose writes something happens."""

    inner: Place
    chosen: Callable[[str], bool]
    before: Callable[[], Any]

    def __post_init__(self) -> None:
        self.title = self.inner.title

    def read(self, key: str) -> tuple[bytes, str] | None:
        return self.inner.read(key)

    def write(self, key: str, data: bytes, *, tag: str | None) -> str:
        if self.chosen(key):
            self.before()
        return self.inner.write(key, data, tag=tag)

    def replace(self, key: str, data: bytes) -> None:
        if self.chosen(key):
            self.before()
        self.inner.replace(key, data)

    def names(self, folder: str) -> list[str]:
        return self.inner.names(folder)


@pytest.mark.parametrize("step", range(4))
def test_a_process_that_dies_at_any_write_loses_nothing(tmp_path: Path, step: int) -> None:
    """The writes of a second revision: the first one's copy, the image (which is there), the labels, the JSON."""
    place = FolderPlace(tmp_path)
    one = CorrectionSet(place, "first").save(STEM, FILE, labels_of(2), FACTS, None)
    writes = 0

    def die() -> None:
        nonlocal writes
        writes += 1
        if writes > step:
            raise _Killed

    with pytest.raises(_Killed):
        CorrectionSet(_Intercepted(place, lambda _: True, die), "first").save(STEM, FILE, labels_of(20), FACTS, one.tag)
    found = CorrectionSet(place, "first").find(STEM)
    assert found is not None
    assert found.revision.revision == (1 if step < 3 else 2)
    assert np.array_equal(found.labels, labels_of(2) if step < 3 else labels_of(20))
    again = CorrectionSet(place, "first").save(STEM, FILE, labels_of(35), FACTS, found.tag)
    about = json.loads((tmp_path / f"first/about/{STEM}.json").read_text())
    assert about["revision"] == again.revision.revision == found.revision.revision + 1


def test_other_bytes_are_not_replaced(tmp_path: Path) -> None:
    corrections = CorrectionSet(FolderPlace(tmp_path), "first")
    one = corrections.save(STEM, FILE, labels_of(2), FACTS, None)
    (tmp_path / f"first/images/{STEM}.png").write_bytes(b"another image")
    with pytest.raises(IntegrityError):
        corrections.save(STEM, FILE, labels_of(20), FACTS, one.tag)
    (tmp_path / f"first/labels/{STEM}.tif").write_bytes(b"no labels")
    with pytest.raises(IntegrityError):
        corrections.find(STEM)


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    """It is refused at the start; if it comes later, each use says what is in the way."""
    file = tmp_path / "file"
    file.write_text("no folder")
    with pytest.raises(UsageError, match="it is a file"):
        place_of(str(file), None)
    place = FolderPlace(file)
    uses: list[Callable[[], object]] = [
        lambda: place.names(""),
        lambda: place.read("a/labels/b.tif"),
        lambda: place.write("a/labels/b.tif", b"x", tag=None),
        lambda: place.replace("a/about/b.json", b"x"),
    ]
    for use in uses:
        with pytest.raises(OutputError, match="--corrections DIR"):
            use()


def test_names_of_sets_are_names() -> None:
    for name in ("../up", "a/b", "", ".revisions", "Upper"):
        with pytest.raises(UriError):
            CorrectionSet(FolderPlace(Path("x")), name)


def test_stems_differ_for_different_images() -> None:
    assert STEM == "a-b-ffffffffff"
    assert len({correction_stem("a.png", "1" * 64), STEM, correction_stem("a b.png", "f" * 64, "z=1")}) == 3


def test_a_bucket_keeps_a_set_as_an_import_reads_it(bucket: Bucket) -> None:
    CorrectionSet(BucketPlace(bucket), "first").save(STEM, FILE, labels_of(2), FACTS, None)
    keys = [each.key for each in bucket.objects("first/")]
    assert keys == [f"first/about/{STEM}.json", f"first/images/{STEM}.png", f"first/labels/{STEM}.tif"]
