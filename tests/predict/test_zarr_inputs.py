"""OME-Zarr in a prediction: which images there are, what they are called, and where their results and columns are."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile

from nucleus.data.images import encode_png
from nucleus.data.zarr_store import bucket_zarr
from nucleus.errors import ImageError, TransientStorageError, UsageError
from nucleus.predict import source
from nucleus.predict.bucket_images import ImageListing
from nucleus.predict.image_files import find_inputs, is_input, predict_files, stem_of
from nucleus.predict.measurement import IMAGE_COLUMNS, image_columns, nucleus_columns
from nucleus.predict.planes import plan_images
from nucleus.predict.source import open_source
from nucleus.storage.bucket import Bucket
from tests.data.test_zarr_buckets import failing, line, uploaded
from tests.faults.proxy import Fault, Proxy
from tests.predict.test_bucket_images import outcomes_of, predicted, settings_for
from tests.predict.test_predict import rows_of, small_model, spots
from tests.zarr_files import VERSIONS, write_group, write_image, write_plate

__all__ = ["line"]

versions = pytest.mark.parametrize("version", VERSIONS)


def written_plate(folder: Path, version: int = 3) -> Path:
    """A plate whose four fields have nuclei in their first channel, which is called DAPI."""
    plate = write_plate(folder, version, absent=["C/7"], wells=("A/1", "B/3", "C/7"))
    for number, field in enumerate(("A/1/0", "A/1/1", "B/3/0", "B/3/1")):
        shutil.rmtree(plate / field)
        grey = spots(90, 80, 7, count=6 + number).astype(np.uint16) * 16
        pixels = np.stack([grey, grey.T[:90, :80] if grey.T.shape == grey.shape else grey[::-1]])
        write_image(plate / field, pixels, version, axes="cyx", labels=("DAPI", "GFP"))
    return plate


def columns_of(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text().splitlines()[0].split(","))


@versions
def test_a_plate_is_an_input_with_its_fields(tmp_path: Path, version: int) -> None:
    plate = written_plate(tmp_path / "p.zarr", version)
    found = find_inputs([plate])
    names = ["p.zarr/A/1/0", "p.zarr/A/1/1", "p.zarr/B/3/0", "p.zarr/B/3/1"]
    assert list(found.images) == names
    assert ["C/7" in note for note in found.notes] == [True]

    out = tmp_path / "out"
    outcome = predict_files(small_model(), found.images, out, "DAPI")
    assert outcome.failures == {}
    assert list(outcome.counts) == names
    assert min(outcome.counts.values()) > 3
    counts = list(outcome.counts.values())
    assert outcome.plates == {"p": {("A", "1"): sum(counts[:2]) / 2, ("B", "3"): sum(counts[2:]) / 2}}
    assert columns_of(out / "nuclei.csv") == nucleus_columns(2, plate=True)
    assert columns_of(out / "images.csv") == image_columns(plate=True)
    places = [tuple(row[key] for key in ("plate", "row", "column", "field")) for row in rows_of(out / "images.csv")]
    assert places == [("p", *name.split("/")[1:]) for name in names]
    assert {row["plate"] for row in rows_of(out / "nuclei.csv")} == {"p"}

    tiff = tmp_path / "as.tif"
    tifffile.imwrite(tiff, spots(90, 80, 7, count=6).astype(np.uint16) * 16)
    predict_files(small_model(), [tiff], tmp_path / "tiff")
    assert (out / "p/A/1/0.labels.tif").read_bytes() == (tmp_path / "tiff" / "as.labels.tif").read_bytes()
    assert columns_of(tmp_path / "tiff" / "images.csv") == IMAGE_COLUMNS


def test_zarr_lies_beside_other_images_and_is_not_walked_through(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    image = write_image(folder / "sub" / "a.ome.zarr", spots(60, 70, 7, count=8), axes="yx")
    (image / "0" / "thumbnail.png").write_bytes(encode_png(spots(60, 70, 7, count=8)))
    (folder / "b.png").write_bytes(encode_png(spots(60, 70, 7, count=8)))
    write_group(folder / "bad.zarr", {}, 3)
    write_image(folder / ".hidden.zarr", spots(60, 70, 7), axes="yx")
    found = find_inputs([folder])
    assert list(found.images) == ["b.png", "sub/a.ome.zarr"]
    assert list(found.unread) == ["bad.zarr"]
    several = find_inputs([folder, written_plate(tmp_path / "p.zarr") / "B/3"])
    assert list(several.images)[2:] == ["p.zarr/B/3/0", "p.zarr/B/3/1"]
    predict_files(small_model(), found.images, tmp_path / "out")
    labels = [(tmp_path / "out" / name).read_bytes() for name in ("b.labels.tif", "sub/a.ome.labels.tif")]
    assert labels[0] == labels[1]
    with pytest.raises(UsageError, match="multiscales"):
        find_inputs([folder / "bad.zarr"])
    nameless = write_image(tmp_path / "6001240", spots(60, 70, 7), axes="yx")
    with pytest.raises(UsageError, match=r"ends in \.zarr"):
        find_inputs([nameless])


def test_names_of_results() -> None:
    stems = {"a.b.tif": "a.b", "x/a.zarr": "x/a", "x.zarr/B/3/0": "x/B/3/0", "p.ome.zarr/f.1.z3": "p.ome/f.1.z3"}
    assert {name: stem_of(name) for name in stems} == stems


@versions
def test_a_channel_is_chosen_by_name(tmp_path: Path, version: int) -> None:
    image = write_image(
        tmp_path / "a.zarr", np.zeros((2, 20, 30), np.uint8) + 9, version, axes="cyx", labels=("DAPI", "GFP")
    )
    assert open_source(image, "gfp").pixel_size == 0.5
    with pytest.raises(ImageError, match="0 'DAPI', 1 'GFP'"):
        open_source(image, "Hoechst")
    with pytest.raises(ImageError, match="--channel DAPI"):
        open_source(image)


def test_planes_are_chosen_as_in_other_stacks(tmp_path: Path) -> None:
    depths = np.stack([spots(60, 70, 7, count=count) for count in (3, 6)])
    image = write_image(tmp_path / "a.zarr", depths, axes="zyx")
    with pytest.raises(ImageError, match="2 depths"):
        open_source(image)
    planned = plan_images({"a.zarr": image}, source.PlaneOptions(z="all"))
    assert [each.output for each in planned.images] == ["a.z0.zarr", "a.z1.zarr"]
    out = tmp_path / "out"
    predict_files(small_model(), planned, out)
    assert [row["z"] for row in rows_of(out / "images.csv")] == ["0", "1"]
    assert (out / "a.z1.labels.tif").exists()


def test_a_large_image_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result, and never as a whole."""
    pixels = spots(300, 320, 7, count=60)
    image = write_image(tmp_path / "a.zarr", pixels, axes="yx")
    predict_files(small_model(), [image], tmp_path / "whole")
    monkeypatch.setattr(source, "_WHOLE_PIXELS", 1000)
    monkeypatch.setattr("nucleus.data.zarr_planes.PlaneReader.fill", None)
    predict_files(small_model(), [image], tmp_path / "parts")
    assert (tmp_path / "parts/a.labels.tif").read_bytes() == (tmp_path / "whole/a.labels.tif").read_bytes()


