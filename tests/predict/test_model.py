"""One way to predict: files, arrays and images of datasets have the same labels, tables and scores."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from nucleus.config.names import Kind
from nucleus.config.recipe import LossOptions, NormalizationOptions
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset
from nucleus.data.images import encode_png
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.data.normalization import normalize
from nucleus.data.reader import LabelledImage, images_of_range, images_of_split
from nucleus.data.synthetic import generated_image, write_generated
from nucleus.errors import DataError, ImageError, UsageError
from nucleus.model.tiling import TiledNetwork
from nucleus.predict.evaluation import (
    combined_scores,
    evaluate,
    evaluate_part,
    parts_of,
    predict_images,
    splits_named,
)
from nucleus.predict.image_files import predict_files
from nucleus.predict.measurement import NucleiSummary, nucleus_columns
from nucleus.predict.model import IMAGES_AT_ONCE, PredictionOptions
from nucleus.predict.results import overlay_of
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.source import array_source, image_source
from nucleus.storage.bucket import Bucket
from tests.predict.test_predict import rows_of, small_model, spots

GREY = spots(150, 130, 7, count=30)
KINDS: dict[str, tuple[NDArray[Any], dict[str, Any]]] = {
    "grey.png": (GREY, {}),
    "rgb.png": (np.dstack([GREY // 2, GREY, GREY]), {}),
    "deep.tif": (GREY.astype(np.uint16) * 13 + 700, {}),
    "float.tif": (GREY.astype(np.float32) / 7, {}),
    "green.png": (np.dstack([255 - GREY, GREY, GREY // 3]), {"channel": 1}),
}


@pytest.mark.parametrize("name", KINDS)
def test_files_and_arrays_and_the_command_agree(name: str, tmp_path: Path) -> None:
    pixels, options = KINDS[name]
    path = tmp_path / name
    if name.endswith("png"):
        path.write_bytes(encode_png(pixels))
    else:
        tifffile.imwrite(path, pixels)
    model = small_model(PredictionOptions(block_side=100))
    of_file, of_array = model.segment(str(path), **options), model.segment(pixels, **options)
    predict_files(model, [path], tmp_path / "out", options.get("channel"))
    assert of_file.count > 10
    assert of_file.labels.dtype == np.int32
    assert np.array_equal(of_file.labels, of_array.labels)
    assert np.array_equal(of_file.labels, tifffile.imread(tmp_path / "out" / f"{path.stem}.labels.tif"))
    assert of_file.table.to_csv(index=False, lineterminator="\n") == (tmp_path / "out" / "nuclei.csv").read_text()
    assert of_array.table.drop(columns="image").equals(of_file.table.drop(columns="image"))
    assert set(of_array.table["image"]) == {"image"}
    written = cv2.imread(str(tmp_path / "out" / f"{path.stem}.overlay.png"))[..., ::-1]
    for found in (of_file, of_array):
        assert found.overlay().dtype == np.uint8
        assert np.array_equal(found.overlay(), written)
    assert repr(of_file) == f"<Segmentation of {name}: 130 x 150 px, {of_file.labels.max()} nuclei>"


def test_tables_have_the_same_columns_and_types_without_nuclei() -> None:
    model = small_model()
    full, empty = model.segment(GREY), model.segment(np.zeros((40, 30), np.uint8))
    assert empty.count == 0
    assert list(empty.table.columns) == list(full.table.columns) == list(nucleus_columns(1))
    assert (empty.table.dtypes == full.table.dtypes).all()
    assert full.table["area_um2"].isna().all()
    assert full.table["touches_edge"].dtype == bool
    in_micrometres = small_model(PredictionOptions(pixel_size=0.5)).segment(GREY).table
    assert in_micrometres["area_um2"].tolist() == pytest.approx((full.table["area"] * 0.25).tolist())


def test_arrays_of_many_shapes_and_depths() -> None:
    model = small_model()
    expected = model.segment(GREY).labels
    several = np.dstack([255 - GREY, GREY, GREY // 2, GREY // 3, GREY])
    for pixels, channel in (
        (GREY[..., np.newaxis], None),
        (np.dstack([GREY] * 3), None),
        (np.dstack([GREY, GREY, GREY, 255 - GREY]), None),
        (np.dstack([255 - GREY, GREY]), 1),
        (several, 1),
        (GREY.astype(np.int64), None),
        (GREY.astype(">u2"), None),
        (GREY.tolist(), None),
        (np.ma.masked_less(GREY, 0), None),
    ):
        assert np.array_equal(model.segment(pixels, channel=channel).labels, expected)
    assert list(model.segment(several, channel=4).table.columns) == list(nucleus_columns(5)), (
        "all channels are measured"
    )
    half = (GREY / 255).astype(np.float16)
    assert np.array_equal(model.segment(half).labels, model.segment(half.astype(np.float32)).labels)
    long = GREY.astype(np.longdouble)
    assert np.array_equal(model.segment(long).labels, model.segment(GREY.astype(np.float64)).labels)
    assert model.segment(GREY > 100).count == model.segment((GREY > 100).astype(np.uint8) * 255).count > 10


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((5, 40, 30, 3)), {}, r"found shape \(5, 40, 30, 3\) of float64\. Pass one plane"),
        (np.zeros(7), {}, r"found shape \(7,\)"),
        (np.zeros((0, 5)), {}, r"found shape \(0, 5\)"),
        (np.zeros((4, 5), complex), {}, "complex128"),
        (np.array([["a", "b"]]), {}, "array of numbers"),
        (None, {}, "array of numbers"),
        (np.zeros((40, 30, 2)), {}, "which has 2 .*Add: channel=0"),
        (np.zeros((3, 40, 30)), {}, r"which has 30 .*np\.moveaxis"),
        (np.zeros((40, 30, 2)), {"channel": 2}, "Expected channel 2 in image; it has 2"),
        (np.zeros((40, 30, 4)), {"channel": 4}, "Expected channel 4 in image; it has 4"),
        (np.pad(GREY[..., np.newaxis], ((0, 0), (0, 0), (3, 0))), {}, "channel 3 .*--channel 3"),
        (np.full((40, 30), np.nan), {}, "NaN"),
        (np.ma.masked_greater(GREY, 100), {}, "masked"),
        ("nowhere.png", {}, "nowhere.png"),
        (Path(), {}, "Expected OME-Zarr"),
    ],
)
def test_what_is_no_image(image: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        small_model().segment(image, **options)


def test_rgb_of_8_bits_is_normalised_as_in_training() -> None:
    """To the bit, in memory and in files: no second stretch on the way."""
    options = NormalizationOptions()
    for seed in range(4):
        image = generated_image(seed, 120, 90)[0] // (seed + 1)
        scaled = ScaledImage(array_source(image), options)
        whole = scaled.whole
        assert np.array_equal(scaled.read(whole.rows, whole.columns), normalize(image, options))
        assert np.array_equal(scaled.rgb(whole.rows, whole.columns), image)


def samples_of(images: list[NDArray[np.uint8]], labels: list[NDArray[np.int32]]) -> list[LabelledImage]:
    return [
        LabelledImage(f"n{number}", Kind.STAIN, np.dstack([image] * 3), truth.astype(np.uint16))
        for number, (image, truth) in enumerate(zip(images, labels, strict=True))
    ]


def test_the_options_have_their_effect_everywhere(tmp_path: Path) -> None:
    """Nuclei three times as large as those that the model knows: in files, arrays and labelled images."""
    model = small_model(PredictionOptions(diameter=36.0))
    images = [
        cv2.resize(spots(100, 110, seed, 12), None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC) for seed in range(3)
    ]
    expected = [model.segment(image).labels for image in images]
    assert not np.array_equal(expected[0], small_model().segment(images[0]).labels)
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(encode_png(image))
        predict_files(model, [tmp_path / f"{number}.png"], tmp_path / str(number))
        assert np.array_equal(tifffile.imread(tmp_path / str(number) / f"{number}.labels.tif"), expected[number])
    found = list(predict_images(model, samples_of(images, expected), LossOptions()))
    for image, labels in zip(found, expected, strict=True):
        assert np.array_equal(image.labels, labels)
        assert image.scores.nuclei.mean_ap == 1
        assert 0 < image.scores.loss < 1
    plain = small_model()
    unscaled = list(predict_images(plain, samples_of(images, [plain.segment(i).labels for i in images]), LossOptions()))
    assert [image.scores.nuclei.mean_ap for image in unscaled] == [1, 1, 1]


def test_whole_images_and_blocks_have_the_same_labels() -> None:
    images = [spots(90 + 40 * number, 150, number, 20) for number in range(11)]
    model = small_model()
    found = model.values(map(array_source, images))
    for image, values in zip(images, found, strict=True):
        assert values.values.shape == (*image.shape, 2)
        assert np.array_equal(model.label(values), model.segment(image).labels)


def test_images_unlike_those_of_validation_are_flagged(tmp_path: Path) -> None:
    model = small_model()
    strict = model.with_config(model.config.model_copy(update={"lowest_score": 0.999}))
    lenient = model.with_config(model.config.model_copy(update={"lowest_score": 0.5}))
    score = np.mean([row["score"] for row in model.segment(GREY).rows])
    assert 0.5 < score < 0.999
    assert (model.segment(GREY).warning, lenient.segment(GREY).warning) == (None, None)
    assert f"unsure: mean score {score:.2f}, below 1.00" in str(strict.segment(GREY).warning)
    assert "unsure" in repr(strict.segment(GREY))
    nothing = np.full((60, 70), 9, np.uint8)
    assert model.segment(nothing).warning == "no nuclei found"
    for name, pixels in (("grey.png", GREY), ("nothing.png", nothing)):
        (tmp_path / name).write_bytes(encode_png(pixels))
    found = predict_files(strict, [tmp_path / "grey.png", tmp_path / "nothing.png"], tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "images.csv")
    assert [row["warning"] for row in rows] == list(found.warnings.values())
    assert [row["warning"][:9] for row in rows] == ["unsure: m", "no nuclei"]
    assert found.warnings.keys() == {"grey.png", "nothing.png"}


def test_the_scale_fits_the_nuclei_unless_an_option_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale that `nucleus.predict.sizing` chooses is that of the prediction, whose network runs once for both."""
    model = small_model()
    ranged = model.with_config(model.config.model_copy(update={"diameters": (10.0, 50.0)}))
    sized = small_model(PredictionOptions(diameter=6.0), diameters=(10.0, 50.0))
    chosen, calls = 1.0, list[float]()
    monkeypatch.setattr("nucleus.predict.model.fitting_scale", lambda look, _: look(chosen))
    whole = TiledNetwork.whole_images
    monkeypatch.setattr(
        TiledNetwork, "whole_images", lambda self, images: calls.extend(i.scale for i in images) or whole(self, images)
    )
    expected = model.segment(GREY)
    assert np.array_equal(ranged.segment(GREY).labels, expected.labels)
    assert calls == [1.0, 1.0]
    chosen = 2.0
    doubled = ranged.segment(GREY)
    assert doubled.labels.shape == GREY.shape
    assert doubled.count == pytest.approx(expected.count, rel=0.2)
    assert sized.segment(GREY).count == pytest.approx(expected.count, rel=0.2)
    assert model.scaled_image(array_source(GREY)).scale == 1, "a model that does not know its range estimates nothing"
    assert small_model(PredictionOptions(fit=False), diameters=(10.0, 50.0)).scaled_image(array_source(GREY)).scale == 1
    assert calls == [1.0, 1.0, 2.0, 2.0]
    assert [ranged.scaled_image(array_source(GREY)).scale, sized.scaled_image(array_source(GREY)).scale] == [2, 2]


