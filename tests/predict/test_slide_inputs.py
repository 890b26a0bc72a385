"""Pyramids in a prediction: which slides there are, and that all results are in pixels of the full resolution."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from nucleus.data.zarr_plates import open_zarr
from nucleus.model.tiling import Region
from nucleus.predict import source
from nucleus.predict.bucket_images import ImageListing
from nucleus.predict.image_files import find_inputs, predict_files
from nucleus.predict.model import PredictionOptions
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.source import open_source
from nucleus.storage.bucket import Bucket
from tests.predict.test_bucket_images import settings_for
from tests.predict.test_predict import rows_of, small_model, spots
from tests.slide_files import MPP, reduced, write_dicom, write_mirax, write_svs
from tests.zarr_files import write_image

STEP = 4
"""Of the level of an SVS, and of the two coarser levels of the other pyramids together."""


def tissue(height: int = 512, width: int = 768, radius: float = 24) -> NDArray[np.uint8]:
    """Nuclei as RGB."""
    return np.repeat(spots(height, width, 13, count=40, radius=radius)[..., np.newaxis], 3, axis=2)


def test_a_slide_gives_the_results_of_its_pixels(tmp_path: Path) -> None:
    """And micrometres, which plain TIFF does not know."""
    pixels = tissue(180, 220, radius=6)
    slide = write_svs(tmp_path / "a.svs", pixels, compression="deflate")
    tifffile.imwrite(tmp_path / "b.tif", pixels, photometric="rgb")
    found = find_inputs([tmp_path])
    assert list(found.images) == ["a.svs", "b.tif"]
    out = tmp_path / "out"
    outcome = predict_files(small_model(), found.images, out)
    assert outcome.failures == {}
    assert outcome.counts["a.svs"] == outcome.counts["b.tif"] > 3
    assert (out / "a.labels.tif").read_bytes() == (out / "b.labels.tif").read_bytes()
    row = next(row for row in rows_of(out / "nuclei.csv") if row["image"] == "a.svs")
    assert float(row["area_um2"]) == pytest.approx(float(row["area"]) * MPP**2)
    assert (small_model().segment(slide).labels > 0).any()


def test_slides_in_folders(tmp_path: Path) -> None:
    """A MIRAX slide by its file, and a DICOM slide by the first of its files."""
    write_mirax(tmp_path / "m.mrxs", tissue(192, 256))
    write_dicom(tmp_path / "d", tissue(192, 256))
    (tmp_path / ".hidden.svs").write_bytes(b"?")
    found = find_inputs([tmp_path])
    assert (list(found.images), found.unread) == (["d/1.2.3-0.dcm", "m.mrxs"], {})


def test_slides_of_several_files_in_a_bucket_are_named(bucket: Bucket) -> None:
    images = Bucket(bucket.uri / "images")
    for name in ("a.svs", "b.mrxs", "c/d.dcm"):
        images.put(name, b"slide")
    listing = ImageListing(settings_for(bucket))
    assert [image.key for image in listing] == ["a.svs"]
    assert list(listing.unread.kept) == ["b.mrxs", "c/d.dcm"]


def pyramids(folder: Path, pixels: NDArray[np.uint8]) -> dict[str, Path]:
    """The same image as a slide, as OME-Zarr and as pyramidal OME-TIFF, and without levels."""
    tifffile.imwrite(folder / "plain.tif", pixels, photometric="rgb", tile=(64, 64))
    with tifffile.TiffWriter(folder / "p.ome.tif", ome=True) as file:
        options = {"photometric": "rgb", "tile": (64, 64)}
        file.write(pixels, subifds=2, metadata={"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}, **options)
        for step in (2, 4):
            file.write(reduced(pixels, step), subfiletype=1, **options)
    zarr = write_image(
        folder / "z.zarr", np.moveaxis(pixels, 2, 0), axes="cyx", side=MPP, levels=3, labels=("red", "green", "blue")
    )
    return {
        "plain": folder / "plain.tif",
        "slide": write_svs(folder / "s.svs", pixels, compression="deflate"),
        "ome": folder / "p.ome.tif",
        "zarr": zarr,
    }


def test_the_network_looks_at_the_level_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same place as without levels, also in a part of the image that begins between two pixels of a level."""
    monkeypatch.setattr(source, "_WHOLE_PIXELS", 0)
    config = small_model().config.normalization
    paths = pyramids(tmp_path, tissue())
    plain = open_source(paths.pop("plain"))
    part = Region(slice(101, 401), slice(203, 603))
    places = (slice(0, 60), slice(5, 90))
    for scale in (0.25, 0.2):
        wanted = ScaledImage(plain, config, scale)
        for name, path in paths.items():
            pyramid = open_source(path)
            assert pyramid.level_at(scale).steps == (STEP, STEP), name
            assert pyramid.level_at(0.6).steps == (1, 1), name
            found = ScaledImage(pyramid, config, scale)
            for first, second in ((wanted, found), (wanted.at(scale, part), found.at(scale, part))):
                expected, seen = (image.read(*places).astype(float) for image in (first, second))
                near = np.abs(expected - seen).mean()
                shifted = min(np.abs(expected[1:] - seen[:-1]).mean(), np.abs(expected[:, 1:] - seen[:, :-1]).mean())
                assert near < 0.6 * shifted, (name, scale, near, shifted)


def test_results_are_in_pixels_of_the_full_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever level the network looked at: sizes of labels, areas, positions and grey values."""
    monkeypatch.setattr(source, "_WHOLE_PIXELS", 0)
    pixels = tissue()
    model = small_model(options=PredictionOptions(), pixel_size=STEP * MPP)
    paths = pyramids(tmp_path, pixels)
    plain = small_model(options=PredictionOptions(pixel_size=MPP), pixel_size=STEP * MPP).segment(paths.pop("plain"))
    assert plain.count > 10
    for name, path in paths.items():
        found = model.segment(path)
        assert found.labels.shape == pixels.shape[:2]
        areas = [np.median([row["area"] for row in each.rows]) for each in (plain, found)]
        assert abs(found.count - plain.count) <= 0.1 * plain.count, name
        assert areas[1] == pytest.approx(areas[0], rel=0.15)
        for row in found.rows:
            inside = found.labels == row["label"]
            assert row["area"] == inside.sum()
            assert row["area_um2"] == pytest.approx(row["area"] * MPP**2)
            assert row["mean_0"] == pytest.approx(float(pixels[inside][:, 0].mean()))


def test_projections_have_no_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one depth would be another image."""
    monkeypatch.setattr(source, "_WHOLE_PIXELS", 0)
    depths = np.stack([spots(64, 96, 7, count=count) for count in (3, 6)])
    image = write_image(tmp_path / "a.zarr", depths, axes="zyx", levels=3)
    assert len(open_source(image, planes=source.PlaneOptions(z=1)).levels) == 2
    assert open_source(image, planes=source.PlaneOptions(z="max")).levels == ()


def test_levels_of_other_depths_are_not_used(tmp_path: Path) -> None:
    """Some writers reduce depths too."""
    image = write_image(tmp_path / "a.zarr", np.zeros((4, 64, 96), np.uint8), axes="zyx", levels=2)
    text = (image / "zarr.json").read_text()
    (image / "zarr.json").write_text(text.replace("[1.0, 1.0, 1.0]", "[2.0, 1.0, 1.0]"))
    assert text != (image / "zarr.json").read_text()
    (stack,) = open_zarr(image)
    assert stack.plane(0, 0).levels() == ()
