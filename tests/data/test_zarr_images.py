"""OME-Zarr images on disk: planes, channels, sizes, levels, plates, and an error for each thing that is wrong."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from nucleus.data import zarr_planes
from nucleus.data.pixel_files import PixelFile
from nucleus.data.zarr_plates import PlateField, open_zarr, plate_field
from nucleus.data.zarr_store import ZarrFolder
from nucleus.errors import ImageError, UsageError
from nucleus.predict.image_files import find_inputs
from tests.zarr_files import VERSIONS, document_of, image_metadata, write_group, write_image, write_plate

versions = pytest.mark.parametrize("version", VERSIONS)


def pixels_of(shape: tuple[int, ...], dtype: str = "uint16") -> NDArray[Any]:
    return np.random.default_rng(3).integers(0, 200, shape).astype(dtype)


def filled(plane: PixelFile) -> NDArray[Any]:
    out = np.empty(plane.shape, plane.dtype)
    plane.fill(out)
    return out


def part_of(plane: PixelFile, rows: slice, columns: slice) -> NDArray[Any]:
    assert plane.read_part is not None
    return plane.read_part(rows, columns)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Number of reads of each object."""
    counted: Counter[str] = Counter()
    before = ZarrFolder.read

    def read(folder: ZarrFolder, key: str, *arguments: Any) -> bytes | None:
        counted[key] += 1
        return before(folder, key, *arguments)

    monkeypatch.setattr(ZarrFolder, "read", read)
    return counted


@versions
def test_a_plane_has_the_pixels_of_its_time_and_depth(tmp_path: Path, version: int) -> None:
    pixels = pixels_of((2, 3, 4, 70, 90))
    (stack,) = open_zarr(write_image(tmp_path / "a.zarr", pixels, version, labels=("DAPI", "GFP", "RFP")))
    assert (stack.name, stack.times, stack.depths, stack.channels) == ("a.zarr", 2, 4, ("DAPI", "GFP", "RFP"))
    plane = stack.plane(1, 2)
    expected = np.moveaxis(pixels[1, :, 2], 0, -1)
    assert np.array_equal(filled(plane), expected)
    assert np.array_equal(part_of(plane, slice(13, 66), slice(30, 90)), expected[13:66, 30:90])
    assert (plane.shape, plane.pixel_size, plane.choose) == ((70, 90, 3), 0.5, True)


@pytest.mark.parametrize("axes", ["yx", "cyx", "zyx", "tyx", "tczyx"])
def test_axes_that_are_not_there_have_one_element(tmp_path: Path, axes: str) -> None:
    pixels = pixels_of(tuple({"t": 2, "c": 3, "z": 4, "y": 20, "x": 30}[axis] for axis in axes))
    (stack,) = open_zarr(write_image(tmp_path / "a.zarr", pixels, axes=axes))
    whole = pixels
    for at, axis in enumerate("tczyx"):
        whole = whole if axis in axes else np.expand_dims(whole, at)
    assert (stack.times, stack.depths) == (whole.shape[0], whole.shape[2])
    assert np.array_equal(filled(stack.plane(stack.times - 1, 0)), np.moveaxis(whole[-1, :, 0], 0, -1))


@pytest.mark.parametrize("dtype", ["bool", "uint8", ">u2", "int16", "float16", "float32", "float64"])
@versions
def test_numbers_of_any_type_are_read_as_they_are(tmp_path: Path, version: int, dtype: str) -> None:
    pixels = pixels_of((30, 40), dtype)
    plane = open_zarr(write_image(tmp_path / "a.zarr", pixels, version, axes="yx"))[0].plane(0, 0)
    assert plane.dtype.isnative
    assert np.array_equal(filled(plane)[..., 0], pixels)