def test_other_settings_for_labels_share_the_network() -> None:
    model = small_model()
    large_alone = model.config.instances.model_copy(update={"min_area": 10_000})
    other = model.with_config(model.config.model_copy(update={"instances": large_alone, "nucleus_diameter": 33.0}))
    assert other.config.nucleus_diameter == 33.0
    assert model.config.nucleus_diameter == 12.0
    assert (model.segment(GREY).count > 10, other.segment(GREY).count) == (True, 0)


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forty")
    write_generated(folder, 40, side=48)
    return folder


@pytest.fixture
def dataset(forty: Path, bucket: Bucket) -> Dataset:
    return import_dataset(forty, bucket.uri / "datasets" / "forty", SplitOptions(val=0.2, test=0.2)).dataset


def test_parts_of_a_split_are_the_split(dataset: Dataset, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path)
    whole = [sample.name for sample in images_of_split(dataset, "train", cache)]
    assert sorted(whole) == sorted(sample.name for sample in dataset.manifest.split_samples("train"))
    parts = parts_of(dataset, "train")
    assert len(parts) > 1
    assert all(part.positions.start % IMAGES_AT_ONCE == 0 for part in parts)
    read = [s.name for part in parts for s in images_of_range(dataset, "train", cache, part.positions)]
    assert read == whole
    assert [s.name for s in images_of_range(dataset, "train", cache, range(3, 5))] == whole[3:5]
    assert splits_named("all") == ("train", "val", "test")
    with pytest.raises(UsageError, match="found 'tset'"):
        splits_named("tset")
    with pytest.raises(DataError, match="it has none"):
        parts_of(dataset, "validation")


