"""Predictions of stacks, time series and files of several images: each plane is predicted as a file of its own is."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile
from numpy.typing import NDArray

from nucleus.data.images import encode_png
from nucleus.data.stacks import PlaneOptions
from nucleus.errors import ImageError, UsageError
from nucleus.predict import source as sources
from nucleus.predict.bucket_images import PredictionSettings
from nucleus.predict.image_files import PredictedFiles, check_outputs, predict_files
from nucleus.predict.planes import plan_images
from nucleus.predict.source import open_source
from nucleus.predict.table_files import IMAGES_TABLE, NUCLEI_TABLE
from nucleus.storage.bucket import Bucket
from tests.predict import test_bucket_images
from tests.predict.test_bucket_images import images_of, settings_for
from tests.predict.test_predict import rows_of, small_model, spots

T, Z = 2, 3
Pixels = NDArray[np.uint8]


def series() -> Pixels:
    """T x Z x 2 x H x W: noise, and discs that are other ones in each plane."""
    discs = np.stack([[spots(60, 70, 10 * time + depth, count=8) for depth in range(Z)] for time in range(T)])
    return np.stack([discs // 3, discs], axis=2)


def ome(path: Path, pixels: Pixels, axes: str = "TZCYX", **options: Any) -> Path:
    metadata = {"axes": axes, "Channel": {"Name": ["GFP", "DAPI"]}, "PhysicalSizeX": 0.5}
    tifffile.imwrite(path, pixels, metadata=metadata, photometric="minisblack", ome=True, **options)
    return path


def predicted(files: list[Path], out: Path, options: PlaneOptions, channel: int | str | None = None) -> PredictedFiles:
    planned = plan_images({file.name: file for file in files}, options)
    return predict_files(small_model(), planned, out, channel)


def alone(plane: Pixels, folder: Path, channel: int | None = None) -> tuple[Pixels, pd.DataFrame]:
    """The labels and the table of a plane that is saved as a file."""
    folder.mkdir(exist_ok=True)
    if plane.ndim == 3:
        ome(folder / "x.tif", plane, "CYX")
    else:
        tifffile.imwrite(folder / "x.tif", plane)
    predict_files(small_model(), [folder / "x.tif"], folder / "out", channel)
    return tifffile.imread(folder / "out" / "x.labels.tif"), pd.read_csv(folder / "out" / NUCLEI_TABLE)


def same_table(one: pd.DataFrame, two: pd.DataFrame) -> None:
    columns = ["image", "z", "t"]
    pd.testing.assert_frame_equal(one.drop(columns=columns).reset_index(drop=True), two.drop(columns=columns))


def test_each_plane_is_what_it_is_as_a_file(tmp_path: Path) -> None:
    pixels = series()
    file = ome(tmp_path / "x.ome.tif", pixels, tile=(32, 32), compression="zlib")
    found = predicted([file], tmp_path / "out", PlaneOptions("all", "all"), "DAPI")
    assert found.failures == {}
    assert list(found.counts) == [f"x.ome.tif z={depth} t={time}" for time in range(T) for depth in range(Z)]
    table, images = (pd.read_csv(tmp_path / "out" / name) for name in (NUCLEI_TABLE, IMAGES_TABLE))
    assert list(zip(images["image"], images["z"], images["t"], strict=True)) == [
        ("x.ome.tif", depth, time) for time in range(T) for depth in range(Z)
    ]
    assert list(images["nuclei"]) == list(found.counts.values())
    for time, depth in np.ndindex(T, Z):
        labels, rows = alone(pixels[time, depth], tmp_path / "alone", channel=1)
        assert labels.max() > 2
        assert (tifffile.imread(tmp_path / "out" / f"x.ome.z{depth}.t{time}.labels.tif") == labels).all()
        assert (tmp_path / "out" / f"x.ome.z{depth}.t{time}.overlay.png").exists()
        same_table(table[(table["z"] == depth) & (table["t"] == time)], rows)
    assert len(list((tmp_path / "out").iterdir())) == 2 * T * Z + 2


@pytest.mark.parametrize(
    ("options", "endings", "expected"),
    [
        (PlaneOptions("max", 1), [""], [lambda pixels: pixels[1].max(axis=0)]),
        (PlaneOptions("mean", 0), [""], [lambda pixels: np.rint(pixels[0].mean(axis=0)).astype(np.uint8)]),
        (PlaneOptions(2, "all"), [".t0", ".t1"], [lambda pixels: pixels[0, 2], lambda pixels: pixels[1, 2]]),
        (PlaneOptions("all", 0), [".z0", ".z1", ".z2"], [lambda pixels, z=z: pixels[0, z] for z in range(Z)]),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_choices_and_names(
    options: PlaneOptions,
    endings: list[str],
    expected: list[Callable[[Pixels], Pixels]],
    large: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = series()
    if large:
        monkeypatch.setattr(sources, "_WHOLE_PIXELS", 0)
    file = ome(tmp_path / "x.tif", pixels)
    assert predicted([file], tmp_path / "out", options, 1).failures == {}
    names = {path.name.removesuffix(".labels.tif") for path in (tmp_path / "out").glob("*.labels.tif")}
    assert names == {f"x{ending}" for ending in endings}
    for ending, plane in zip(endings, expected, strict=True):
        labels, _ = alone(plane(pixels), tmp_path / "alone", channel=1)
        assert (tifffile.imread(tmp_path / "out" / f"x{ending}.labels.tif") == labels).all()


def test_columns_z_and_t(tmp_path: Path) -> None:
    """The best depth is told; projections, and images of one depth and time, have none."""
    stack = tmp_path / "stack.tif"
    tifffile.imwrite(
        stack, np.stack([np.minimum(spots(60, 70, 7), 150), spots(60, 70, 7)]), imagej=True, metadata={"axes": "ZYX"}
    )
    times = tmp_path / "times.tif"
    tifffile.imwrite(times, np.stack([spots(60, 70, 7)] * 2), imagej=True, metadata={"axes": "TYX"})
    (tmp_path / "one.png").write_bytes(encode_png(spots(60, 70, 7)))
    files = [stack, times, tmp_path / "one.png"]
    for z, expected in (("best", "1"), (0, "0"), ("max", "")):
        out = tmp_path / f"out{z}"
        predict_files(small_model(), plan_images({"stack.tif": stack}, PlaneOptions(z)), out)
        for table in (IMAGES_TABLE, NUCLEI_TABLE):
            assert {(row["image"], row["z"], row["t"]) for row in rows_of(out / table)} == {("stack.tif", expected, "")}
    predicted(files, tmp_path / "out", PlaneOptions("max", "all"))
    found = [(row["image"], row["z"], row["t"]) for row in rows_of(tmp_path / "out" / IMAGES_TABLE)]
    assert found == [("stack.tif", "", ""), ("times.tif", "", "0"), ("times.tif", "", "1"), ("one.png", "", "")]


def several(path: Path, *planes: Pixels) -> Path:
    with tifffile.TiffWriter(path, ome=True) as writer:
        for plane in planes:
            writer.write(plane, photometric="minisblack")
    return path


def test_several_images_in_a_file_are_images(tmp_path: Path) -> None:
    planes = [spots(60, 70, 7), spots(50, 40, 8), spots(60, 70, 9)]
    found = predict_files(small_model(), [several(tmp_path / "x.tif", *planes)], tmp_path / "out")
    assert list(found.counts) == ["x.tif#0", "x.tif#1", "x.tif#2"]
    assert [row["image"] for row in rows_of(tmp_path / "out" / IMAGES_TABLE)] == list(found.counts)
    for number, plane in enumerate(planes):
        labels, _ = alone(plane, tmp_path / "alone")
        assert (tifffile.imread(tmp_path / "out" / f"x.s{number}.labels.tif") == labels).all()


def test_one_of_several_images_is_chosen_by_number_or_name(tmp_path: Path) -> None:
    planes = {"near": spots(60, 70, 7), "far": spots(50, 40, 8)}
    with tifffile.TiffWriter(tmp_path / "x.ome.tif", ome=True) as writer:
        for name, plane in planes.items():
            writer.write(plane, metadata={"Name": name})
    for series, number, name in ((1, 1, "far"), ("near", 0, "near")):
        out = tmp_path / name
        assert list(predicted([tmp_path / "x.ome.tif"], out, PlaneOptions(series=series)).counts) == [
            f"x.ome.tif#{number}"
        ]
        assert (tifffile.imread(out / "x.ome.labels.tif") == alone(planes[name], tmp_path / "alone")[0]).all()
    for wrong in (2, "else"):
        (said,) = predicted([tmp_path / "x.ome.tif"], tmp_path / "no", PlaneOptions(series=wrong)).failures.values()
        assert "0 'near', 1 'far'" in said
    assert len(predicted([tmp_path / "x.ome.tif"], tmp_path / "all", PlaneOptions(series="all")).counts) == 2
    with pytest.raises(UsageError, match="series"):
        PlaneOptions(series=-1)


def damaged(path: Path, planes: Pixels, plane: int) -> Path:
    """A file with a page whose strip lies outside of it."""
    with tifffile.TiffWriter(path) as writer:
        for page in planes:
            writer.write(page, metadata=None, contiguous=False, rowsperstrip=1000)
    with tifffile.TiffFile(path) as file:
        place = file.pages[plane].aspage().tags["StripByteCounts"].valueoffset
    data = bytearray(path.read_bytes())
    data[place : place + 4] = struct.pack("<I", 1 << 30)
    path.write_bytes(data)
    return path


def test_a_damaged_plane_fails_alone(tmp_path: Path) -> None:
    planes = np.stack([spots(60, 70, seed) for seed in range(4)])
    for plane in (0, 2):
        file, out = damaged(tmp_path / "x.tif", planes, plane), tmp_path / f"out{plane}"
        found = predicted([file], out, PlaneOptions("all"))
        assert list(found.counts) == [f"x.tif z={depth}" for depth in range(4) if depth != plane]
        ((title, reason),) = found.failures.items()
        assert title == f"x.tif z={plane}"
        assert f"strips or tiles in {file}, z {plane};" in reason
        assert [row["z"] for row in rows_of(out / IMAGES_TABLE)] == [str(depth) for depth in range(4) if depth != plane]
    model = small_model()
    found_planes = model.segment_planes(file)
    assert [next(found_planes).z, next(found_planes).z] == [0, 1]
    with pytest.raises(ImageError, match="z 2"):
        next(found_planes)
    assert [segmentation.z for segmentation in found_planes] == [3]


def test_files_without_a_choice_fail_alone(tmp_path: Path) -> None:
    file = ome(tmp_path / "x.tif", series())
    (tmp_path / "one.png").write_bytes(encode_png(spots(60, 70, 7)))
    found = predict_files(small_model(), [file, tmp_path / "one.png"], tmp_path / "out")
    assert list(found.counts) == ["one.png"]
    assert "--z max" in found.failures["x.tif"]
    assert "--t 0" in found.failures["x.tif"]


def test_the_same_name_for_a_plane_and_a_file(tmp_path: Path) -> None:
    stack = tmp_path / "x.tif"
    tifffile.imwrite(stack, np.stack([spots(60, 70, 7)] * 2), imagej=True, metadata={"axes": "ZYX"})
    (tmp_path / "x.z1.png").write_bytes(encode_png(spots(60, 70, 7)))
    files = {path.name: path for path in (stack, tmp_path / "x.z1.png")}
    with pytest.raises(UsageError, match=r"found x\.tif z=1 and x\.z1\.png, which would both write x\.z1\.labels\.tif"):
        predict_files(small_model(), plan_images(files, PlaneOptions("all")), tmp_path / "out")
    planned = plan_images({"x.tif": stack}, PlaneOptions("all"))
    predict_files(small_model(), planned, tmp_path / "out")
    (tmp_path / "out" / IMAGES_TABLE).unlink()
    (tmp_path / "out" / NUCLEI_TABLE).unlink()
    with pytest.raises(UsageError, match=r"found x\.z0\.labels\.tif and 3 more"):
        check_outputs([image.output for image in planned.images], tmp_path / "out")


def test_segment_takes_a_plane(tmp_path: Path) -> None:
    pixels, model = series(), small_model()
    file = ome(tmp_path / "x.tif", pixels)
    expected = model.segment(np.moveaxis(pixels[1, 2], 0, -1)[..., [1]])
    found = model.segment(file, channel="DAPI", z=2, t=1)
    assert (found.labels == expected.labels).all()
    assert (found.image, found.z, found.t, repr(found)[:31]) == ("x.tif", 2, 1, "<Segmentation of x.tif z=2 t=1:")
    assert set(zip(found.table["image"], found.table["z"], found.table["t"], strict=True)) == {("x.tif", 2, 1)}
    best = model.segment(file, channel=1, z="best", t=0)
    assert best.z in range(Z)
    planes = list(model.segment_planes(file, channel="DAPI"))
    assert [(each.z, each.t) for each in planes] == [(depth, time) for time in range(T) for depth in range(Z)]
    assert (planes[5].labels == expected.labels).all()
    assert [(each.z, each.t) for each in model.segment_planes(file, channel=1, z="max")] == [(None, 0), (None, 1)]
    for options, said in (
        ({}, 'z="max", t=0'),
        ({"z": "all", "t": 0}, r"found 3\. Add: --z and --t with a number.*Model.segment_planes"),
        ({"z": 0, "t": 0, "channel": None}, r"which has 2: 'GFP', 'DAPI'.*channel=\"GFP\""),
        ({"z": 0, "t": 0, "channel": "Cy5"}, "found the channels 0 'GFP', 1 'DAPI'"),
        ({"z": 0, "t": 0, "channel": 2}, "Expected channel 2 in .*it has 2, counted from 0: 'GFP', 'DAPI'"),
    ):
        with pytest.raises(ImageError, match=said):
            model.segment(file, **{"channel": 1, **options})
    with pytest.raises(ImageError, match=r"found 2\. In Python: Model.segment_planes"):
        model.segment(several(tmp_path / "y.tif", pixels[0, 0, 0], pixels[0, 0, 1]))
    for options in ({"z": 0}, {"t": 0}, {"channel": "DAPI"}):
        with pytest.raises(UsageError, match="found an array"):
            model.segment(pixels[0, 0, 0], **options)


def outcomes_of(settings: PredictionSettings) -> dict[str, str | None]:
    return {outcome.title: outcome.failure for outcome in test_bucket_images.outcomes_of(settings, small_model())}


def test_stacks_in_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    """As on disk; more planes than are opened at once, and other images beside them."""
    planes = np.stack([spots(60, 70, seed) for seed in range(11)])
    tifffile.imwrite(tmp_path / "a.tif", planes, imagej=True, metadata={"axes": "ZYX"})
    several(tmp_path / "b.tif", planes[3], planes[4])
    tifffile.imwrite(tmp_path / "c.tif", planes[5])
    files = [tmp_path / name for name in ("a.tif", "b.tif", "c.tif")]
    for file in files:
        bucket.put(f"images/{file.name}", file)
    settings = settings_for(bucket, z="all")
    titles = [*(f"a.tif z={depth}" for depth in range(11)), "b.tif#0", "b.tif#1", "c.tif"]
    assert outcomes_of(settings) == dict.fromkeys(titles)
    assert outcomes_of(settings) == {}
    out = tmp_path / "out"
    assert list(predicted(files, out, PlaneOptions("all")).counts) == titles
    for path in [*out.glob("*.labels.tif"), *out.glob("*.overlay.png")]:
        assert bucket.get(f"labels/{path.name}") == path.read_bytes()
    for table in ("nuclei", "images"):
        bucket.download(f"labels/{table}.parquet", tmp_path / f"{table}.parquet")
        rows = pq.read_table(tmp_path / f"{table}.parquet").to_pylist()
        told = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
        assert told == rows_of(out / f"{table}.csv")
    assert settings_for(bucket, z=3, t="all", channel="DAPI").planes == PlaneOptions(3, "all")


def test_a_damaged_plane_in_a_bucket_is_tried_again(bucket: Bucket, tmp_path: Path) -> None:
    planes = np.stack([spots(60, 70, seed) for seed in range(4)])
    bucket.put("images/x.tif", damaged(tmp_path / "x.tif", planes, 2))
    settings = settings_for(bucket, z="all")
    for _ in range(2):
        found = outcomes_of(settings)
        assert [title for title, failure in found.items() if failure] == ["x.tif z=2"]
        assert f"{settings.images}/x.tif, z 2;" in str(found["x.tif z=2"])
        bucket.download("labels/images.parquet", tmp_path / "images.parquet")
        assert pq.read_table(tmp_path / "images.parquet")["z"].to_pylist() == [0, 1, 3]
    assert bucket.find("labels/x.z2.labels.tif") is None
    assert bucket.find("labels/x.z3.labels.tif")


def test_keys_like_those_of_planes_are_refused(bucket: Bucket) -> None:
    for key in ("a.tif", "a.z3.t0.tif", "b.z1.tif"):
        bucket.put(f"images/{key}", b"x")
    with pytest.raises(UsageError, match=r"'a' and 'a\.z3\.t0'"):
        images_of(settings_for(bucket, z="all"))
    bucket.delete("images/a.tif")
    assert len(images_of(settings_for(bucket, z="all"))) == 2


def test_planes_that_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_WHOLE_PIXELS", 0)
    pixels = series()
    whole = slice(0, 60), slice(0, 70)
    for options in ({}, {"compression": "zlib", "tile": (16, 16)}, {"compression": "zlib", "rowsperstrip": 7}):
        file = ome(tmp_path / "x.tif", pixels, **options)
        for depth in range(Z):
            source = open_source(file, "DAPI", PlaneOptions(depth, 1))
            assert (source.read_channels(*whole) == np.moveaxis(pixels[1, depth], 0, -1)).all()
            assert (source.read(slice(9, 30), slice(5, 70))[..., 0] == pixels[1, depth, 1, 9:30, 5:70]).all()
        mean = open_source(file, 1, PlaneOptions("mean", 0)).read(*whole)[..., 0]
        assert (mean == np.rint(pixels[0, :, 1].mean(axis=0))).all()