@versions
def test_chunks_that_are_not_there_have_the_fill_value(tmp_path: Path, version: int) -> None:
    folder = write_image(tmp_path / "a.zarr", pixels_of((64, 64)), version, axes="yx", array={"fill_value": 7})
    (folder / "0" / ("c/0/1" if version == 3 else "0.1")).unlink()
    found = filled(open_zarr(folder)[0].plane(0, 0))[..., 0]
    assert (found[:32, 32:] == 7).all()
    assert np.array_equal(found[32:], pixels_of((64, 64))[32:])


def test_shards_are_read_in_parts(tmp_path: Path) -> None:
    pixels = pixels_of((128, 128))
    folder = write_image(tmp_path / "a.zarr", pixels, axes="yx", chunk=32, array={"shards": (64, 64)})
    plane = open_zarr(folder)[0].plane(0, 0)
    assert np.array_equal(part_of(plane, slice(10, 100), slice(70, 90)), pixels[10:100, 70:90, None])


@versions
def test_each_chunk_is_read_once(
    tmp_path: Path, version: int, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bands from the top, as a prediction reads a large image, with blocks of two chunks by two."""
    monkeypatch.setattr(zarr_planes, "_BLOCK_SIDE", 64)
    pixels = pixels_of((2, 200, 300))
    plane = open_zarr(write_image(tmp_path / "a.zarr", pixels, version, axes="cyx"))[0].plane(0, 0)
    reads.clear()
    bands = [part_of(plane, slice(top, min(top + 17, 200)), slice(0, 300)) for top in range(0, 200, 17)]
    assert np.array_equal(np.concatenate(bands), np.moveaxis(pixels, 0, -1))
    assert len(reads) == 2 * 7 * 10
    assert set(reads.values()) == {1}


def test_memory_is_bounded(tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks beyond the limit are given up, and read again if they are needed again."""
    monkeypatch.setattr(zarr_planes, "_BLOCK_SIDE", 32)
    monkeypatch.setattr(zarr_planes, "_KEPT_BYTES", 3 * 32 * 32 * 2)
    reader = zarr_planes.PlaneReader
    kept: list[int] = []
    before = reader._block

    def block(self: Any, *arguments: Any, **settings: Any) -> NDArray[Any]:
        kept.append(len(self._kept))
        return before(self, *arguments, **settings)

    monkeypatch.setattr(reader, "_block", block)
    plane = open_zarr(write_image(tmp_path / "a.zarr", pixels_of((320, 320)), axes="yx"))[0].plane(0, 0)
    for _ in range(2):
        part_of(plane, slice(0, 320), slice(0, 320))
    assert max(kept) <= 3
    assert reads["0/c/0/0"] == 2


@versions
def test_the_level_is_the_coarsest_that_is_fine_enough(tmp_path: Path, version: int) -> None:
    folder = write_image(tmp_path / "a.zarr", pixels_of((80, 80)), version, axes="yx", side=0.25, levels=3)
    sizes = {wanted: open_zarr(folder, pixel_size=wanted)[0].plane(0, 0).pixel_size for wanted in (0.1, 0.5, 0.8, 5)}
    assert sizes == {0.1: 0.25, 0.5: 0.5, 0.8: 0.5, 5: 1.0}
    assert open_zarr(folder)[0].plane(0, 0).shape == (80, 80, 1)


def test_reduced_levels_of_a_narrow_image_need_no_square_pixels(tmp_path: Path) -> None:
    """Some writers state the ratio of the sides, which are rounded."""
    folder = write_image(tmp_path / "a.zarr", pixels_of((37, 200)), axes="yx", side=0.5, levels=3)
    document = json.loads((folder / "zarr.json").read_text())
    for level, rows in enumerate((37, 19, 10)):
        scale = [0.5 * 37 / rows, 0.5 * 2**level]
        steps = document["attributes"]["ome"]["multiscales"][0]["datasets"][level]["coordinateTransformations"]
        steps[0]["scale"] = scale
    (folder / "zarr.json").write_text(json.dumps(document))
    plane = open_zarr(folder)[0].plane(0, 0)
    assert (plane.shape, plane.pixel_size) == ((37, 200, 1), 0.5)
    assert [level.steps for level in plane.levels()] == [pytest.approx((37 / 19, 2)), pytest.approx((3.7, 4))]
    assert open_zarr(folder, pixel_size=1.0)[0].plane(0, 0).shape == (37, 200, 1)


def test_micrometres_come_from_the_unit_and_both_scales(tmp_path: Path) -> None:
    nanometres = {"unit": "nanometer"}
    folder = write_image(tmp_path / "a.zarr", pixels_of((8, 8)), axes="yx", side=100, y=nanometres, x=nanometres)
    document = json.loads((folder / "zarr.json").read_text())
    scale = [{"type": "scale", "scale": [2.0, 2.0]}]
    document["attributes"]["ome"]["multiscales"][0]["coordinateTransformations"] = scale
    (folder / "zarr.json").write_text(json.dumps(document))
    assert open_zarr(folder)[0].plane(0, 0).pixel_size == pytest.approx(0.2)


def test_without_units_the_size_is_unknown(tmp_path: Path) -> None:
    folder = write_image(tmp_path / "a.zarr", pixels_of((8, 8)), axes="yx", y={"unit": None}, x={"unit": None})
    assert open_zarr(folder, pixel_size=9.0)[0].plane(0, 0).pixel_size is None


@pytest.mark.parametrize(
    ("labels", "dtype", "rgb"),
    [
        (("Red", "Green", "Blue"), "uint8", True),
        (("R", "G", "B"), "uint16", False),
        (("Blue", "Green", "Red"), "uint8", False),
        (("DAPI", "b", "c"), "uint8", False),
    ],
)
def test_three_channels_are_a_picture_if_they_are_called_so(
    tmp_path: Path, labels: tuple[str, ...], dtype: str, rgb: bool
) -> None:
    folder = write_image(tmp_path / "a.zarr", pixels_of((3, 8, 8), dtype), axes="cyx", labels=labels)
    plane = open_zarr(folder)[0].plane(0, 0)
    assert (plane.facts.colours, plane.choose) == ((3, False) if rgb else (1, True))


@versions
def test_a_plate_has_its_fields(tmp_path: Path, version: int) -> None:
    plate = write_plate(tmp_path / "p1.zarr", version)
    found = {stack.name: stack for stack in open_zarr(plate)}
    assert list(found) == [f"p1.zarr/{well}/{field}" for well in ("A/1", "B/3") for field in (0, 1)]
    assert plate_field("p1.zarr/B/3/0") == PlateField("p1", "B", "3", "0")
    assert plate_field("a.zarr") is None
    stored = zarr.open_array(plate / "B/3/1/0", mode="r")
    assert np.array_equal(filled(found["p1.zarr/B/3/1"].plane(0, 0)), np.moveaxis(stored[0, :, 0], 0, -1))
    assert [stack.name for stack in open_zarr(plate / "A/1")] == ["p1.zarr/A/1/0", "p1.zarr/A/1/1"]


@versions
def test_absent_wells_and_fields_are_told(tmp_path: Path, version: int) -> None:
    plate = write_plate(tmp_path / "p1.zarr", version, absent=["B/3"])
    shutil.rmtree(plate / "A/1/0")
    told: list[str] = []
    assert [stack.name for stack in open_zarr(plate, tell=told.append)] == ["p1.zarr/A/1/1"]
    assert [("B/3" in line, "A/1: fields" in line) for line in sorted(told)] == [(False, True), (True, False)]


@versions
def test_a_plate_without_any_well_is_an_error(tmp_path: Path, version: int) -> None:
    with pytest.raises(ImageError, match="absent"):
        open_zarr(write_plate(tmp_path / "p.zarr", version, absent=["A/1", "B/3"]))


@pytest.mark.parametrize("listed", [True, False])
@versions
def test_bioformats2raw_has_several_images(tmp_path: Path, version: int, listed: bool) -> None:
    folder = write_group(tmp_path / "s.zarr", {"bioformats2raw.layout": 3}, version)
    for number in range(2):
        write_image(folder / str(number), pixels_of((8, 8)), version, axes="yx")
    if listed:
        write_group(folder / "OME", {"series": ["1", "0"]}, version)
    names = [stack.name for stack in open_zarr(folder)]
    assert names == (["s.zarr/1", "s.zarr/0"] if listed else ["s.zarr/0", "s.zarr/1"])
    assert list(find_inputs([folder], 1).images) == ["s.zarr/1"]
    assert list(find_inputs([folder], "all").images) == names
    with pytest.raises(UsageError, match="'1'"):
        find_inputs([folder], 2)
    with pytest.raises(UsageError, match="--series"):
        find_inputs([write_plate(tmp_path / "p.zarr", version, fields=1)], 0)


def changed(folder: Path, version: int, change: Any) -> Path:
    """Change the metadata of OME-Zarr of a group."""
    path = folder / document_of(version)
    document = json.loads(path.read_text())
    change(document["attributes"]["ome"] if version == 3 else document)
    path.write_text(json.dumps(document))
    return folder


def changed_array(folder: Path, version: int, **keys: Any) -> Path:
    """Change the metadata of an image's array."""
    path = folder / "0" / ("zarr.json" if version == 3 else ".zarray")
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


@pytest.fixture
def image(tmp_path: Path, version: int) -> Path:
    return write_image(tmp_path / "a.zarr", pixels_of((8, 8)), version, axes="yx")


def refusal(folder: Path) -> str:
    with pytest.raises(ImageError) as found:
        open_zarr(folder)
    assert str(folder) in str(found.value)
    return str(found.value)


@versions
def test_zarr_without_metadata_of_ome(image: Path, version: int) -> None:
    assert "multiscales" in refusal(changed(image, version, dict.clear))


def test_no_zarr(tmp_path: Path) -> None:
    assert "nothing of Zarr" in refusal(tmp_path)


@versions
@pytest.mark.usefixtures("version")
def test_a_level_that_is_missing(image: Path) -> None:
    shutil.rmtree(image / "0")
    assert "'0'" in refusal(image)


@versions
@pytest.mark.parametrize(
    ("axis", "unit", "word"), [("yx", "furlong", "furlong"), ("x", "nanometer", "same unit"), ("y", None, "same unit")]
)
def test_units_that_say_no_size(tmp_path: Path, version: int, axis: str, unit: str | None, word: str) -> None:
    changes = {each: {"unit": unit} for each in axis}
    assert word in refusal(write_image(tmp_path / "a.zarr", pixels_of((8, 8)), version, axes="yx", **changes))


@versions
@pytest.mark.parametrize("scale", [[1.0, 2.0], [0.0, 0.0], [-1.0, -1.0]])
def test_pixels_that_are_not_square(image: Path, version: int, scale: list[float]) -> None:
    def stretch(metadata: dict[str, Any]) -> None:
        metadata["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"] = scale

    assert "square" in refusal(changed(image, version, stretch))


@versions
def test_another_version_of_ome_zarr(image: Path, version: int) -> None:
    def older(metadata: dict[str, Any]) -> None:
        part = metadata if version == 3 else metadata["multiscales"][0]
        part["version"] = "0.1"

    assert "'0.1'" in refusal(changed(image, version, older))


@versions
def test_metadata_that_yaozarrs_finds_invalid(image: Path, version: int) -> None:
    def break_axes(metadata: dict[str, Any]) -> None:
        metadata["multiscales"][0]["datasets"] = []

    assert "datasets" in refusal(changed(image, version, break_axes))


def test_both_versions_of_zarr_in_contradiction(tmp_path: Path) -> None:
    folder = write_image(tmp_path / "a.zarr", pixels_of((8, 8)), 3, axes="yx")
    write_group(folder, image_metadata("yx", [[0.5, 0.5]], 2), 2)
    assert open_zarr(folder)[0].plane(0, 0).pixel_size == 0.5
    write_group(folder, image_metadata("yx", [[0.7, 0.7]], 2), 2)
    assert ".zattrs" in refusal(folder)


@versions
def test_a_document_that_is_no_json(image: Path, version: int) -> None:
    (image / document_of(version)).write_text("[")
    assert "JSON" in refusal(image)


@versions
@pytest.mark.parametrize("damage", [b"", b"\x00" * 40])
def test_a_chunk_that_is_damaged(image: Path, version: int, damage: bytes) -> None:
    (image / "0" / ("c/0/0" if version == 3 else "0.0")).write_bytes(damage)
    with pytest.raises(ImageError, match=r"a\.zarr"):
        filled(open_zarr(image)[0].plane(0, 0))


@versions
def test_a_chunk_that_cannot_be_read(image: Path, version: int) -> None:
    chunk = image / "0" / ("c/0/0" if version == 3 else "0.0")
    chunk.unlink()
    chunk.mkdir()
    with pytest.raises(ImageError, match=str(chunk)):
        filled(open_zarr(image)[0].plane(0, 0))


OBJECTS = [
    {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}]},
    {"dtype": "|O", "filters": [{"id": "json2"}]},
    {"filters": [{"id": "pickle", "protocol": 5}]},
    {"compressor": {"id": "pickle"}},
    {"compressor": "pickle"},
    {"dtype": [["a", "<u2"]]},
    {"dtype": "<U8"},
]


