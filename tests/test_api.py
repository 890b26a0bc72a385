"""The Python API: its names, its light import, and the examples of its docstrings, run on a small model and data."""

import doctest
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import skimage.io
import tomli_w
from click.testing import CliRunner

import nucleus
from nucleus import api
from nucleus.cli.main import cli
from nucleus.config.recipe import NormalizationOptions
from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image
from nucleus.errors import DataError, IntegrityError, ModelError, RecipeError, RunStoppedError, UsageError
from nucleus.metrics.scores import HEADLINES
from nucleus.model.architecture import InstanceSettings, ModelConfig
from nucleus.predict.evaluation import evaluate as evaluate_splits
from nucleus.registry import manifest, versions
from nucleus.registry.aliases import move_alias
from nucleus.registry.publish import publish
from nucleus.registry.versions import pull
from nucleus.storage.bucket import Bucket
from tests.data.test_importing import write_pairs
from tests.small_model import origin, write_untrained
from tests.whole_way import recipe_for

CONFIG = ModelConfig(
    encoder="plain",
    decoder_channels=[8] * 5,
    heads="distance",
    normalization=NormalizationOptions(),
    tile=64,
    overlap=16,
    instances=InstanceSettings(min_score=0.0, min_area=5),
    nucleus_diameter=12.0,
)


def test_the_names() -> None:
    """Whatever is added here is kept: people's notebooks use it."""
    assert nucleus.__all__ == [
        "Dataset",
        "Evaluation",
        "Model",
        "ModelManifest",
        "Recipe",
        "Segmentation",
        "__version__",
        "evaluate",
        "import_dataset",
        "load",
        "open_dataset",
        "read_recipe",
        "train",
    ]
    assert {*nucleus.__all__} - {"__version__"} == {*api.__all__}
    assert {*api.__all__, "data", "predict", "training"} <= {*dir(nucleus)}
    for name in api.__all__:
        assert getattr(nucleus, name) is getattr(api, name)
        assert getattr(api, name).__doc__


def test_the_import_is_light() -> None:
    code = (
        "import sys; before = {*sys.modules}; import nucleus; nucleus.__version__, dir(nucleus)\n"
        "new = {name.partition('.')[0] for name in {*sys.modules} - before} - {*sys.stdlib_module_names}\n"
        "print(*sorted(new))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {*done.stdout.split()} <= {"nucleus", "lazy_loader", "packaging"}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a small network that was not trained."""
    return write_untrained(tmp_path_factory.mktemp("untrained") / "model", CONFIG)


@pytest.fixture
def place(
    bucket: Bucket, untrained: Path, dozen: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> dict[str, Any]:
    """What the examples need: a bucket with models, a folder with images and a recipe, and names."""
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").symlink_to(dozen)
    (tmp_path / "image.png").write_bytes(encode_png(generated_image(99, 96, 80)[0]))
    for name in ("cells", "dsb2018"):
        publish(bucket, name, untrained, origin(score=0.0))
        move_alias(bucket, name, "production", 1)
    recipe = recipe_for(bucket.uri, tmp_path / "cache").model_dump(mode="json", exclude_none=True)
    changes = {"model": "cells", "dataset": "cells", "workers": 1, "optimizer": {"epochs": 1, "warmup_steps": 1}}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe | changes))
    image = skimage.io.imread(tmp_path / "image.png")
    return {"nucleus": nucleus, "skimage": skimage, "image": image}