def test_an_evaluation_in_parts_is_the_evaluation(dataset: Dataset, tmp_path: Path) -> None:
    """To the bit, loss and sums included, in whatever order the parts come: the same batches, added up in one order."""
    cache, model = ShardCache(tmp_path), small_model(normalization=NormalizationOptions())
    splits = ("train", "val", "test")
    whole = evaluate(model, dataset, splits, cache, worst=5)
    parts = [part for split in splits for part in parts_of(dataset, split)]
    scored = [evaluate_part(model, dataset, part, cache, model.loss, worst=5) for part in reversed(parts)]
    found = combined_scores(scored, worst=5)
    assert found.images == whole.images
    assert len(found.images) == 40
    assert found.overall == whole.overall
    assert np.array_equal(found.sums.array, whole.sums.array)
    assert [picture.title for picture in found.worst] == [picture.title for picture in whole.worst]
    assert [picture.score for picture in whole.worst] == sorted(row.map for row in whole.images)[:5]


def test_evaluations_are_mappings_and_tables(dataset: Dataset, tmp_path: Path) -> None:
    scores = evaluate(small_model(), dataset, ("val",), ShardCache(tmp_path))
    assert next(iter(scores)) == "all"
    assert scores["all"]["images"] == len(scores.table) == len(scores.images)
    assert scores["all"]["map"] == pytest.approx(scores.table["map"].mean())
    assert {"name", "kind", "ap_50", "map", "iou", "nuclei_true", "nuclei_predicted"} <= {*scores.table.columns}
    text = str(scores)
    assert all(word in text for word in (*scores, "AP.5", "mAP", "IoU", f"{scores['all']['map']:.4f}"))


