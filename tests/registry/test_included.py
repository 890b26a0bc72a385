"""The model that comes along: its files are those that were reviewed, it is found by name, and its scores hold."""

import csv
import hashlib
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import cv2
import h5py
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import numpy_helper

import nucleus
from nucleus.cli.main import cli
from nucleus.config.names import Reference
from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image
from nucleus.doctor import check_model
from nucleus.errors import IntegrityError, ModelError, UriError, UsageError
from nucleus.metrics.scores import score_labels
from nucleus.model.architecture import CARD_FILE, CONFIG_FILE, METRICS_FILE, ONNX_FILE, PREVIEW_FILE, WEIGHTS_FILE
from nucleus.predict.model import Model
from nucleus.registry import versions
from nucleus.registry.manifest import MANIFEST_FILE
from nucleus.registry.publish import publish
from nucleus.registry.versions import find_model, is_included, pull, read_included
from nucleus.storage.bucket import Bucket
from tests.small_model import origin

# What was reviewed, and what the model must reach: to be set again after `make model`.
MANIFEST_SHA256 = "c3e536c992cdb2e31973a56590436c32bc20ea76a16186cded412eaf3693841d"
MOST_BYTES = 12_000_000
GENERATED_SCORES = {"AP.5": 0.5, "AP.7": 0.3, "mAP": 0.3, "IoU": 0.6}
"""Lowest means over `GENERATED`."""
REAL_SCORES = {"AP.5": 0.6, "AP.7": 0.5, "mAP": 0.4, "IoU": 0.75}
"""Lowest means over `REAL`."""

GENERATED = range(9000, 9010)
"""Seeds of images of 160 x 160 px, which no training set has."""
REAL = (
    "04acab7636c4",
    "1ee4a111f0e0",
    "6fb82031f7fc",
    "c322c72b9d41",
    "cf26c41245fe",
    "4e92129f4e80",
    "7f55678298ad",
    "f7e5dcfc9c93",
)
"""Starts of the names of images in DSB2018's test split: five of fluorescence, three stained."""

FILES = {CARD_FILE, CONFIG_FILE, METRICS_FILE, ONNX_FILE, WEIGHTS_FILE}
FOLDER = Path(versions.__file__).parent / "included" / "nuclei"


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files in place of those in the package."""
    folder = shutil.copytree(FOLDER, tmp_path / "included")
    monkeypatch.setattr(versions, "_INCLUDED_FOLDER", folder)
    return folder


def test_the_files_are_those_that_were_reviewed() -> None:
    manifest = read_included().manifest  # compares the sums
    assert hashlib.sha256((FOLDER / MANIFEST_FILE).read_bytes()).hexdigest() == MANIFEST_SHA256
    assert {*manifest.files} - {PREVIEW_FILE} == FILES
    assert {path.name for path in FOLDER.iterdir()} == {*manifest.files, MANIFEST_FILE}
    assert manifest.model == versions.INCLUDED


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MOST_BYTES


def test_nothing_in_it_is_of_one_machine() -> None:
    """Its recipe names neither a folder nor a bucket."""
    recipe = read_included().manifest.origin.recipe
    assert (recipe["cache_dir"], recipe["bucket"]) == (None, None)
    assert "/" not in recipe["network"]["weights"]


def test_both_engines_have_the_same_weights() -> None:
    """The kernels are equal to the bit, in half precision."""
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(FOLDER / ONNX_FILE).graph.initializer}
    halves = [values for values in stored.values() if values.dtype == np.float16]
    with h5py.File(FOLDER / WEIGHTS_FILE) as file:
        arrays: list[NDArray[np.generic]] = []
        file.visititems(lambda _, item: arrays.append(item[()]) if isinstance(item, h5py.Dataset) else None)
    kernels = [values for values in arrays if values.ndim > 1]
    assert {values.dtype for values in kernels} == {np.dtype(np.float16)}
    assert sorted(values.tobytes() for values in kernels) == sorted(values.tobytes() for values in halves)
    rest = sum(values.size for values in stored.values() if values.dtype == np.float32)
    assert rest < 0.05 * sum(values.size for values in halves)


@pytest.mark.parametrize("name", sorted(FILES | {MANIFEST_FILE}))
def test_damage_is_found(copied: Path, name: str) -> None:
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match="Install the package again"):
        find_model()
    assert (check_model().state, check_model().fix) == ("failed", "Install the package again.")
    (copied / name).unlink()
    with pytest.raises(IntegrityError, match="Install the package again"):
        find_model()


def test_its_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It needs no bucket, and its version is the start of its manifest's sum."""
    monkeypatch.delenv("NUCLEUS_BUCKET", raising=False)
    monkeypatch.chdir(tmp_path)
    found = find_model()
    assert (found.folder, found.included) == (FOLDER, True)
    assert str(found) == f"nuclei@{hashlib.sha256((FOLDER / MANIFEST_FILE).read_bytes()).hexdigest()[:12]}"
    assert (check_model().state, check_model().found) == ("ok", f"{found} comes along, and its files match their sums")
    assert find_model("nuclei") == find_model(str(found)) == read_included(found.reference) == found
    with pytest.raises(ModelError, match=r"nuclei@0{12}.*another version of this package"):
        find_model(f"nuclei@{'0' * 12}")
    with pytest.raises(ModelError, match="the same one on all machines"):
        read_included(Reference("nuclei", "0" * 12))
    with pytest.raises(UriError, match="Expected the model that comes along, nuclei, or a bucket"):
        find_model("cells")
    assert [is_included(name) for name in ("nuclei@1", "nuclei@latest", "nuclei-1", "./nuclei", "nuclei@")] == [
        False
    ] * 5


