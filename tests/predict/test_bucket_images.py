"""Images in a bucket, by a small network that finds bright pixels: which are done, what is written, and the tables."""

import http.client
import io
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile

from nucleus.data.images import encode_png
from nucleus.errors import OutputError, UsageError
from nucleus.predict import image_parts, part_tables
from nucleus.predict.bucket_images import (
    BucketImage,
    ImageListing,
    PredictionSettings,
    claim_output,
    stored_options,
)
from nucleus.predict.cells import Expansion
from nucleus.predict.image_files import predict_files
from nucleus.predict.image_parts import ImagePart, done_parts
from nucleus.predict.measurement import IMAGE_COLUMNS, nucleus_columns
from nucleus.predict.model import Model, PredictionOptions
from nucleus.predict.part_prediction import ImageOutcome, PartPredictor
from nucleus.predict.part_tables import clear_tables, join_share, table_shares, write_plates
from nucleus.storage.bucket import Bucket
from tests.predict.test_predict import rows_of, small_model, spots


def settings_for(bucket: Bucket, **changes: object) -> PredictionSettings:
    places = {"images": str(bucket.uri / "images"), "out": str(bucket.uri / "labels"), "registry": str(bucket.uri)}
    return PredictionSettings(**{"model": "m@1", **places, **changes})


def images_of(settings: PredictionSettings) -> list[BucketImage]:
    return list(ImageListing(settings))


def outcomes_of(
    settings: PredictionSettings, model: Model | None = None, *, anonymous: bool = False
) -> list[ImageOutcome]:
    """Predict what is not done yet, in this process, and join the tables; the outcomes of what was predicted now."""
    worker = PartPredictor(settings, model or small_model(settings.options), anonymous=anonymous)
    stored, tables, outcomes = done_parts(settings), [], list[ImageOutcome]()
    for part in image_parts.parts_of_listing(ImageListing(settings, anonymous=anonymous)):
        known = ImagePart(part.place, part.images, stored.get(part.place, ()))
        name = known.done
        if name is None:
            found = worker.predict(known)
            name, outcomes = found.table, outcomes + found.images
        if name is not None:
            tables.append((name, len(part.images)))
    shares = table_shares(tables)
    clear_tables(settings, shares)
    for share in shares:
        write_plates(settings, join_share(settings, share))
    return outcomes


