import zipfile
from pathlib import Path

import pytest

from nucleus.data.layouts import MaskForm, find_images, open_source
from nucleus.errors import DataError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return target


def test_kaggle(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "top/a/images/a.png", "top/a/masks/2.png", "top/a/masks/1.png", "top/b/images/b.png")
    for path in (source, zipped(source, tmp_path / "s.zip")):
        layout = find_images(open_source(path))
        assert layout.name == "kaggle"
        assert [(i.title, len(i.masks)) for i in layout.images] == [("a", 2), ("b", 0)]
        assert layout.images[0].masks == ("top/a/masks/1.png", "top/a/masks/2.png")
        assert layout.images[0].form is MaskForm.PER_NUCLEUS


def test_kaggle_folders_with_two_images_are_named(tmp_path: Path) -> None:
    layout = find_images(
        open_source(make(tmp_path, "a/images/a.png", "a/masks/1.png", "b/images/1.png", "b/images/2.png"))
    )
    problems = {image.title: image.problem for image in layout.images}
    assert problems["a"] is None
    assert all(fact in str(problems["b"]) for fact in ("b/images", "2"))


def test_paired(tmp_path: Path) -> None:
    source = make(
        tmp_path, "train/inputs/1.png", "train/inputs/2.png", "train/masks/1.png", "test/inputs/1.png",
        "test/masks/1_mask.png",
    )  # fmt: skip
    layout = find_images(open_source(source))
    found = {(i.given_split, i.title): i.masks for i in layout.images}
    assert layout.name == "paired"
    assert found == {
        ("train", "1"): ("train/masks/1.png",),
        ("train", "2"): (),
        ("test", "1"): ("test/masks/1_mask.png",),
    }
    assert {i.form for i in layout.images} == {MaskForm.BINARY}


def test_labelled(tmp_path: Path) -> None:
    source = make(tmp_path, "images/x.tif", "images/y.jpg", "labels/x.tiff", "labels/y.png", "__MACOSX/images/._x.tif")
    layout = find_images(open_source(source))
    assert layout.name == "labelled"
    assert {i.title: i.masks for i in layout.images} == {"x": ("labels/x.tiff",), "y": ("labels/y.png",)}
    assert {i.form for i in layout.images} == {MaskForm.LABELS}


def test_sources_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none"):
        open_source(tmp_path / "none")
    (tmp_path / "file.txt").write_text("no zip")
    with pytest.raises(DataError, match=r"file\.txt"):
        open_source(tmp_path / "file.txt")
    with pytest.raises(DataError, match="found none"):
        find_images(open_source(tmp_path))
    with pytest.raises(DataError, match=r"Kaggle.* 2 image files"):
        find_images(open_source(make(tmp_path / "flat", "a.png", "b.png")))
