import zipfile
from pathlib import Path

import pytest

from nucleus.data.layouts import Layout, find_images
from nucleus.data.masks import MaskForm
from nucleus.data.sources import open_source
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


def layout_of(folder: Path, *names: str) -> Layout:
    return find_images(open_source(make(folder, *names)))


@pytest.mark.parametrize("images", ["images", "Images", "IMAGES", "img", "Imgs", "image", "inputs", "Input"])
@pytest.mark.parametrize(
    ("masks", "name"),
    [("masks", "paired"), ("Mask", "paired"), ("labels", "labelled"), ("Label", "labelled"), ("LABELS", "labelled")],
)
def test_names_of_folders_as_people_type_them(images: str, masks: str, name: str, tmp_path: Path) -> None:
    layout = layout_of(tmp_path, f"My Data/{images}/1.tif", f"My Data/{images}/2.tif", f"My Data/{masks}/1.png")
    assert layout.name == name
    assert {i.title: i.masks for i in layout.images} == {"1": (f"My Data/{masks}/1.png",), "2": ()}
    assert layout.left_out == {}


def test_kaggle_with_other_names_of_folders(tmp_path: Path) -> None:
    layout = layout_of(tmp_path, "a/Image/a.png", "a/Mask/1.png", "a/Mask/2.png", "b/image/b.png", "b/mask/1.png")
    assert layout.name == "kaggle"
    assert [len(image.masks) for image in layout.images] == [2, 1]


def test_a_test_set_of_one_image_is_not_kaggles(tmp_path: Path) -> None:
    layout = layout_of(
        tmp_path, "Train/images/1.png", "Train/images/2.png", "Train/masks/1.png", "Train/masks/2.png",
        "Test/images/3.png", "Test/masks/3.png",
    )  # fmt: skip
    assert layout.name == "paired"
    assert {(i.given_split, i.title) for i in layout.images} == {("train", "1"), ("train", "2"), ("test", "3")}


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("x", "x"),
        ("x", "mask_x"),
        ("x", "Mask-x"),
        ("x", "label_x"),
        ("x", "x_masks"),
        ("x", "x_cp_masks"),
        ("x", "x-Label"),
        ("image_001", "mask_001"),
        ("img_001", "001_label"),
        ("mask_7", "mask_7"),
        ("e\u0301", "\u00e9_mask"),
    ],
)
def test_names_of_masks_as_tools_write_them(image: str, mask: str, tmp_path: Path) -> None:
    layout = layout_of(tmp_path, f"images/{image}.tif", f"labels/{mask}.png")
    (found,) = layout.images
    assert found.masks == (f"labels/{mask}.png",)


def test_masks_are_never_guessed(tmp_path: Path) -> None:
    """Equal names come first; what fits several images or masks fits none."""
    layout = layout_of(
        tmp_path, "images/1.png", "images/image_1.png", "images/image_2.png", "images/img_2.png", "images/3.png",
        "images/4.png", "images/4_mask.png",
        *(f"labels/{name}.png" for name in ("mask_1", "mask_2", "3_mask", "3_label", "4_mask", "lonely")),
    )  # fmt: skip
    found = {image.title: image for image in layout.images}
    assert found["1"].masks == ("labels/mask_1.png",)
    assert found["4_mask"].masks == ("labels/4_mask.png",)
    assert [found[title].masks for title in ("image_1", "image_2", "img_2", "4")] == [()] * 4
    assert "3_label.png and labels/3_mask.png" in str(found["3"].problem)
    assert list(layout.left_out) == ["labels"]
    assert "2 files of this folder" in layout.left_out["labels"]


@pytest.mark.parametrize(
    ("images", "mask"),
    [
        (("images/a.png", "images/a.tif"), "labels/a.png"),
        (("inputs/a.png", "images/a.png"), "masks/a.png"),
        (("a.JPG", "a.png"), "a_masks.tif"),
        (("a.jpg", "a.png"), "a.geojson"),
    ],
)
def test_two_images_of_one_name_share_no_mask(images: tuple[str, str], mask: str, tmp_path: Path) -> None:
    layout = layout_of(tmp_path, *images, mask)
    assert len(layout.images) == 2
    for image in layout.images:
        assert all(name in str(image.problem) for name in (*images, mask))


def test_masks_beside_their_images(tmp_path: Path) -> None:
    layout = layout_of(
        tmp_path, "plate/a.png", "plate/a_masks.png", "plate/b.tif", "plate/b_cp_masks.tif", "plate/c.png",
        "plate/d.png", "plate/mask_d.png", "notes/figure.png",
    )  # fmt: skip
    assert layout.name == "beside"
    assert {i.title: (i.masks, i.form) for i in layout.images} == {
        "a": (("plate/a_masks.png",), MaskForm.LABELS),
        "b": (("plate/b_cp_masks.tif",), MaskForm.LABELS),
        "c": ((), MaskForm.LABELS),
        "d": (("plate/mask_d.png",), MaskForm.BINARY),
    }
    assert list(layout.left_out) == ["notes"]


def test_images_outside_the_layout_are_counted(tmp_path: Path) -> None:
    layout = layout_of(
        tmp_path, "a/images/a.png", "a/masks/1.png", "lost/masks/1.png", "flat/1.png", "flat/2.png", "top.png"
    )
    assert [image.title for image in layout.images] == ["a"]
    assert set(layout.left_out) == {"lost/masks", "flat", "."}
    assert "2 files of this folder belong to none, such as 'flat/1.png'" in layout.left_out["flat"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a.png", "b.png"), "Put the images into images/, and their label images into labels/"),
        (("images/a.png", "images/b.png"), r"Nearest: images/\. Put the masks into labels/ or masks/ beside it\.$"),
        (("d/images/a.png", "d/truth/a.png"), r"Nearest: images/ in 'd'\. .*or rename 'truth'"),
        (("raw/a.png", "raw/b.png", "Labels/a.png"), r"Nearest: labels/\. Put the images .*or rename 'raw'"),
        (("imges/a.png", "imges/b.png", "x/a.png"), r"'imges', which resembles 'images'\. Rename it"),
    ],
)
def test_the_nearest_layout_is_suggested(names: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        layout_of(tmp_path, *names)


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