def predicted(settings: PredictionSettings) -> list[str]:
    """Predict what is not done yet; the keys of what was."""
    return sorted(outcome.key for outcome in outcomes_of(settings))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A grey PNG, a TIFF with a pixel size and an RGB image."""
    grey = spots(120, 100, 7, count=12)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode_png(grey))
    tifffile.imwrite(folder / "b.tif", grey.T.copy(), imagej=True, resolution=(2.0, 2.0), metadata={"unit": "um"})
    (folder / "c.png").write_bytes(encode_png(np.dstack([grey // 2, grey, grey])))
    return folder


def test_the_same_as_from_files(bucket: Bucket, pictures: Path, tmp_path: Path) -> None:
    for file in pictures.iterdir():
        bucket.put(f"images/{file.name}", file)
    formats = ("labels", "csv", "overlay")
    assert predicted(settings_for(bucket, expand="3px", formats=formats)) == ["a.png", "b.tif", "c.png"]
    out = tmp_path / "out"
    predict_files(small_model(), sorted(pictures.iterdir()), out, formats=formats, expansion=Expansion(3))
    images = [f"{stem}.{ending}" for stem in "abc" for ending in ("labels.tif", "cells.tif", "overlay.png")]
    for name in (*images, "nuclei.csv", "images.csv"):
        assert bucket.get(f"labels/{name}") == (out / name).read_bytes()
    for table, columns in (("nuclei", nucleus_columns(3, cells=True)), ("images", IMAGE_COLUMNS)):
        bucket.download(f"labels/{table}.parquet", tmp_path / f"{table}.parquet")
        found = pq.read_table(tmp_path / f"{table}.parquet")
        assert tuple(found.column_names) == columns
        told = [{key: "" if value is None else str(value) for key, value in row.items()} for row in found.to_pylist()]
        assert told == rows_of(out / f"{table}.csv")
        assert len(told) > 2


def test_what_is_done_is_left_out(bucket: Bucket, pictures: Path) -> None:
    for key in ("plate/a.png", "plate/b.tif"):
        bucket.put(f"images/{key}", pictures / key.rpartition("/")[2])
    bucket.put("images/broken.png", b"no image")
    bucket.put("images/notes.txt", b"not looked at")
    settings = settings_for(bucket)
    assert predicted(settings) == ["broken.png", "plate/a.png", "plate/b.tif"]
    assert bucket.find("labels/plate/a.labels.tif")
    assert bucket.find("labels/broken.labels.tif") is None
    assert predicted(settings) == ["broken.png"]
    bucket.put("images/plate/a.png", pictures / "c.png")
    bucket.put("images/broken.png", pictures / "a.png")
    assert predicted(settings) == ["broken.png", "plate/a.png"]
    assert predicted(settings) == []
    assert predicted(settings_for(bucket, model="m@2")) == ["broken.png", "plate/a.png", "plate/b.tif"]
    assert predicted(settings_for(bucket, channel=0)) == ["broken.png", "plate/a.png", "plate/b.tif"]


def test_requests_for_each_image(bucket: Bucket, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for an image and one for each of its results; one more for a part; and what is done is listed once."""
    monkeypatch.setattr(image_parts, "IMAGES_OF_A_PART", 1 << 48)  # all are in one part
    for number in range(5):
        bucket.put(f"images/{number}.png", pictures / "a.png")
    settings = settings_for(bucket)
    requests, pages = list[str](), list[str]()
    sent, page = http.client.HTTPConnection.putrequest, Bucket._page

    def counted(line: http.client.HTTPConnection, method: str, path: str, *rest: Any, **headers: Any) -> None:
        if "?" not in path:  # listings are counted by themselves
            requests.append(f"{method} {path.rpartition(bucket.uri.key)[2].lstrip('/').partition('/')[0]}")
        sent(line, method, path, *rest, **headers)

    def listed(of: Bucket, arguments: dict[str, Any]) -> Any:
        pages.append(arguments["Prefix"].removeprefix(f"{bucket.uri.key}/"))
        return page(of, arguments)

    part = image_parts.parts_of_listing(ImageListing(settings))
    worker = PartPredictor(settings, small_model(settings.options))
    with monkeypatch.context() as patched:
        patched.setattr(http.client.HTTPConnection, "putrequest", counted)  # called by urllib3 too
        patched.setattr(Bucket, "put", None)
        worker.predict(next(part))
    assert Counter(requests) == {"GET images": 5, "PUT labels": 2 * 5 + 1}
    monkeypatch.setattr(Bucket, "_page", listed)
    assert predicted(settings) == []
    assert len([prefix for prefix in pages if prefix.startswith("images/")]) == 1
    assert pages.count(f"labels/{settings.tables}/") == 1


