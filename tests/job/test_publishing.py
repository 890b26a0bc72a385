"""`model.onnx` is compared with TensorFlow before anything is published."""

from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import nucleus
from job.final_model import add_onnx, check_same_nuclei
from nucleus.data.cache import ShardCache
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.data.reader import LabelledImage, images_of_split
from nucleus.data.synthetic import write_generated
from nucleus.errors import ModelError
from nucleus.model.engines import OnnxEngine
from nucleus.model.export import write_onnx
from nucleus.model.unet import build_unet, calibrate_encoder
from nucleus.predict.model import Model
from nucleus.storage.bucket import Bucket
from tests.model.test_engines import TILES, config_of
from tests.predict.test_predict import CONFIG


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """Configuration and weights of a random network."""
    keras.utils.set_random_seed(0)
    model = build_unet(config_of("distance"))
    calibrate_encoder(model, TILES)
    folder = tmp_path / "model"
    folder.mkdir()
    model.save_weights(folder / "model.weights.h5")
    (folder / "model.json").write_text(config_of("distance").model_dump_json())
    return folder


def with_a_weight_changed(path: Path) -> None:
    model = onnx.load(path)
    weights = next(each for each in model.graph.initializer if len(each.dims) == 4)
    array = numpy_helper.to_array(weights).copy()
    array.flat[array.size // 2] += 0.5
    weights.CopyFrom(numpy_helper.from_array(array, weights.name))
    onnx.save(model, path)


def test_a_network_that_computes_something_else_is_not_published(
    model_folder: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_generated(tmp_path / "images", 4, side=64)
    uri = bucket.uri / "datasets" / "few"
    dataset = import_dataset(tmp_path / "images", uri, SplitOptions(val=0.25, test=0.25)).dataset
    cache = ShardCache(tmp_path / "cache")
    add_onnx(model_folder, dataset, cache)
    assert OnnxEngine(model_folder / "model.onnx", config_of("distance"))(TILES).shape == (3, 64, 96, 2)

    def write_wrongly(model: keras.Model, heads: str, path: Path, *, half: bool) -> None:
        write_onnx(model, heads, path, half=half)
        with_a_weight_changed(path)

    monkeypatch.setattr(nucleus.model, "write_onnx", write_wrongly)
    (image,) = images_of_split(dataset, "test", cache)
    with pytest.raises(ModelError, match=rf"image {image.name}; found a difference of"):
        add_onnx(model_folder, dataset, cache)


def found_by(change: Callable[[np.ndarray], None]) -> Model:
    """A model whose values are those of `scene`, changed."""
    values = scene()
    change(values)
    return Model(lambda tiles: values[np.newaxis, : tiles.shape[1], : tiles.shape[2]], CONFIG)


def scene() -> np.ndarray:
    """Mask and interior of two nuclei of 20 x 20 px that a bridge of one pixel joins if it belongs to the seeds."""
    values = np.full((64, 64, 2), 0.01, np.float32)
    for columns in (slice(5, 25), slice(26, 46)):
        values[10:30, columns] = 0.95
    return values


def images() -> Iterator[LabelledImage]:
    blank = np.zeros((64, 64, 3), np.uint8)
    yield LabelledImage("scene", nucleus.data.Kind.DARK_FIELD, blank, np.zeros((64, 64), np.int32))


def bridge(value: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[20, 25] = 0.95, value

    return change


def test_rounding_at_a_threshold_is_no_difference() -> None:
    """A pixel that changes sides joins two nuclei; elsewhere the nuclei are the same."""
    threshold = CONFIG.instances.seed_threshold
    one, other = found_by(bridge(threshold - 2e-6)), found_by(bridge(threshold + 2e-6))
    (first,), (second,) = ([model.label(each) for each in model.values(sources())] for model in (one, other))
    assert (first.max(), second.max()) == (2, 1)
    check_same_nuclei(one, other, images())
    check_same_nuclei(other, one, images())


def sources() -> list[object]:
    return [nucleus.predict.array_source(image.image, image.name) for image in images()]


def test_a_score_at_its_limit_is_no_difference() -> None:
    limit = CONFIG.instances.min_score

    def one_nucleus_of(score: float) -> Callable[[np.ndarray], None]:
        def change(values: np.ndarray) -> None:
            values[10:30, 5:25, 0] = score

        return change

    check_same_nuclei(found_by(one_nucleus_of(limit + 1e-5)), found_by(one_nucleus_of(limit - 1e-5)), images())


@pytest.mark.parametrize("value", [0.52, np.nan])
def test_a_value_that_is_further_off_is_a_difference(value: float) -> None:
    with pytest.raises(ModelError, match="image scene; found a difference"):
        check_same_nuclei(found_by(bridge(0.5)), found_by(bridge(value)), images())


def test_other_nuclei_away_from_every_threshold_are_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if labels were made in another way."""
    model = found_by(bridge(0.01))
    (values,) = model.values(sources())
    whole = model.label(values)
    without = np.where(whole == 2, 0, whole)
    for answers in ([whole, without], [without, whole]):
        given = iter(answers)
        monkeypatch.setattr(Model, "label", lambda *_, given=given: next(given))
        with pytest.raises(ModelError, match="image scene; 1 differ"):
            check_same_nuclei(model, model, images())
