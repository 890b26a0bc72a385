"""Images of any kind and size, from files to labels and tables, with a small network that finds bright pixels."""

import csv
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import cv2
import keras
import numpy as np
import pytest
import skimage
import tifffile
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.data.images import encode_png
from nucleus.data.normalization import normalize
from nucleus.data.synthetic import generated_image
from nucleus.errors import ImageError, ModelError
from nucleus.model.architecture import InstanceSettings, ModelConfig
from nucleus.model.engines import KerasEngine
from nucleus.model.tiling import Region
from nucleus.predict import blocks as blocks_module
from nucleus.predict import source as sources
from nucleus.predict.blocks import assembled_labels, nuclei_of_block, plan_blocks
from nucleus.predict.image_files import predict_files
from nucleus.predict.measurement import (
    IMAGE_COLUMNS,
    Frame,
    NucleiSummary,
    image_row,
    measure_nuclei,
    nucleus_columns,
)
from nucleus.predict.model import Model, PredictionOptions
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.source import array_source, channel_count, open_source, stacks_of

PLAIN = NormalizationOptions(method="none")
CONFIG = ModelConfig(
    encoder="mobilenet_v2",
    decoder_channels=[8, 8, 8, 8, 8],
    heads="distance",
    normalization=PLAIN,
    tile=64,
    overlap=16,
    instances=InstanceSettings(seed_threshold=0.7, min_area=10),
    nucleus_diameter=12.0,
)


def bright_pixels() -> keras.Model:
    """A network for `distance`: mask above 100.5 (no pixel), interior as bright as the mean of 5 x 5 pixels."""
    image = keras.Input((None, None, 3))
    grey = keras.layers.Conv2D(1, 1, use_bias=False, kernel_initializer=keras.initializers.Constant(1 / 3))(image)
    soft = keras.layers.AveragePooling2D(5, 1, padding="same")(grey)
    both = keras.layers.Concatenate()([grey, soft])
    return keras.Model(image, keras.layers.Rescaling(0.05, -5.025)(both))


def small_model(options: PredictionOptions | None = None, **changes: object) -> Model:
    return Model(KerasEngine(bright_pixels(), "distance"), CONFIG.model_copy(update=changes), options)


def spots(height: int, width: int, seed: int = 0, count: int = 40, radius: float = 6) -> NDArray[np.uint8]:
    """Grey discs, some touching, on dark ground; H x W."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width), 10, np.uint8)
    for _ in range(count):
        centre = (int(rng.integers(0, width)), int(rng.integers(0, height)))
        cv2.circle(image, centre, int(radius * rng.uniform(0.7, 1.3)), int(rng.integers(150, 250)), -1)
    return cv2.GaussianBlur(image, (0, 0), 1.0)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def whole_labels(model: Model, pixels: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Labels of an image, put together from its blocks."""
    labels = np.zeros(pixels.shape[:2], np.int32)
    (blocks,) = model.segment_blocks([model.scaled_image(array_source(pixels[..., np.newaxis]))])
    for block in blocks:
        part = labels[block.region.rows, block.region.columns]
        new = block.labels > 0
        assert (part[new] == 0).all(), "two blocks claim the same pixels"
        part[new] = block.labels[new] + labels.max()
    return labels


def same_partition(one: NDArray[np.int32], two: NDArray[np.int32]) -> int:
    """How many labels of one image are, pixel by pixel, labels of the other."""
    pairs, counts = np.unique(np.stack([one.ravel(), two.ravel()]), axis=1, return_counts=True)
    areas_one, areas_two = np.bincount(one.ravel()), np.bincount(two.ravel())
    return sum(a > 0 and b > 0 and areas_one[a] == areas_two[b] == n for a, b, n in zip(*pairs, counts, strict=True))


@pytest.mark.parametrize(("side", "seed"), [(150, 0), (210, 1), (97, 2)])
def test_blocks_give_the_labels_of_the_whole_image(side: int, seed: int) -> None:
    pixels = spots(500, 430, seed, count=300)
    whole = whole_labels(small_model(), pixels)
    parts = whole_labels(small_model(PredictionOptions(block_side=side)), pixels)
    assert whole.max() > 100
    assert parts.max() == whole.max()
    assert same_partition(whole, parts) == whole.max()