def test_an_image_more_is_all_that_is_predicted(
    bucket: Bucket, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part that it falls into keeps what it has of the others; one table is left of it."""
    monkeypatch.setattr(image_parts, "IMAGES_OF_A_PART", 1 << 48)  # all are in one part
    for key in ("a.png", "c.png"):
        bucket.put(f"images/{key}", pictures / key)
    settings = settings_for(bucket)
    assert predicted(settings) == ["a.png", "c.png"]
    bucket.put("images/b.tif", pictures / "b.tif")
    assert predicted(settings) == ["b.tif"]
    bucket.delete("images/a.png")
    assert predicted(settings) == []
    assert len(list(bucket.objects("labels/parts/"))) == 1
    assert pq.read_table(io.BytesIO(bucket.get("labels/images.parquet")))["image"].to_pylist() == ["b.tif", "c.png"]
    again = pq.read_table(io.BytesIO(bucket.get("labels/nuclei.parquet")))
    monkeypatch.undo()
    alone = settings_for(bucket, out=str(bucket.uri / "alone"))
    assert predicted(alone) == ["b.tif", "c.png"]
    assert pq.read_table(io.BytesIO(bucket.get("alone/nuclei.parquet"))).equals(again)


def test_tables_of_many_images_are_datasets(
    bucket: Bucket, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with the columns that any needs; never beside the tables of a prediction of few."""
    for number, name in enumerate(["a.png", "b.tif", "c.png", "a.png"]):  # of one and of three channels
        bucket.put(f"images/{number}{name}", pictures / name)
    settings = settings_for(bucket, formats=("labels", "csv"))
    outcomes_of(settings)
    whole = {name: bucket.get(f"labels/{name}.parquet") for name in ("nuclei", "images")}
    monkeypatch.setattr(image_parts, "IMAGES_OF_A_PART", 1)
    monkeypatch.setattr(part_tables, "IMAGES_OF_A_TABLE", 1)
    outcomes_of(settings)
    names = {item.key for item in bucket.objects("labels/") if item.key.count("/") < 3}
    for table in ("nuclei", "images"):
        parts = [f"labels/{table}/part-0000{number}" for number in range(4)]
        assert {f"{part}.{ending}" for part in parts for ending in ("parquet", "csv")} <= names
        assert f"labels/{table}.parquet" not in names
        assert f"labels/{table}.csv" not in names
        for part in parts:
            bucket.download(f"{part}.parquet", tmp_path / table / f"{Path(part).name}.parquet")
        assert pq.read_table(tmp_path / table).equals(pq.read_table(io.BytesIO(whole[table])))
        assert pq.read_schema(tmp_path / table / "part-00000.parquet") == pq.read_schema(io.BytesIO(whole[table]))
    monkeypatch.undo()
    outcomes_of(settings)
    names = {item.key for item in bucket.objects("labels/") if item.key.count("/") < 3}
    assert not [key for key in names if "part-" in key]
    assert {"labels/nuclei.parquet", "labels/images.csv"} <= names


def test_results_of_other_nuclei_do_not_stay(bucket: Bucket, pictures: Path) -> None:
    """Of an image that can no longer be read, and in formats that are not written again."""
    for key in ("a.png", "b.png"):
        bucket.put(f"images/{key}", pictures / "a.png")
    outcomes_of(settings_for(bucket, formats=("labels", "geojson", "zarr")))
    bucket.put("labels/b.more.labels.tif", b"of another image")
    bucket.put("images/b.png", b"no image")
    settings = settings_for(bucket, formats=("labels",))
    images = tuple(images_of(settings))
    PartPredictor(settings, small_model()).predict(ImagePart("0" * 12, images))
    keys = {each.key.removeprefix("labels/").partition(".zarr/")[0] for each in bucket.objects("labels/")}
    assert {key for key in keys if key[1] == "."} == {
        *("a.labels.tif", "a.geojson", "a.labels"),
        "b.more.labels.tif",
    }
    PartPredictor(settings, small_model(), overwrite=True).predict(ImagePart("0" * 12, images))
    assert {each.key for each in bucket.objects("labels/a")} == {"labels/a.labels.tif"}


def test_damaged_images_are_named_as_in_the_bucket(bucket: Bucket, pictures: Path) -> None:
    bucket.put("images/a.png", pictures / "a.png")
    bucket.put("images/cut.png", (pictures / "a.png").read_bytes()[:300])
    settings = settings_for(bucket)
    images = (*images_of(settings), BucketImage("gone.png", "0", 1))
    good, *bad = PartPredictor(settings, small_model()).predict(ImagePart("0" * 12, images)).images
    assert (good.key, good.failure) == ("a.png", None)
    assert good.nuclei
    assert [outcome.key for outcome in bad] == ["cut.png", "gone.png"]
    for outcome in bad:
        assert str(bucket.uri / "images" / outcome.key) in str(outcome.failure)
        assert "nucleus-batch" not in str(outcome.failure)


def test_results_with_other_settings_are_not_replaced(bucket: Bucket) -> None:
    settings, other = settings_for(bucket), settings_for(bucket, diameter=20.0)
    for _ in range(2):
        with claim_output(settings, overwrite=False) as claim:
            claim.check()
    with pytest.raises(UsageError, match="--overwrite"), claim_output(other, overwrite=False):
        pass
    with claim_output(other, overwrite=True):
        pass
    with pytest.raises(UsageError, match="m@1"), claim_output(settings, overwrite=False):
        pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_prediction_at_a_time(overwrite: bool, bucket: Bucket) -> None:
    """Also with the same settings: the tables of the second would replace those of the first."""
    settings = settings_for(bucket)
    with claim_output(settings, overwrite=False):
        with pytest.raises(OutputError, match="found one: process"), claim_output(settings, overwrite=overwrite):
            pass
        other = settings_for(bucket, diameter=20.0)
        with pytest.raises(OutputError), claim_output(other, overwrite=overwrite):
            pass
    with pytest.raises(UsageError, match="--overwrite"), claim_output(other, overwrite=False):  # its settings stay
        pass


def test_images_that_cannot_be_told_apart(bucket: Bucket) -> None:
    settings = settings_for(bucket)
    with pytest.raises(UsageError, match="found none"):
        images_of(settings)
    for key in ("a/x.png", "b/x.png", "a/x.overlay.png"):
        bucket.put(f"images/{key}", b"")
    assert [image.key for image in images_of(settings)] == ["a/x.png", "b/x.png"]
    bucket.put("images/a/x.tif", b"")
    with pytest.raises(UsageError, match="both write a/x"):
        images_of(settings)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("a/x.jpg", "a/x.jpg.png", "a/x.tif"), "both write a/x.labels"),
        (("a.s0.png", "a.s0z.png", "a.tif"), "'a' and 'a.s0'"),
        (("a.png", "a.z3.tif"), "'a' and 'a.z3'"),
    ],
)
def test_names_are_told_apart_as_they_are_listed(keys: tuple[str, ...], message: str, bucket: Bucket) -> None:
    """Those with the same results need not follow each other."""
    for key in keys:
        bucket.put(f"images/{key}", b"")
    with pytest.raises(UsageError, match=message):
        images_of(settings_for(bucket))
    bucket.delete(f"images/{keys[-1]}")
    assert [image.key for image in images_of(settings_for(bucket))] == sorted(keys[:-1])