def test_an_export_says_which_one_it_is(tmp_path: Path) -> None:
    """By the name that results have; a number would mean a version in the bucket."""
    done = CliRunner().invoke(cli, ["models", "export", "nuclei", str(tmp_path / "m.onnx"), "--format", "onnx"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"{read_included()} in ")


def test_a_models_folder_of_its_name_is_named_as_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "nuclei")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"Name the folder as \./nuclei"):
        find_model("nuclei")
    assert find_model().folder == FOLDER
    there = find_model("./nuclei")
    assert (there.folder, there.included, str(there)) == (Path("nuclei"), False, str(there.manifest))


def test_a_buckets_model_of_its_name(
    bucket: Bucket, model_files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is asked for with a version; a missing model names the one that comes along."""
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"it has no version.*Or use the model that comes along: nuclei"):
        find_model("nuclei@1")
    publish(bucket, "nuclei", model_files, origin())
    for name in ("nuclei@1", "nuclei@latest"):
        found = find_model(name)
        assert (str(found), found.included) == ("nuclei@1", False)
        assert found == find_model(name, str(bucket.uri))
    assert find_model("nuclei").included
    with pytest.raises(UsageError, match="leave bucket out"):
        nucleus.load(bucket=str(bucket.uri))
    assert pull(bucket, Reference("nuclei"), tmp_path / "pulled").version == 1


@pytest.fixture(scope="module")
def model() -> Model:
    found = nucleus.load()
    assert repr(found).startswith(f"<Model {read_included()}: ")
    return found


def means(model: Model, images: Iterable[tuple[NDArray[np.uint8], NDArray[np.integer]]]) -> dict[str, float]:
    """The means of the headline scores over images with true labels."""
    rows = []
    for image, labels in images:
        found = score_labels(labels, model.segment(image).labels, 0.0)
        rows.append((found.nuclei.ap[0], found.nuclei.ap[4], found.nuclei.mean_ap, found.pixels.iou))
    return dict(zip(GENERATED_SCORES, map(float, np.mean(rows, axis=0)), strict=True))


def test_it_finds_generated_nuclei(model: Model) -> None:
    found = means(model, (generated_image(seed, 160, 160) for seed in GENERATED))
    assert {name: found[name] for name, least in GENERATED_SCORES.items() if found[name] < least} == {}, found


def test_haze_costs_little(model: Model, tmp_path: Path) -> None:
    even, labels = generated_image(9002, 160, 160)
    hazy = even + 4.0 * even.max() * np.linspace(0, 1, 160)[np.newaxis, :, np.newaxis]
    image = np.rint(hazy * 255 / hazy.max()).astype(np.uint8)
    reached = means(model, [(even, labels)])["AP.5"]
    assert means(model, [(image, labels)])["AP.5"] >= reached - 0.1
    assert means(nucleus.load(as_is=True), [(image, labels)])["AP.5"] < reached - 0.1
    (tmp_path / "image.png").write_bytes(encode_png(image))
    for options, expected in (([], "haze"), (["--as-is", "--overwrite"], "")):
        run = CliRunner().invoke(
            cli, ["predict", str(tmp_path / "image.png"), "--out", str(tmp_path / "out"), *options]
        )
        assert run.exit_code == 0, run.output
        (row,) = csv.DictReader((tmp_path / "out/images.csv").read_text().splitlines())
        assert row["light"] == expected


def test_strong_noise_can_be_smoothed(model: Model) -> None:
    even, labels = generated_image(9004, 160, 160)
    noise = np.random.default_rng(4).normal(0, 0.3 * np.ptp(even), even.shape[:2])
    image = np.clip(even * 0.5 + 60 + noise[..., np.newaxis], 0, 255).astype(np.uint8)
    reached = means(model, [(even, labels)])["AP.5"]
    assert means(nucleus.load(denoise=True), [(image, labels)])["AP.5"] >= reached - 0.2
    assert means(model, [(image, labels)])["AP.5"] < reached - 0.4


def test_it_finds_nuclei_that_it_was_not_trained_on(model: Model, real_images: Path) -> None:
    with zipfile.ZipFile(real_images) as archive:
        found = means(model, (labelled(archive, name) for name in REAL))
    assert {name: found[name] for name, least in REAL_SCORES.items() if found[name] < least} == {}, found


def labelled(archive: zipfile.ZipFile, name: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    """An image of the zip and its labels, from a mask per nucleus."""
    files = [file for file in archive.namelist() if f"/{name}" in file and file.endswith(".png")]
    pixels = {file: cv2.imdecode(np.frombuffer(archive.read(file), np.uint8), cv2.IMREAD_COLOR_RGB) for file in files}
    (image,) = (found for file, found in pixels.items() if "/images/" in file)
    masks = [found[..., 0] > 0 for file, found in pixels.items() if "/masks/" in file]
    labels = np.zeros(image.shape[:2], np.int32)
    for number, mask in enumerate(masks, start=1):
        labels[mask] = number
    return image, labels
