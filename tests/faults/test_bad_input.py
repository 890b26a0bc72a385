"""What people hand in: each case is taken, left out with its reason, or refused with the message that it must give."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import tifffile

from job.train import RunOptions, train
from nucleus.config.settings import parse_recipe
from nucleus.data.images import encode_png
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.data.synthetic import generated_image
from nucleus.errors import DataError, NucleusError, RecipeError
from nucleus.storage.uri import S3Uri

IMAGE, LABELS = generated_image(1, 48, 40)
STAINED, _ = generated_image(6, 48, 40)
GREY = np.ascontiguousarray(IMAGE[..., 0])
MASK = ((LABELS > 0) * 255).astype(np.uint8)


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def huge_png() -> bytes:
    """A few hundred bytes that claim 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100_001)))
        + chunk(b"IEND", b"")
    )


def palette_png() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(IMAGE).quantize(16).save(file, "PNG")
    return file.getvalue()


class Given(NamedTuple):
    """Where a case puts its files: a folder with four images that are right, an empty one, and a place in a bucket."""

    good: Path
    empty: Path
    uri: S3Uri


Case = Callable[[Given], str]
"""Hands something in, and tells what came of it: what was taken, or the reason why it was not."""


def kaggle(root: Path, name: str, image: bytes, masks: list[bytes], suffix: str = ".png") -> None:
    """One image in Kaggle's layout."""
    (root / name / "images").mkdir(parents=True)
    (root / name / "masks").mkdir()
    (root / name / "images" / f"{name}{suffix}").write_bytes(image)
    for number, mask in enumerate(masks):
        (root / name / "masks" / f"{number}.png").write_bytes(mask)


def imported(root: Path, uri: S3Uri, val: float = 0.25, test: float = 0.25) -> str:
    """Import a source; tell what became of what is not `good` in it."""
    try:
        manifest = import_dataset(root, uri / "datasets" / "d", SplitOptions(val=val, test=test)).dataset.manifest
    except NucleusError as error:
        return str(error)
    odd = [sample for sample in manifest.samples if not sample.name.startswith("good")]
    told = [f"taken as {sample.name} with {sample.nuclei} nuclei" for sample in odd]
    return "; ".join([*told, *(f"{item.title} left out: {item.reason}" for item in manifest.left_out)])


def image(suffix: str, data: bytes) -> Case:
    """An image file among good ones."""

    def hand_in(given: Given) -> str:
        kaggle(given.good, "odd", data, [encode_png(MASK)], suffix)
        return imported(given.good, given.uri)

    return hand_in


def masks(*data: bytes) -> Case:
    """An image with these masks among good ones."""

    def hand_in(given: Given) -> str:
        kaggle(given.good, "odd", encode_png(IMAGE), list(data))
        return imported(given.good, given.uri)

    return hand_in


def zip_entry(name: str, write: Callable[[zipfile.ZipFile, str], None] | None = None) -> Case:
    """A zip of good images with one whose folder has this name; nothing may come to lie anywhere but in the bucket."""

    def hand_in(given: Given) -> str:
        archive = given.empty / "images.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in given.good.rglob("*.png"):
                file.write(path, path.relative_to(given.good))
            (write or plain_entry)(file, f"{name}/images/a.png")
            file.writestr(f"{name}/masks/1.png", encode_png(MASK))
        before = set(given.good.parent.rglob("*"))
        told = imported(archive, given.uri)
        assert set(given.good.parent.rglob("*")) == before
        return told

    return hand_in


def plain_entry(file: zipfile.ZipFile, name: str) -> None:
    file.writestr(name, encode_png(IMAGE))


def link(file: zipfile.ZipFile, name: str) -> None:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    file.writestr(entry, "/etc/passwd")


def bomb(file: zipfile.ZipFile, name: str) -> None:
    with file.open(name, "w") as entry:
        for _ in range(300):
            entry.write(bytes(1 << 20))


def recipe(**content: Any) -> Case:
    """A recipe with these keys."""

    def hand_in(_: Given) -> str:
        with pytest.raises(RecipeError) as caught:
            parse_recipe({"model": "m", "dataset": "d", **content}, "r.toml")
        return str(caught.value)

    return hand_in


def a_batch_larger_than_the_dataset(given: Given) -> str:
    imported(given.good, given.uri)
    content = {"model": "m", "dataset": "d", "bucket": str(given.uri), "input": {"batch_size": 64}}
    with pytest.raises(DataError) as caught:
        train(parse_recipe(content, "r.toml"), RunOptions())
    return str(caught.value)


def source(*names: str) -> Case:
    """A source with one image under several names."""

    def hand_in(given: Given) -> str:
        for name in names:
            kaggle(given.empty, name, encode_png(IMAGE), [encode_png(MASK)])
        return imported(given.empty, given.uri)

    return hand_in


def no_masks(given: Given) -> str:
    (given.empty / "inputs").mkdir()
    (given.empty / "inputs" / "a.png").write_bytes(encode_png(IMAGE))
    return imported(given.empty, given.uri)