GOOD_KEYS = ("a b.png", "p+q.png", "50%20x.png", "%2F.png", "é細.png", "q?x#y&z=1.png", "it's.png", "b..png", "a/b.png")
ODD_KEYS = {
    "two//slashes.png": "an empty part",
    "/a b.png": "an empty part",
    "x.png/": "an empty part",
    "a/./b.png": "a part '.'",
    "a/../a b.png": "a part '..'",
    "line\nbreak.png": "a control character",
}
PASSED_OVER = ("folder/", "folder.png/", "._a.png", ".hidden/a.png", "__MACOSX/a.png", "notes.txt", ".a.zarr/0/0")


def test_keys_of_every_kind(bucket: Bucket, pictures: Path) -> None:
    """Each image is predicted from its own bytes, or told; `a//b` never stands for `a/b`, which is another object."""
    whole = (pictures / "a.png").read_bytes()
    contents = dict.fromkeys(GOOD_KEYS, whole) | dict.fromkeys(ODD_KEYS, b"another") | dict.fromkeys(PASSED_OVER, b"")
    for key, data in contents.items():
        bucket._client.put_object(Bucket=bucket.uri.bucket, Key=f"{bucket.uri.key}/images/{key}", Body=data)
    bucket.put("images/empty.png", b"")
    bucket.put("images/a/b.czi", b"")
    settings = settings_for(bucket)
    listing = ImageListing(settings)
    assert {image.key for image in listing} == {*GOOD_KEYS, "empty.png"}
    unread = listing.unread.kept
    assert "found Zeiss CZI" in unread.pop("a/b.czi")
    assert set(unread) == set(ODD_KEYS)
    for key, reason in ODD_KEYS.items():
        assert reason in unread[key]
        assert repr(f"{settings.images}/{key}") in unread[key]
    outcomes = outcomes_of(settings)
    assert [outcome.key for outcome in outcomes if outcome.failure] == ["empty.png"]
    assert len({outcome.nuclei for outcome in outcomes if outcome.nuclei}) == 1
    for key in GOOD_KEYS:
        assert bucket.find(f"labels/{key.removesuffix('.png')}.labels.tif"), key


def test_keys_that_leave_no_room_for_their_outputs(bucket: Bucket) -> None:
    below = len(f"{bucket.uri.key}/images/")
    bucket.put(f"images/{'x' * (1024 - below - 4)}.png", b"x")
    bucket.put("images/short.png", b"x")
    listing = ImageListing(settings_for(bucket))
    assert [image.key for image in listing] == ["short.png"]
    assert all("1,024 bytes" in reason for reason in listing.unread.kept.values())
    assert listing.unread.count == 1


def test_each_option_that_changes_results_is_stored() -> None:
    """A new option of the model that the settings lacked would have no effect in a bucket."""
    kept = stored_options(PredictionOptions(diameter=20.0, pixel_size=0.5, turns=True, as_is=True, denoise=True))
    assert {field.name for field in fields(PredictionOptions)} - {"fit", "block_side", "engine"} == {*kept}
    stored = PredictionSettings(images="s3://b/i", out="s3://b/o", model="m@1", registry=None, **kept)
    assert stored_options(stored.options) == kept
    assert stored_options(PredictionOptions()) != kept