def run_examples(names: dict[str, Any], *documented: Callable[..., Any]) -> None:
    """Run the examples of docstrings, one after the other, with the same names."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for each in documented:
        (test,) = (found for found in doctest.DocTestFinder(recurse=False).find(each, each.__name__, globs=names))
        assert test.examples, f"{each.__name__} has no examples"
        test.globs = names
        failures, _ = runner.run(test, clear_globs=False)
        assert not failures, each.__name__


def test_the_examples_of_the_docstrings(place: dict[str, Any]) -> None:
    run_examples(place, nucleus.import_dataset, nucleus.open_dataset, nucleus.read_recipe, nucleus.load)
    run_examples(place, nucleus.Model.segment, nucleus.Segmentation, nucleus.evaluate, nucleus.Evaluation)


@pytest.mark.usefixtures("place")
def test_scores_of_images_without_nuclei_are_undefined_everywhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = nucleus.import_dataset(write_pairs(tmp_path / "without", lambda _: False), "without")
    assert "Warning: NO NUCLEI" in capfd.readouterr().err
    scores = nucleus.evaluate("cells", dataset)
    assert scores["all"]["nuclei_true"] == 0
    assert {scores["all"][key] for key, _ in HEADLINES} == {None}
    assert "undefined" in repr(scores)
    told = CliRunner().invoke(cli, ["evaluate", "cells", "without", "--json"])
    overall = json.loads(told.stdout)["overall"]["all"]
    assert {overall[key] for key, _ in HEADLINES} == {None}
    assert "no image of the split test has a nucleus" in told.stderr
    table = CliRunner().invoke(cli, ["evaluate", "cells", "without"]).stdout
    assert table.splitlines()[-1].split("\t")[3:] == ["undefined"] * len(HEADLINES)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("default")  # Ray 2.60 warns of its own deprecations
def test_the_lines_of_the_package_train_and_publish(place: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """As they stand in `help(nucleus)`; then the example of `nucleus.train`, and a published run that is resumed."""
    assert nucleus.__doc__
    lines = [line for line in nucleus.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) == 6
    exec(compile(textwrap.dedent("\n".join(lines)), "help", "exec"), place)
    assert repr(place["dataset"]).startswith("<Dataset s3://")
    version = place["version"]
    assert str(version) == "cells@2"
    assert version.origin.dataset == str(place["dataset"])
    assert "epoch 1/1: loss" in capfd.readouterr().err, "the run is shown"
    assert Path("runs").is_dir()
    again = nucleus.train(resume=version.origin.run)
    assert again == version
    loaded = nucleus.load(str(version))
    assert loaded.manifest == version
    assert place["scores"]["all"]["images"] == nucleus.evaluate(loaded, place["dataset"])["all"]["images"]


def test_a_model_is_verified_and_resolved_once(
    place: dict[str, Any], bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []

    def counted(module: ModuleType, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any) -> Any:
            calls.append(f"{name} {Path(arguments[0]).name}" if name == "sha256_of" else name)
            return real(*arguments)

        monkeypatch.setattr(module, name, call)

    first = nucleus.load("cells@production")
    counted(manifest, "sha256_of")
    counted(versions, "resolve_version")
    cached = nucleus.load("cells")
    once = ["sha256_of card.md", "sha256_of model.json", "sha256_of model.weights.h5"]
    assert sorted(calls) == ["resolve_version", *once]
    pulled = pull(bucket, nucleus.config.Reference("cells"), tmp_path / "pulled")
    calls.clear()
    of_folder = nucleus.load(tmp_path / "pulled")
    assert sorted(calls) == once
    labels = first.segment(place["image"]).labels
    for model in (cached, of_folder):
        assert model.manifest == pulled
        assert np.array_equal(model.segment("image.png").labels, labels)
    assert repr(cached).startswith("<Model cells@1: plain")
    (tmp_path / "pulled" / "card.md").write_text("changed")
    with pytest.raises(IntegrityError, match="SHA-256"):
        nucleus.load(tmp_path / "pulled")


def test_options_of_a_loaded_model(place: dict[str, Any]) -> None:
    plain, scaled = nucleus.load("cells"), nucleus.load("cells", diameter=24.0, pixel_size=0.5)
    assert (scaled.options.diameter, scaled.options.pixel_size, scaled.options.turns) == (24.0, 0.5, False)
    assert nucleus.load("cells", tta=True).options.turns
    assert plain.segment(place["image"]).table["area_um2"].isna().all()
    assert scaled.segment(place["image"]).table["area_um2"].notna().all()
    dataset = nucleus.import_dataset("folder", "cells")
    of_model = nucleus.evaluate(scaled, dataset)
    cache = nucleus.data.ShardCache(Path("other").absolute())
    assert of_model == evaluate_splits(scaled, dataset, ("test",), cache)
    assert nucleus.evaluate("cells", "cells") != of_model


@pytest.mark.usefixtures("place")
def test_the_dataset_says_what_was_left_out(capsys: pytest.CaptureFixture[str], dozen: Path) -> None:
    shutil.copytree(dozen, "damaged")
    next(Path("damaged").rglob("images/*.png")).write_bytes(b"no image")
    dataset = nucleus.import_dataset("damaged", "others", seed=1, val=0.2, test=0.2, group_by="^(.*)$")
    assert len(dataset.manifest.left_out) == 1
    assert "left out" in capsys.readouterr().err
    assert nucleus.open_dataset("others") == dataset
    assert nucleus.open_dataset(str(dataset)) == dataset


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nucleus.load("nothing"), ModelError, "models list"),
        (lambda: nucleus.load("cells@7"), ModelError, "version 7"),
        (lambda: nucleus.evaluate("cells", "nothing"), DataError, "nothing"),
        (lambda: nucleus.evaluate("cells", "cells", "tset"), UsageError, "'tset'"),
        (lambda: nucleus.import_dataset("folder", "cells@0123456789ab"), UsageError, "without a version"),
        (lambda: nucleus.import_dataset("folder", "cells", group_by="("), UsageError, "regular expression"),
        (lambda: nucleus.read_recipe("nothing"), RecipeError, "nothing"),
        (nucleus.train, UsageError, "found neither"),
        (lambda: nucleus.train("recipe.toml", run="a", resume="b"), UsageError, "resume alone"),
        (lambda: nucleus.train("recipe.toml", run="no/name"), UsageError, "run"),
        (lambda: nucleus.train(nucleus.read_recipe("demo"), ["seed=3"]), UsageError, "settings"),
    ],
)
def test_errors_say_what_was_expected(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_ctrl_c_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has saved a checkpoint before; its text says how to go on. SIGTERM is an error of this package."""

    def stopped_by(number: int) -> None:
        def train(*_: object) -> None:
            raise RunStoppedError("Run: nucleus train --resume trial", number)

        monkeypatch.setattr("nucleus.api.job.train", train, raising=False)
        nucleus.train(nucleus.read_recipe("demo"))

    with pytest.raises(KeyboardInterrupt, match="--resume trial"):
        stopped_by(signal.SIGINT)
    with pytest.raises(RunStoppedError, match="--resume trial"):
        stopped_by(signal.SIGTERM)