@versions
def test_a_plate_in_a_bucket(tmp_path: Path, bucket: Bucket, line: Proxy, version: int) -> None:
    """Its tables are those of the plate on disk; and its chunks are neither listed one by one nor read to find it."""
    plate = written_plate(tmp_path / "p.zarr", version)
    uploaded(plate, Bucket(bucket.uri / "images"))
    bucket.put("images/z.png", encode_png(spots(60, 70, 7, count=8)))
    settings = settings_for(bucket, channel=0)
    line.log.clear()
    listing = ImageListing(settings)
    images = [image.key for image in listing]
    fields = [f"p.zarr/{at}" for at in ("A/1/0", "A/1/1", "B/3/0", "B/3/1")]
    assert images == [*fields, "z.png"]
    assert ["C/7" in note for note in listing.notes] == [True]
    assert not [request.path for request in line.log if "/c/" in request.path]
    assert predicted(settings) == images

    predict_files(small_model(), find_inputs([plate]).images, tmp_path / "out", 0)
    for field in ("A/1/0", "B/3/1"):
        assert bucket.get(f"labels/p/{field}.labels.tif") == (tmp_path / "out/p" / f"{field}.labels.tif").read_bytes()
    bucket.download("labels/images.parquet", tmp_path / "images.parquet")
    table = pq.read_table(tmp_path / "images.parquet")
    assert tuple(table.column_names) == image_columns(plate=True)
    assert table["row"].to_pylist() == ["A", "A", "B", "B", None]
    bucket.download("labels/nuclei.parquet", tmp_path / "nuclei.parquet")
    assert tuple(pq.read_table(tmp_path / "nuclei.parquet").column_names) == nucleus_columns(2, plate=True)
    assert bucket.get("labels/p.plate.png") == (tmp_path / "out" / "p.plate.png").read_bytes()
    assert not is_input("labels/p.plate.png")


