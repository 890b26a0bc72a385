"""`model.onnx` is compared with TensorFlow before anything is published."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import nucleus
from job.final_model import add_onnx, check_same_nuclei, write_half
from nucleus.cli.main import cli
from nucleus.config.names import Reference
from nucleus.config.settings import parse_recipe
from nucleus.data.cache import ShardCache
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.data.reader import LabelledImage, images_of_split
from nucleus.data.synthetic import write_generated
from nucleus.errors import ModelError
from nucleus.model.engines import OnnxEngine
from nucleus.model.export import write_onnx
from nucleus.model.unet import build_unet, calibrate_encoder
from nucleus.predict.evaluation import evaluate
from nucleus.predict.model import Model, load_pulled
from nucleus.progress import no_progress
from nucleus.registry.publish import publish
from nucleus.registry.versions import PulledModel, pull_cached, read_pulled
from nucleus.storage.bucket import Bucket
from tests.model.test_engines import TILES, config_of
from tests.predict.test_predict import CONFIG
from tests.small_model import origin


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


def published(folder: Path, bucket: Bucket, images: Path) -> PulledModel:
    """The version `m@1` of a random network, with its scores on a dataset of four images."""
    write_generated(images, 4, side=64)
    uri = bucket.uri / "datasets" / "few"
    dataset, cache = (
        import_dataset(images, uri, SplitOptions(val=0.25, test=0.25)).dataset,
        ShardCache(images / "cache"),
    )
    add_onnx(folder, dataset, cache)
    config = config_of("distance")
    model = Model(OnnxEngine(folder / "model.onnx", config), config)
    metrics = {split: evaluate(model, dataset, (split,), cache).overall for split in ("val", "test")}
    recipe = parse_recipe({"model": "m", "dataset": "few"}, "test").model_dump(mode="json")
    made = origin().model_copy(update={"metrics": metrics, "dataset": str(dataset), "recipe": recipe})
    history = [{"epoch": 1, "seconds": 90.0, "validation_seconds": 30.0, "workers": 2}] * 3
    (folder / "metrics.json").write_text(json.dumps({"metrics": metrics, "history": history}))
    (folder / "card.md").write_text("A card.")
    publish(bucket, "m", folder, made)
    return pull_cached(bucket, Reference("m"))


def test_a_version_in_half_precision(
    model_folder: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is used as the version is, has its origin and its scores, and the sums of its own files."""
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    whole = published(model_folder, bucket, tmp_path / "images")
    typed = ("models", "pull", "m", str(tmp_path / "half"), "--half", "--json")
    for _ in range(2):  # the second replaces the first
        run = CliRunner().invoke(cli, typed)
        assert run.exit_code == 0, run.output
    half = read_pulled(tmp_path / "half")
    assert (half.manifest.model, half.manifest.version, half.manifest.created) == ("m", 1, whole.manifest.created)
    kept = {"metrics": {}}
    assert half.manifest.origin.model_copy(update=kept) == whole.manifest.origin.model_copy(update=kept)
    for split, scores in whole.manifest.origin.metrics.items():
        assert half.manifest.origin.metrics[split]["all"]["map"] == pytest.approx(scores["all"]["map"], abs=2e-3)
        assert half.manifest.origin.metrics[split]["all"]["nuclei_true"] == scores["all"]["nuclei_true"]
    assert half.manifest.files["model.onnx"].size < 0.7 * whole.manifest.files["model.onnx"].size
    card = re.sub(r"\s+", " ", (half.folder / "card.md").read_text())
    assert "kept in half precision (float16)" in card
    assert "Duration: 6 min of training and validation on 2 workers with 1 CPU core each" in card
    assert load_pulled(half).segment(TILES[0]).labels.shape == TILES[0].shape[:2]


def test_half_precision_that_costs_too_much_is_refused(
    model_folder: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    whole = published(model_folder, bucket, tmp_path / "images")
    better = {split: {"all": {**scores["all"], "map": 0.9}} for split, scores in whole.manifest.origin.metrics.items()}
    made = whole.manifest.origin.model_copy(update={"metrics": better})
    claimed = PulledModel(whole.folder, whole.manifest.model_copy(update={"origin": made}))
    with pytest.raises(ModelError, match=r"single precision, 0\.9000.*Leave --half out"):
        write_half(claimed, tmp_path / "half", lambda _: nullcontext(no_progress))
    assert not (tmp_path / "half").exists()


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
    yield LabelledImage("scene", nucleus.config.Kind.DARK_FIELD, blank, np.zeros((64, 64), np.int32))


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