# What is handed in, and a part of what is said of it.
CASES: dict[str, tuple[Case, str]] = {
    "image: zero bytes": (image(".png", b""), "the file is empty (0 bytes)"),
    "image: truncated PNG": (image(".png", encode_png(IMAGE)[:200]), "a damaged image"),
    "image: text called PNG": (image(".png", b"hello, microscope"), "bytes of something else"),
    "image: JPEG called PNG": (image(".png", cv2.imencode(".jpg", IMAGE)[1].tobytes()), "taken as odd"),
    "image: PNG called TIFF": (image(".tif", encode_png(IMAGE)), "taken as odd"),
    "image: CMYK TIFF": (image(".tif", tiff(np.dstack([IMAGE, GREY]), photometric="separated")), "found CMYK inks"),
    "image: palette PNG": (image(".png", palette_png()), "taken as odd"),
    "image: 1 bit TIFF": (image(".tif", tiff(GREY > 99)), "taken as odd"),
    "image: 16 bit PNG": (image(".png", encode_png(GREY.astype(np.uint16) * 200)), "taken as odd"),
    "image: float TIFF": (image(".tif", tiff(GREY.astype(np.float32) / 255)), "taken as odd"),
    "image: float TIFF with NaN": (
        image(".tif", tiff(np.where(GREY > 99, np.nan, GREY).astype(np.float32))),
        "found NaN or infinity",
    ),
    "image: a stack": (image(".tif", tiff(np.stack([GREY] * 5), imagej=True, metadata={"axes": "ZYX"})), "a stack"),
    "image: two channels": (
        image(".tif", tiff(np.stack([GREY] * 2), photometric="minisblack", metadata={"axes": "CYX"})),
        "2 channels",
    ),
    "image: 100,000 x 100,000 px in a small file": (image(".png", huge_png()), "bytes of data cannot hold"),
    "masks: larger than the image": (masks(encode_png(np.pad(MASK, 3))), "found 46 x 54"),
    "masks: empty": (masks(encode_png(np.zeros_like(MASK))), "taken as odd with 0 nuclei"),
    "masks: overlapping": (masks(encode_png(MASK), encode_png(MASK)), "taken as odd with 1 nuclei"),
    "masks: all covered": (masks(encode_png(np.full_like(MASK, 255))), "Expected a background of 0"),
    "masks: three different channels": (masks(encode_png(STAINED)), "Expected a black background"),
    "masks: zero bytes": (masks(b""), "the file is empty"),
    "zip: ../ in a name": (zip_entry("../../outside"), "a path outside the zip"),
    "zip: absolute path": (zip_entry("/etc/passwd"), "a path outside the zip"),
    "zip: two dots": (zip_entry(".."), "a path outside the zip"),
    "zip: a name in another script": (zip_entry("細胞 核"), "taken as image"),
    "zip: a name with a newline": (zip_entry("two\nlines"), "taken as two-lines"),
    "zip: a name of 255 bytes": (zip_entry("x" * 255), f"taken as {'x' * 63} with"),
    "zip: a link": (zip_entry("link", link), "link/images/a.png is a link"),
    "zip: a bomb": (zip_entry("bomb", bomb), "unpacks to 300 MiB"),
    "recipe: wrong type": (recipe(workers="two"), "workers"),
    "recipe: unknown key": (recipe(optimiser={}), "unknown key 'optimiser' (did you mean 'optimizer'?)"),
    "recipe: unknown key in a table": (recipe(optimizer={"epoch": 3}), "optimizer.epoch"),
    "recipe: negative size": (recipe(input={"crop": -64}), "input.crop"),
    "recipe: no encoder of that name": (recipe(network={"encoder": "resnet"}), "mobilenet_v2"),
    "recipe: crops that the network cannot divide": (recipe(input={"crop": 100}), "input.crop"),
    "recipe: tiles that the network cannot divide": (recipe(input={"tile": 100}), "input.tile"),
    "recipe: a batch for no number of workers": (recipe(workers=3, input={"batch_size": 8}), "a multiple of workers"),
    "recipe: a relative cache": (recipe(cache_dir="cache"), "absolute path"),
    "recipe: a batch larger than the dataset": (
        a_batch_larger_than_the_dataset,
        "Expected at least one batch of 64 images",
    ),
    "dataset: one image": (source("only"), "at least 3 independent images"),
    "dataset: one image three times": (source("a", "b", "c"), "at least 3 independent images"),
    "dataset: an empty split": (
        lambda given: imported(given.good, given.uri, val=0.9, test=0.05),
        "Expected images in every split; test, train would have none",
    ),
    "dataset: no masks": (no_masks, "Expected one of these layouts"),
    "dataset: nothing": (lambda given: imported(given.empty, given.uri), "found none"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_handed_in(case: str, tmp_path: Path, bucket_uri: S3Uri) -> None:
    given = Given(tmp_path / "good", tmp_path / "empty", bucket_uri)
    given.empty.mkdir()
    for seed in range(4):
        pixels, labels = generated_image(50 + seed, 48, 40)
        kaggle(given.good, f"good{seed}", encode_png(pixels), [encode_png(((labels > 0) * 255).astype(np.uint8))])
    hand_in, said = CASES[case]
    assert said in hand_in(given)