@pytest.mark.parametrize("radius", [140, 200, 300])
def test_nuclei_larger_than_the_margin_are_whole(radius: int, tmp_path: Path) -> None:
    """A disc that begins just left of a block's edge and ends far beyond the margin of the block."""
    image = np.full((700, 1400), 10, np.uint8)
    cv2.circle(image, (680 + radius, 350), radius, 200, -1)
    (tmp_path / "disc.png").write_bytes(encode_png(image))
    found = predict_files(
        small_model(PredictionOptions(block_side=700), tile=256), [tmp_path / "disc.png"], tmp_path / "o"
    )
    assert found.counts == {"disc.png": 1}
    (row,) = rows_of(tmp_path / "o" / "nuclei.csv")
    labels = tifffile.imread(tmp_path / "o" / "disc.labels.tif")
    assert int(row["area"]) == (labels == 1).sum() == pytest.approx((image > 100).sum(), rel=0.01)


def test_enlarged_images_are_planned_in_the_pixels_of_the_network() -> None:
    pixels = spots(300, 300, 3)
    labels = whole_labels(small_model(PredictionOptions(diameter=4.0, block_side=150)), pixels)
    whole = whole_labels(small_model(PredictionOptions(diameter=4.0)), pixels)
    assert labels.max() == whole.max() > 10
    assert same_partition(whole, labels) == whole.max()