@pytest.mark.parametrize("keys", OBJECTS)
def test_objects_and_their_codecs_are_refused_in_v2(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = write_image(tmp_path / "a.zarr", pixels_of((8, 8)), 2, axes="yx")
    assert "in the array" in refusal(changed_array(folder, 2, **keys))  # by this package, before zarr looks at it


SHARDS = {"chunk_shape": [8, 8], "codecs": [{"name": "numcodecs.pickle"}], "index_codecs": [{"name": "bytes"}]}
OTHERS = [
    {"data_type": "string"},
    {"data_type": {"name": "numpy.datetime64", "configuration": {"unit": "s", "scale_factor": 1}}},
    {"codecs": [{"name": "vlen-utf8"}]},
    {"codecs": [{"name": "numcodecs.pickle"}]},
    {"codecs": [{"name": "sharding_indexed", "configuration": SHARDS}]},
    {"codecs": [{"name": "sharding_indexed"}]},
    {"codecs": {}},
    {"chunk_grid": {"name": "rectangular"}},
]


@pytest.mark.parametrize("keys", OTHERS)
def test_objects_and_their_codecs_are_refused_in_v3(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = write_image(tmp_path / "a.zarr", pixels_of((8, 8)), 3, axes="yx")
    assert "a.zarr/0" in refusal(changed_array(folder, 3, **keys))


@versions
@pytest.mark.parametrize("path", ["../b.zarr/0", "/etc", "0/../../b.zarr/0", "."])
def test_paths_that_lead_out_are_refused(image: Path, version: int, path: str) -> None:
    write_image(image.parent / "b.zarr", pixels_of((8, 8)), version, axes="yx")

    def lead_out(metadata: dict[str, Any]) -> None:
        metadata["multiscales"][0]["datasets"][0]["path"] = path

    refusal(changed(image, version, lead_out))


@versions
def test_links_that_lead_out_are_refused(image: Path, version: int) -> None:
    other = write_image(image.parent / "b.zarr", pixels_of((8, 8)), version, axes="yx")
    shutil.rmtree(image / "0")
    (image / "0").symlink_to(other / "0")
    assert "leads out" in refusal(image)


@versions
def test_a_chunk_too_large_to_decode_is_refused(image: Path, version: int) -> None:
    size = [1 << 16, 1 << 16]
    grid = {"name": "regular", "configuration": {"chunk_shape": size}}
    keys = {"shape": size, **({"chunks": size} if version == 2 else {"chunk_grid": grid})}
    assert "512 MiB" in refusal(changed_array(image, version, **keys))