@versions
def test_a_field_is_predicted_again_if_its_pixels_change(tmp_path: Path, bucket: Bucket, version: int) -> None:
    plate = written_plate(tmp_path / "p.zarr", version)
    images = Bucket(bucket.uri / "images")
    uploaded(plate, images)
    settings = settings_for(bucket, channel=0).model_copy(update={"images": str(images.uri / "p.zarr/B/3")})
    assert predicted(settings) == ["p.zarr/B/3/0", "p.zarr/B/3/1"]
    assert predicted(settings) == []
    chunk = "p.zarr/B/3/1/0/" + ("c/1/0/0" if version == 3 else "1.0.0")
    images.put(chunk, images.get(chunk.replace("1/0/0", "0/0/0") if version == 3 else chunk.replace("/1.", "/0.")))
    assert predicted(settings) == ["p.zarr/B/3/1"]


def test_a_failed_read_ends_the_batch_and_writes_nothing(tmp_path: Path, bucket: Bucket, line: Proxy) -> None:
    images = Bucket(bucket.uri / "images")
    uploaded(write_image(tmp_path / "a.zarr", spots(60, 70, 7, count=8), axes="yx"), images)
    settings = settings_for(bucket)
    line.decide = failing("0/c/1/1", Fault.ERROR_500)
    with pytest.raises(TransientStorageError, match="0/c/1/1"):
        outcomes_of(settings)
    line.decide = failing("0/c/1/1", Fault.DENIED)
    (outcome,) = outcomes_of(settings)
    assert "a.zarr/0/c/1/1" in str(outcome.failure)
    line.decide = lambda _: None
    assert list(bucket.objects("labels/")) == []


def test_images_are_read_without_keys_and_results_written_with_them(
    tmp_path: Path, bucket: Bucket, line: Proxy
) -> None:
    images = Bucket(bucket.uri / "images")
    uploaded(write_image(tmp_path / "a.zarr", spots(60, 70, 7, count=8), axes="yx"), images)
    settings = settings_for(bucket)
    line.log.clear()
    outcomes_of(settings, small_model(), anonymous=True)
    reads = [request for request in line.log if request.method == "GET" and "/images/a.zarr" in request.path]
    assert reads
    assert not [request.path for request in reads if "authorization" in request.headers]
    writes = [request for request in line.log if request.method == "PUT"]
    assert writes
    assert all("authorization" in request.headers for request in writes)


def test_zarr_in_a_bucket_is_predicted_here(tmp_path: Path, bucket: Bucket) -> None:
    uploaded(written_plate(tmp_path / "p.zarr"), bucket)
    found = find_inputs([bucket_zarr(bucket, "p.zarr")])
    assert list(found.images) == [f"p.zarr/{at}" for at in ("A/1/0", "A/1/1", "B/3/0", "B/3/1")]
    outcome = predict_files(small_model(), found.images, tmp_path / "out", "DAPI")
    assert outcome.failures == {}
    here = predict_files(small_model(), find_inputs([tmp_path / "p.zarr"]).images, tmp_path / "here", "DAPI")
    assert outcome.counts == here.counts
    assert (tmp_path / "out" / "nuclei.csv").read_bytes() == (tmp_path / "here" / "nuclei.csv").read_bytes()