def test_each_nucleus_belongs_to_one_block() -> None:
    labels = np.zeros((90, 70), np.int32)
    for number, (y, x) in enumerate([(29, 29), (30, 30), (0, 0), (89, 69), (45, 5), (59, 31)], 1):
        labels[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = number
    blocks = plan_blocks((90, 70), 30, 10)
    owners = np.zeros(7, int)
    covered = np.zeros((90, 70), int)
    for block in blocks:
        covered[block.core.rows, block.core.columns] += 1
        seen = labels[block.seen.rows, block.seen.columns]
        ours = nuclei_of_block(seen, block)
        owners[np.unique(seen[ours > 0])] += 1
    assert (covered == 1).all()
    assert owners[1:].tolist() == [1] * 6


def test_labels_in_a_file_are_the_labels_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pasted = [
        (rng.integers(0, 4, (h, w)).astype(np.int32), place)
        for h, w, place in [(40, 700, (0, 0)), (600, 30, (3, 650)), (100, 100, (500, 20))]
    ]
    written = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(blocks_module, "_IN_MEMORY_BYTES", limit)
        with assembled_labels((610, 701), tmp_path) as assembled:
            for labels, (y, x) in pasted:
                rows, columns = slice(y, y + labels.shape[0]), slice(x, x + labels.shape[1])
                before = assembled.count
                added, first = assembled.add(labels, Region(rows, columns))
                assert first == before
                assert (assembled.labels[rows, columns][added > 0] == added[added > 0] + first).all()
            assembled.write(tmp_path / f"{limit}.tif")
        written.append(tifffile.imread(tmp_path / f"{limit}.tif"))
        with tifffile.TiffFile(tmp_path / f"{limit}.tif") as file:
            assert file.pages.first.is_tiled == (limit == 0)
    assert written[0].dtype == np.uint16
    assert written[0].max() == 9
    assert (written[0] == written[1]).all()
    assert not list(tmp_path.glob(".nucleus*"))


def test_labels_that_are_hidden_are_not_counted(tmp_path: Path) -> None:
    with assembled_labels((4, 6), tmp_path) as assembled:
        assembled.add(np.ones((4, 3), np.int32), Region(slice(0, 4), slice(0, 3)))
        hidden = np.zeros((4, 6), np.int32)
        hidden[:2, :2], hidden[2:, 2:] = 1, 2
        added, first = assembled.add(hidden, Region(slice(0, 4), slice(0, 6)))
        assert (assembled.count, first, added.max(), (added > 0).sum()) == (2, 1, 1, 6)
        assert (assembled.labels == 2).sum() == 6


def test_shapes_are_those_of_scikit_image() -> None:
    labels = cv2.connectedComponents((spots(120, 150, seed=3) > 100).astype(np.uint8), ltype=cv2.CV_32S)[1]
    labels[labels == 2] = 0  # a gap in the numbers
    labels[0, 0], labels[119, 140:150] = 90, 91  # of one pixel, and of one row
    rows = measure_nuclei(Frame("a", labels.shape), labels[..., np.newaxis], labels, np.ones(labels.shape, np.float32))
    regions = skimage.measure.regionprops(labels)
    assert [row["label"] for row in rows] == [region.label for region in regions]
    for row, region in zip(rows, regions, strict=True):
        assert row["area"] == region.area
        assert (row["centroid_y"], row["centroid_x"]) == pytest.approx(region.centroid, abs=1e-3)
        assert row["diameter"] == pytest.approx(region.equivalent_diameter_area, abs=1e-3)
        assert row["eccentricity"] == pytest.approx(region.eccentricity, abs=1e-3)
        assert row["solidity"] == pytest.approx(region.solidity, abs=1e-3)


def test_many_nuclei_need_32_bits(tmp_path: Path) -> None:
    with assembled_labels((300, 300), tmp_path) as assembled:
        assembled.add(np.arange(1, 90001, dtype=np.int32).reshape(300, 300), Region(slice(0, 300), slice(0, 300)))
        assembled.write(tmp_path / "x.tif")
    assert tifffile.imread(tmp_path / "x.tif").max() == 90000


FILES = {
    "grey.png": lambda path, grey: path.write_bytes(encode_png(grey)),
    "colour.png": lambda path, grey: path.write_bytes(encode_png(np.stack([grey, grey // 2, 255 - grey], -1))),
    "deep.png": lambda path, grey: path.write_bytes(encode_png(grey.astype(np.uint16) * 13 + 700)),
    "deep.tif": lambda path, grey: tifffile.imwrite(path, grey.astype(np.uint16) * 13 + 700),
    "float.tif": lambda path, grey: tifffile.imwrite(path, grey.astype(np.float32) / 7),
    "tiled.tif": lambda path, grey: tifffile.imwrite(path, grey, tile=(64, 64), compression="zlib"),
    "colour.tif": lambda path, grey: tifffile.imwrite(path, np.stack([grey, grey // 2, 255 - grey], -1)),
    "grey.jpg": lambda path, grey: path.write_bytes(cv2.imencode(".jpg", grey)[1].tobytes()),
    "grey.bmp": lambda path, grey: path.write_bytes(cv2.imencode(".bmp", grey)[1].tobytes()),
    "grey.webp": lambda path, grey: path.write_bytes(
        cv2.imencode(".webp", grey, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_read_by_parts_are_files_read_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    FILES[name](path, spots(150, 130))
    small = open_source(path)
    whole = small.read(slice(0, 150), slice(0, 130))
    assert (small.height, small.width, small.pixel_size) == (150, 130, None)
    assert whole.shape[2] in (1, 3)
    monkeypatch.setattr(sources, "_WHOLE_PIXELS", 0)
    large = open_source(path)
    assert (large.height, large.width) == (150, 130)
    for rows, columns in (
        (slice(0, 150), slice(0, 130)),
        (slice(17, 92), slice(100, 130)),
        (slice(149, 150), slice(0, 1)),
    ):
        part = large.read(rows, columns)
        assert part.dtype == whole.dtype
        assert np.array_equal(part, whole[rows, columns])


def test_microscopes_files(tmp_path: Path) -> None:
    grey = spots(80, 90)
    other = 255 - grey
    metadata = {"axes": "CYX", "PhysicalSizeX": 0.325, "PhysicalSizeXUnit": "µm", "Channel": {"Name": ["DAPI", "GFP"]}}
    tifffile.imwrite(tmp_path / "two.ome.tif", np.stack([other, grey]), metadata=metadata, photometric="minisblack")
    with pytest.raises(
        ImageError, match=r"which has 2: 'DAPI', 'GFP'; found no choice .* --channel DAPI .*channel=\"DAPI\""
    ):
        open_source(tmp_path / "two.ome.tif")
    with pytest.raises(ImageError, match="Expected channel 2"):
        open_source(tmp_path / "two.ome.tif", channel=2)
    for channel, expected in ((0, other), (1, grey)):
        source = open_source(tmp_path / "two.ome.tif", channel)
        assert source.pixel_size == pytest.approx(0.325)
        assert (source.read(slice(0, 80), slice(0, 90))[..., 0] == expected).all()
    nanometres = {"axes": "YX", "PhysicalSizeX": 650.0, "PhysicalSizeXUnit": "nm"}
    tifffile.imwrite(tmp_path / "one.ome.tif", grey, metadata=nanometres)
    assert open_source(tmp_path / "one.ome.tif").pixel_size == pytest.approx(0.65)
    tifffile.imwrite(tmp_path / "ij.tif", grey, imagej=True, resolution=(4.0, 4.0), metadata={"unit": "um"})
    assert open_source(tmp_path / "ij.tif").pixel_size == pytest.approx(0.25)
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([grey] * 5), imagej=True, metadata={"axes": "ZYX"})
    with pytest.raises(ImageError, match=r"found 5 depths \(z\)"):
        open_source(tmp_path / "stack.tif")
    (tmp_path / "colour.png").write_bytes(encode_png(np.stack([grey, other, other], -1)))
    source = open_source(tmp_path / "colour.png", channel=1)
    assert (source.read(slice(0, 80), slice(0, 90)) == other[..., np.newaxis]).all()
    assert source.read_channels(slice(0, 80), slice(0, 90)).shape == (80, 90, 3)
    assert channel_count(stacks_of(tmp_path / "colour.png")) == 3
    assert channel_count(stacks_of(tmp_path / "two.ome.tif")) == 2
    both = open_source(tmp_path / "two.ome.tif", 1).read_channels(slice(0, 80), slice(0, 90))
    assert (both == np.stack([other, grey], -1)).all()
    with pytest.raises(ImageError, match="Expected channel 3"):
        open_source(tmp_path / "colour.png", channel=3)


@pytest.mark.parametrize(
    ("ome", "expected"),
    [
        ('PhysicalSizeX="0.5" PhysicalSizeY="0.5" PhysicalSizeXUnit="&#181;m"', 0.5),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="\u03bcm"', 0.5),
        ('PhysicalSizeX="0.5" PhysicalSizeY="1.0"', None),
        ('PhysicalSizeX="0.00"', None),
        ('PhysicalSizeX="-1"', None),
        ('PhysicalSizeX="1e999"', None),
        ('PhysicalSizeX="-"', None),
        ('PhysicalSizeX="2" PhysicalSizeXUnit="furlong"', None),
        ('PhysicalSizeX="0.5" PhysicalSizeY="500" PhysicalSizeYUnit="nm"', 0.5),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="µm" PhysicalSizeY="0.5" PhysicalSizeYUnit="mm"', None),
        ('PhysicalSizeX="500" PhysicalSizeXUnit="nm" PhysicalSizeY="500"', 0.5),
        ("PhysicalSizeX='500' PhysicalSizeXUnit='nm' PhysicalSizeY='500' PhysicalSizeYUnit='nm'", 0.5),
        ('PhysicalSizeX = "5000" PhysicalSizeXUnit = "Å"', 0.5),
    ],
)
def test_pixel_sizes_of_ome_files(ome: str, expected: float | None, tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    description = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image '
        f'ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="40" SizeY="30" SizeC="1" '
        f'SizeZ="1" SizeT="1" {ome}><TiffData/></Pixels></Image></OME>'
    )
    tifffile.imwrite(path, spots(30, 40), description=description.encode(), metadata=None)
    found = predict_files(small_model(), [path], tmp_path / "out")
    assert not found.failures
    assert open_source(path).pixel_size == expected
    escaped = tmp_path / "ij.tif"
    tifffile.imwrite(escaped, spots(30, 40), imagej=True, resolution=(2.0, 2.0), metadata={"unit": "\\u00B5m"})
    assert open_source(escaped).pixel_size == 0.5
    other = {"unit": "um", "yunit": "mm"}
    tifffile.imwrite(escaped, spots(30, 40), imagej=True, resolution=(2.0, 2.0), metadata=other)
    assert open_source(escaped).pixel_size is None


def test_files_that_hold_more_than_one_image(tmp_path: Path) -> None:
    grey = spots(60, 50)
    with tifffile.TiffWriter(tmp_path / "scenes.ome.tif") as writer:
        for _ in range(3):
            writer.write(grey, metadata={"axes": "YX"})
    tifffile.imwrite(tmp_path / "samples.tif", np.dstack([grey] * 2), photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "planes.tif", np.stack([grey] * 3), photometric="minisblack", planarconfig="separate")
    for name, message in {
        "scenes.ome.tif": "found 3",
        "samples.tif": "which has 2; found no choice",
        "planes.tif": "which has 3; found no choice",
    }.items():
        with pytest.raises(ImageError, match=message):
            open_source(tmp_path / name)
    tifffile.imwrite(
        tmp_path / "alpha.tif", np.dstack([grey] * 2), photometric="minisblack", extrasamples=["unassalpha"]
    )
    assert open_source(tmp_path / "alpha.tif").read(slice(0, 60), slice(0, 50)).shape == (60, 50, 1)


def test_damaged_headers_and_names_end_no_batch(tmp_path: Path) -> None:
    """Any byte of a header may be wrong: the image is read or reported, and the others go on."""
    grey = spots(40, 50)
    tifffile.imwrite(tmp_path / "whole.ome.tif", grey, metadata={"axes": "YX", "PhysicalSizeX": 0.5})
    data = (tmp_path / "whole.ome.tif").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 900), 3):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "damaged.ome.tif").write_bytes(damaged)
        with suppress(ImageError):
            ScaledImage(open_source(tmp_path / "damaged.ome.tif"), PLAIN)
            channel_count(stacks_of(tmp_path / "damaged.ome.tif"))
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xb5.png"))
    odd.write_bytes(encode_png(grey))
    good = tmp_path / "good.png"
    good.write_bytes(encode_png(grey))
    found = predict_files(small_model(), [odd, good], tmp_path / "out")
    assert list(found.counts) == ["good.png"]
    assert "odd\\udcb5.png" in next(iter(found.failures.values()))


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no.tif").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(0, 255, (600, 600), np.uint8)
    tifffile.imwrite(tmp_path / "half.tif", noise, tile=(64, 64))
    (tmp_path / "half.tif").write_bytes((tmp_path / "half.tif").read_bytes()[:200_000])
    whole = encode_png(noise)
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(sources, "_WHOLE_PIXELS", 0)
    for name in ("no.tif", "half.tif", "half.png", "nowhere.png", "nowhere.tif"):
        with pytest.raises(ImageError, match=name):  # noqa: PT012  the damage may show only where it is read
            source = open_source(tmp_path / name)
            ScaledImage(source, PLAIN)


def test_scaled_images_are_normalised_by_the_whole_image() -> None:
    pixels = np.random.default_rng(0).integers(20, 60, (90, 80, 3)).astype(np.uint8)
    options = NormalizationOptions()
    image = ScaledImage(array_source(pixels), options)
    assert (image.read(slice(10, 40), slice(5, 60)) == normalize(pixels, options)[10:40, 5:60]).all()
    assert (image.rgb(slice(0, 9), slice(0, 9)) == pixels[:9, :9]).all()
    nuclei = generated_image(0, 90, 80)[0][..., :1].astype(np.uint16) * 100
    deep = ScaledImage(array_source(nuclei), options)
    assert deep.read(slice(0, 90), slice(0, 80)).max() == 255


@pytest.mark.parametrize("scale", [0.5, 0.37, 1.0, 1.7, 2.0])
def test_scaled_images_and_back(scale: float) -> None:
    """A smooth picture, seen at another scale and brought back, is the same picture at the same place."""
    y, x = np.mgrid[:200, :240]
    pixels = (127 + 60 * np.sin(y / 17) + 60 * np.cos(x / 23)).astype(np.uint8)
    image = ScaledImage(array_source(pixels[..., np.newaxis]), PLAIN, scale)
    assert image.shape == (round(200 * scale), round(240 * scale))
    for rows, columns in ((slice(0, 200), slice(0, 240)), (slice(53, 120), slice(101, 199))):
        wanted = Region(rows, columns)
        covering = image.covering(wanted)
        seen = image.read(covering.rows, covering.columns).astype(np.float32)
        back = image.back(seen, covering, wanted)[..., 0]
        inner = np.s_[4:-4, 4:-4]
        assert np.abs(back[inner] - pixels[rows, columns][inner]).max() < 6
    half = np.s_[20:60]
    whole = image.read(slice(0, image.shape[0]), slice(0, image.shape[1]))
    assert np.abs(image.read(slice(20, 60), slice(20, 60)).astype(int) - whole[half, half]).max() <= 1


def test_diameter_rescales() -> None:
    small, large = spots(200, 200, 4, 25, radius=6), None
    large = cv2.resize(small, (600, 600), interpolation=cv2.INTER_CUBIC)
    plain = whole_labels(small_model(), small)
    scaled = whole_labels(small_model(PredictionOptions(diameter=36.0)), large)
    assert scaled.shape == (600, 600)
    assert scaled.max() == plain.max()
    shrunk = scaled[1::3, 1::3]
    assert np.mean((shrunk > 0) == (plain > 0)) > 0.99
    with pytest.raises(ImageError, match=r"gives 120\. Correct --diameter"):
        small_model(PredictionOptions(diameter=0.1)).scaled_image(array_source(large[..., np.newaxis]))
    by_pixel_size = small_model(PredictionOptions(pixel_size=0.1), pixel_size=0.3)
    assert (whole_labels(by_pixel_size, large) == scaled).all()
    source = array_source(large[..., np.newaxis])
    assert small_model(PredictionOptions(pixel_size=0.1)).scaled_image(source).shape == (600, 600)
    of_the_file = replace(source, pixel_size=0.1)
    assert small_model(pixel_size=0.3).scaled_image(of_the_file).shape == (200, 200)
    with pytest.raises(ModelError, match="--diameter has no effect"):
        small_model(PredictionOptions(diameter=36.0), nucleus_diameter=None)


def test_measurements_of_squares() -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[0:4, 2:6] = 1
    labels[10:14, 10:18] = 2
    image = np.zeros((20, 20, 3), np.uint8)
    image[..., 0] = 50
    image[0, 2, 1] = 32
    mask = np.where(labels == 1, 0.75, 1.0).astype(np.float32)
    mask[10, 10] = 0.5
    rows = measure_nuclei(Frame("a.png", (20, 20)), image, labels, mask)
    assert list(rows[0]) == list(nucleus_columns(3))
    assert [(r["label"], r["area"], r["centroid_x"], r["centroid_y"], r["touches_edge"]) for r in rows] == [
        (1, 16, 3.5, 1.5, True),
        (2, 32, 13.5, 11.5, False),
    ]
    assert (rows[0]["mean_0"], rows[0]["mean_1"], rows[0]["solidity"]) == (50, 2, 1)
    assert (rows[0]["integrated_0"], rows[0]["integrated_1"]) == (800, 32)
    assert rows[0]["diameter"] == pytest.approx(np.sqrt(4 * 16 / np.pi), abs=1e-3)
    assert rows[0]["eccentricity"] == 0
    assert rows[1]["eccentricity"] == pytest.approx(np.sqrt(1 - (4**2 - 1) / (8**2 - 1)), abs=0.03)
    assert [row["score"] for row in rows] == [0.75, round(31.5 / 32, 4)]
    assert rows[0]["area_um2"] is rows[0]["diameter_um"] is None
    assert measure_nuclei(Frame("e", (20, 20)), image, np.zeros((20, 20), np.int32), mask) == []


def test_measurements_of_a_part_in_micrometres() -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[0:4, 2:6] = 1
    grey = np.full((20, 20, 1), 1000, np.uint16)
    frame = Frame("a.tif", (100, 200), top=50, left=60, pixel_size=0.5)
    mask = np.ones((20, 20), np.float32)
    (row,) = measure_nuclei(frame, grey, labels, mask, first=41)
    assert (row["label"], row["centroid_x"], row["centroid_y"], row["touches_edge"]) == (42, 63.5, 51.5, False)
    assert (row["mean_0"], row["integrated_0"]) == (1000, 16000)
    assert "mean_1" not in row
    (faint,) = measure_nuclei(frame, grey.astype(np.float32) * 4e-7, labels, mask)
    assert (faint["mean_0"], faint["integrated_0"]) == pytest.approx((4e-4, 6.4e-3), rel=1e-6)
    assert row["area_um2"] == 4
    assert row["diameter_um"] == pytest.approx(row["diameter"] / 2, abs=1e-3)
    summary = NucleiSummary()
    summary.add({"diameter": diameter, "score": 0.9 + diameter / 1000} for diameter in range(10, 20))
    seen = ScaledImage(array_source(np.zeros((10, 20), np.uint8)), NormalizationOptions(), scale=0.5)
    image = image_row(frame, summary, nucleus_pixels=400, seen=seen, warning="unsure")
    assert list(image) == list(IMAGE_COLUMNS)
    assert (image["width"], image["height"], image["coverage"], image["mean_area"]) == (200, 100, 0.02, 40)
    assert (image["nuclei_per_megapixel"], image["nuclei_per_mm2"]) == (500, 2000)
    assert (image["median_diameter"], image["scale"], image["warning"]) == (pytest.approx(14.1, abs=0.2), 0.5, "unsure")
    assert image["score"] == pytest.approx(0.9145)
    nothing = image_row(Frame("b", (1, 1)), NucleiSummary(), 0, seen, None)
    assert [nothing[name] for name in ("mean_area", "median_diameter", "score", "warning")] == [None] * 4


def test_files_to_labels_and_tables(tmp_path: Path) -> None:
    grey = spots(300, 260, 7, count=60)
    (tmp_path / "a.png").write_bytes(encode_png(grey))
    tifffile.imwrite(tmp_path / "b.tif", grey, imagej=True, resolution=(2.0, 2.0), metadata={"unit": "um"})
    (tmp_path / "c.png").write_bytes(b"")
    files = [tmp_path / name for name in ("a.png", "b.tif", "c.png")]
    out = tmp_path / "out"
    found = predict_files(small_model(PredictionOptions(block_side=128)), files, out)
    assert list(found.failures) == ["c.png"]
    assert sorted(path.name for path in out.iterdir()) == [
        *("a.labels.tif", "a.overlay.png", "b.labels.tif", "b.overlay.png", "images.csv", "nuclei.csv"),
    ]
    labels = tifffile.imread(out / "a.labels.tif")
    assert found.counts == {"a.png": labels.max(), "b.tif": labels.max()}
    rows = [row for row in rows_of(out / "nuclei.csv") if row["image"] == "a.png"]
    assert sorted(int(row["label"]) for row in rows) == list(range(1, labels.max() + 1))
    for row in rows:
        y, x = np.nonzero(labels == int(row["label"]))
        assert int(row["area"]) == len(y)
        assert (float(row["centroid_y"]), float(row["centroid_x"])) == pytest.approx((y.mean(), x.mean()), abs=1e-3)
        assert float(row["mean_0"]) == pytest.approx(grey[y, x].mean(), abs=1e-3)
        edge = bool(y.min() == 0 or x.min() == 0 or y.max() == 299 or x.max() == 259)
        assert row["touches_edge"] == str(edge)
        assert row["area_um2"] == ""
    first, second = rows_of(out / "images.csv")
    assert int(first["nuclei"]) == labels.max()
    assert float(first["coverage"]) == pytest.approx((labels > 0).mean(), abs=1e-5)
    assert float(second["pixel_size_um"]) == 0.5
    assert cv2.imread(str(out / "a.overlay.png")).shape == (300, 260, 3)


@pytest.mark.parametrize(
    ("pixels", "nuclei"),
    [
        (np.zeros((40, 50), np.uint8), 0),
        (np.full((40, 50), 255, np.uint8), 1),
        (np.full((70, 30), 77, np.uint8), 0),
        (np.zeros((1, 1), np.uint8), 0),
        (np.zeros((1, 3000), np.uint8), 0),
        (np.zeros((3000, 2), np.uint16), 0),
    ],
    ids=["black", "white", "constant", "1x1", "1x3000", "3000x2"],
)
def test_images_without_content(pixels: NDArray[np.integer], nuclei: int, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encode_png(pixels))
    found = predict_files(small_model(), [path], tmp_path / "out")
    assert found.counts == {"x.png": nuclei}
    labels = tifffile.imread(tmp_path / "out" / "x.labels.tif").reshape(pixels.shape)
    assert labels.max() == nuclei
    assert len(rows_of(tmp_path / "out" / "nuclei.csv")) == nuclei
    (row,) = rows_of(tmp_path / "out" / "images.csv")
    assert int(row["nuclei"]) == nuclei