def test_overlays_of_large_images_are_reduced_in_files_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from nucleus.predict import results

    monkeypatch.setattr(results, "_LARGEST_SIDE", 60)
    found = small_model().segment(GREY)
    assert found.overlay().shape == (150, 130, 3)
    assert overlay_of(ScaledImage(image_source(GREY), NormalizationOptions()), found.labels).shape == (50, 44, 3)


@pytest.mark.parametrize(("given", "found", "flagged"), [(None, 371, True), (None, 240, False), (371.0, 371, False)])
def test_nuclei_far_larger_than_those_of_training_are_flagged(given: float | None, found: int, flagged: bool) -> None:
    model = small_model(PredictionOptions(diameter=given), diameters=(10.0, 50.0), nucleus_diameter=25.0)
    summary = NucleiSummary()
    summary.add([{"score": 0.97, "diameter": found}])
    assert str(model.doubt(summary, 0.1)).startswith("large: median diameter") == flagged


def test_images_of_which_much_is_left_out_are_flagged() -> None:
    model = small_model()
    areas = sorted(row["area"] for row in model.segment(GREY).rows)
    strict = model.config.instances.model_copy(update={"min_area": areas[len(areas) // 2]})
    fewer = model.with_config(model.config.model_copy(update={"instances": strict, "lowest_score": 0.0}))
    whole = fewer.segment(GREY)
    assert 0 < whole.count < len(areas)
    mask = fewer.maps(fewer.scaled_image(image_source(GREY))).mask > strict.mask_threshold
    left = 1 - np.count_nonzero(whole.labels) / np.count_nonzero(mask)
    assert f"unsure: {left:.0%} of what may be nuclei is left out" in str(whole.warning)
    in_blocks = fewer.with_options(PredictionOptions(block_side=64)).segment(GREY)  # margins count once
    assert in_blocks.warning == whole.warning


@pytest.mark.parametrize("channel", [True, 1.0, [1], np.bool_(True)])
def test_a_channel_is_a_whole_number_or_a_name(channel: Any) -> None:
    with pytest.raises(UsageError, match="Expected a channel's number"):
        image_source(np.dstack([GREY, GREY]), channel)
    assert image_source(np.dstack([GREY, GREY]), np.int64(1)).width == GREY.shape[1]


@pytest.mark.parametrize(
    "given",
    [{"diameter": np.nan}, {"diameter": 0.0}, {"pixel_size": np.nan}, {"pixel_size": 1e-300}, {"pixel_size": 1e300}],
)
def test_sizes_that_are_none(given: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="Expected a"):
        PredictionOptions(**given)  # type: ignore[arg-type]  # all are numbers
