"""The whole way with two real Ray workers and a real S3 server, on a dozen images: contents, not existence."""

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from click.testing import CliRunner

import nucleus
from job.publishing import FinishedRun, judge, publish_run
from job.ray_internals import pass_to_controller
from job.train import RunOptions, resume, train
from nucleus.cli.main import cli
from nucleus.config.names import Reference
from nucleus.config.recipe import Recipe
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import locate_dataset, open_dataset
from nucleus.data.images import encode_png
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.data.synthetic import generated_image, write_generated
from nucleus.errors import DataError, JobError, ModelError, WeightsError
from nucleus.model.export import write_onnx
from nucleus.model.unet import load_model
from nucleus.predict.evaluation import evaluate
from nucleus.predict.model import load_model_folder
from nucleus.registry.aliases import move_alias, read_decision
from nucleus.registry.manifest import ModelManifest, list_versions, version_prefix
from nucleus.registry.publish import publish
from nucleus.registry.versions import pull
from nucleus.runs.plan import load_plan
from nucleus.tracking.offline_log import records
from nucleus.tracking.wandb_run import offline_files
from tests.data.test_importing import write_pairs
from tests.job.test_publishing import with_a_weight_changed
from tests.tracking.offline_log import logged_artifacts, rows_of_run
from tests.tracking.wandb_server import wandb_server
from tests.whole_way import Recorder, Trained, assert_same_labels, assert_same_scores, recipe_for

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("default"),  # Ray 2.60 warns of its own deprecations and leaves sockets to the collector
]


def test_manifest_and_sums_hold(trained: Trained) -> None:
    manifest = trained.manifest
    prefix = version_prefix("tiny", manifest.version)
    stored = {item.key.removeprefix(f"{prefix}/") for item in trained.bucket.objects(f"{prefix}/")}
    files = {"model.json", "model.weights.h5", "model.onnx", "metrics.json", "card.md", "preview.png"}
    assert stored == {"claim.json", "manifest.json", *files}
    for name, file in manifest.files.items():
        data = trained.bucket.get(f"{prefix}/{name}")
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)
    assert manifest.origin.dataset == str(trained.dataset)
    assert manifest.origin.recipe == trained.recipe.model_dump(mode="json")
    assert manifest.origin.encoder_weights.source == "none"
    assert manifest.origin.run == "first-run"


def test_the_card_tells_of_this_run(trained: Trained) -> None:
    card = re.sub(r"\s+", " ", (trained.folder / "card.md").read_text())
    scores = trained.manifest.origin.metrics["test"]["all"]
    assert f"| test | all | {scores['images']:.0f} | {scores['ap_50']:.3f} |" in card
    assert f"Of {scores['nuclei_true']:.0f} true nuclei, " in card
    for text in (
        f"`{trained.dataset}`",
        "`first-run`",
        "initialised with random weights",
        "not stated (set `card.license`",
    ):
        assert text in card


def test_the_cards_five_lines_of_python(trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As they stand in the card of the pulled model, which lies in `model`, on a picture the model has not seen."""
    shutil.copytree(trained.folder, tmp_path / "model")
    image = generated_image(99, 96, 80)[0]
    (tmp_path / "image.png").write_bytes(encode_png(image))
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "card.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "card.md", "exec"), names)
    expected = load_model_folder(trained.folder).segment(image)
    assert names["found"].labels.shape == (96, 80)
    assert_same_labels(names["found"].labels, expected.labels)
    assert len(names["found"].table) == expected.labels.max()


def test_the_cards_commands(trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(trained.bucket.uri))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.png").write_bytes(encode_png(generated_image(99, 96, 80)[0]))
    (commands,) = re.findall(r"```sh\n(.*?)```", (trained.folder / "card.md").read_text(), re.DOTALL)
    for command in commands.splitlines():
        program, *arguments = shlex.split(command, comments=True)
        assert program == "nucleus"
        run = CliRunner().invoke(cli, arguments)
        assert run.exit_code == 0, run.output
    assert (tmp_path / "results" / "image.labels.tif").is_file()


def test_pulled_weights_predict_what_the_trainer_predicted(trained: Trained) -> None:
    model = load_model_folder(trained.folder)
    for split in ("val", "test"):
        cache = ShardCache(trained.folder.parent / "cache")
        found = evaluate(model, trained.dataset, (split,), cache)
        assert_same_scores(found.overall, trained.manifest.origin.metrics[split])
    # The checkpoint in runs/ holds the same weights as the published version: the same graph on the same batch.
    best = sorted(
        item.key for item in trained.bucket.objects("runs/first-run/") if item.key.endswith("best.weights.h5")
    )[-1]
    checkpoint = trained.folder.parent / "checkpoint"
    trained.bucket.download(best, checkpoint / "model.weights.h5")
    (checkpoint / "model.json").write_bytes((trained.folder / "model.json").read_bytes())
    image = generated_image(99, 64, 64)[0][np.newaxis].astype(np.float32)
    from_run, pulled = (load_model(path)[0](image, training=False).numpy() for path in (checkpoint, trained.folder))
    assert np.array_equal(from_run, pulled)


def test_history_is_complete_and_the_same_everywhere(trained: Trained) -> None:
    epochs = trained.recorder.epochs
    assert [e["epoch"] for e in epochs] == [1, 2, 3]
    assert ["val_map" in e for e in epochs] == [False, True, True]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    stored = json.loads((trained.folder / "metrics.json").read_text())
    assert stored["history"] == epochs
    assert stored["metrics"] == trained.manifest.origin.metrics
    count = len(trained.dataset.manifest.split_samples("train"))
    assert all(e["images_dropped"] == count % 4 for e in epochs)


def test_offline_wandb_run_holds_the_history(trained: Trained) -> None:
    """In two files: of the first worker, and no other's, and of the driver, which has published."""
    path, of_driver = sorted(trained.wandb_dir.glob("offline-run-*/run-first-run.wandb"))
    for each in (path, of_driver):
        kept = trained.bucket.get(f"runs/first-run/wandb/{each.parent.name}/{each.name}")  # for `wandb sync`, later
        assert kept == each.read_bytes()
    history, config = read_wandb(path)
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in history]
    assert [row for row in rows if "loss" in row] == trained.recorder.epochs
    assert [row["epoch"] for row in rows if "loss" not in row] == [0, 2, 3, 3]  # pictures; the last of the best
    (worst,) = read_wandb(of_driver)[0]
    assert worst["epoch"] == 3
    assert any(key.startswith("worst/") for key in worst)
    (artifact,) = logged_artifacts(trained.wandb_dir.parent, "first-run")
    metadata = json.loads(artifact.metadata)
    assert metadata["version"] == 1
    sums = {name: file.sha256 for name, file in trained.manifest.files.items()}
    assert {name: file["sha256"] for name, file in metadata["files"].items()} == sums
    assert config["model"] == "tiny"
    assert config["dataset_version"] == str(trained.dataset)
    assert trained.manifest.origin.wandb_run == "nucleus/first-run"


def test_a_finished_run_publishes_once_and_its_name_is_taken(trained: Trained, tmp_path: Path) -> None:
    options = RunOptions(folder=tmp_path)
    assert resume("first-run", str(trained.bucket.uri), options) == trained.manifest
    assert list_versions(trained.bucket, "tiny") == [1]
    with pytest.raises(JobError, match="--resume first-run"):
        train(trained.recipe, RunOptions(run="first-run", folder=tmp_path))
    with pytest.raises(JobError, match="no-such-run"):
        resume("no-such-run", str(trained.bucket.uri))


def test_a_wrong_onnx_file_ends_the_publication_before_its_number_is_claimed(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_wrongly(model: Any, heads: Any, path: Path, *, half: bool) -> None:
        write_onnx(model, heads, path, half=half)
        with_a_weight_changed(path)

    weights = [item.key for item in trained.bucket.objects("runs/first-run/") if item.key.endswith("/model.weights.h5")]
    checkpoint = f"{trained.bucket.uri.bucket}/{weights[-1].removesuffix('/model/model.weights.h5')}"
    before = {item.key for item in trained.bucket.objects("models/")}
    monkeypatch.setattr(nucleus.model, "write_onnx", write_wrongly)
    plan = load_plan(trained.bucket, "first-run")
    with pytest.raises(ModelError, match=r"nothing was published\. Expected .* nucleus train --resume "):
        publish_run(plan, FinishedRun({}, None, checkpoint, "disabled"), trained.bucket, Recorder())
    assert {item.key for item in trained.bucket.objects("models/")} == before


def test_predict_and_evaluate_as_typed(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2
    import tifffile

    monkeypatch.setenv("NUCLEUS_BUCKET", str(trained.bucket.uri))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    inputs, out = tmp_path / "inputs", tmp_path / "out"
    inputs.mkdir()
    rgb = generated_image(40, 70, 150)[0]
    grey = np.ascontiguousarray(rgb[..., 0])
    cv2.imwrite(str(inputs / "rgb.png"), rgb[..., ::-1])
    cv2.imwrite(str(inputs / "grey.tif"), grey)
    cv2.imwrite(str(inputs / "deep.tiff"), grey.astype(np.uint16) * 16)
    cv2.imwrite(str(inputs / "rgba.png"), np.dstack([rgb[..., ::-1], np.full(grey.shape, 255, np.uint8)]))
    (inputs / "tiny.png").write_bytes(encode_png(np.zeros((1, 1, 3), np.uint8)))
    run = CliRunner().invoke(cli, ["predict", str(inputs), "--model", "tiny", "--out", str(out), "--json"])
    assert run.exit_code == 0, run.output
    answer = json.loads(run.stdout)
    assert answer["model"] == "tiny@1"
    assert set(answer["nuclei"]) == {"rgb.png", "grey.tif", "deep.tiff", "rgba.png", "tiny.png"}
    model = load_model_folder(trained.folder)
    labels = tifffile.imread(out / "rgb.labels.tif")
    assert_same_labels(labels, model.segment(rgb).labels)
    assert_same_labels(labels, tifffile.imread(out / "rgba.labels.tif"))
    assert tifffile.imread(out / "tiny.labels.tif").shape == (1, 1)
    lines = (out / "nuclei.csv").read_text().splitlines()
    assert lines[0].startswith("image,z,t,label,centroid_x,centroid_y,area")
    assert len(lines) - 1 == sum(answer["nuclei"].values())
    assert sum(line.startswith("rgb.png,") for line in lines) == labels.max()

    (inputs / "broken.png").write_bytes(b"no image")
    again = ["predict", str(inputs), "--model", "tiny@1", "--out", str(out)]
    assert CliRunner().invoke(cli, again).exit_code == 2
    run = CliRunner().invoke(cli, [*again, "--overwrite"])
    assert run.exit_code == 1
    assert "broken.png" in run.stderr
    assert "1 of 6" in run.stderr

    gallery = out / "worst.png"
    run = CliRunner().invoke(cli, ["evaluate", "tiny", "dozen", "--split", "val", "--gallery", str(gallery), "--json"])
    assert cv2.imread(str(gallery)).shape[1] > 1000
    answer = json.loads(run.stdout)
    assert_same_scores(answer["overall"], trained.manifest.origin.metrics["val"])
    assert len(answer["images"]) == answer["overall"]["all"]["images"]
    assert np.mean([image["map"] for image in answer["images"]]) == pytest.approx(answer["overall"]["all"]["map"])

    run = CliRunner().invoke(
        cli, ["models", "export", "tiny", str(tmp_path / "m.keras"), "--format", "keras", "--json"]
    )
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["version"] == 1
    assert json.loads((tmp_path / "m.keras.json").read_text())["labels"]["heads"] == trained.recipe.network.heads


def test_the_first_version_becomes_production_and_the_reason_is_kept(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(trained.bucket.uri))
    assert any("production" in text and "version 1" in text for text in trained.recorder.texts[-2:])
    shown = CliRunner().invoke(cli, ["models", "show", "tiny@production"]).stdout
    assert shown.startswith("# tiny\n")  # the card, without its front matter
    answer = json.loads(CliRunner().invoke(cli, ["models", "show", "tiny", "--json"]).stdout)
    assert (answer["gate"]["passed"], answer["gate"]["metric"]) == (True, "map")
    assert answer["gate"]["reason"] in shown


def test_an_incumbent_of_another_dataset_is_scored_on_this_one(trained: Trained) -> None:
    """The same weights twice: the second cannot beat the first, whatever the first had scored elsewhere."""
    bucket, model = trained.bucket, "gated"
    elsewhere = trained.manifest.origin.model_copy(
        update={"dataset": "s3://x/datasets/y@0123456789ab", "metrics": {"test": {"all": {"map": 0.0}}}}
    )
    files = trained.folder.parent / "files"
    shutil.copytree(trained.folder, files, ignore=shutil.ignore_patterns("manifest.json"))
    publish(bucket, model, files, elsewhere)
    move_alias(bucket, model, "production", 1)
    plan = load_plan(bucket, "first-run")
    recorder = Recorder()
    judge(bucket, publish(bucket, model, files, trained.manifest.origin), plan, recorder)
    decision = read_decision(bucket, model, 2)
    assert decision is not None
    assert decision.incumbent_score == pytest.approx(trained.manifest.origin.metrics["test"]["all"]["map"], abs=1e-3)
    assert not decision.passed
    assert all(fact in recorder.texts[-1] for fact in ("version 2", decision.reason))


def test_bad_runs_end_before_they_begin(trained: Trained, tmp_path: Path) -> None:
    uri = trained.bucket.uri
    with pytest.raises(DataError, match="nucleus data import"):
        train(recipe_for(uri, tmp_path, dataset="nothing"))
    with pytest.raises(WeightsError, match=r"none\.h5"):
        train(recipe_for(uri, tmp_path, network={"weights": str(tmp_path / "none.h5")}))
    with pytest.raises(JobError, match=r"16 CPUs \(found 2\)"):
        train(recipe_for(uri, tmp_path, workers=4, cpus_per_worker=4), RunOptions(run="too-large"))
    with pytest.raises(DataError, match=r"\b64\b"):
        train(recipe_for(uri, tmp_path, input={"crop": 64, "batch_size": 64}), RunOptions(run="too-small"))
    empty = write_pairs(tmp_path / "empty", lambda _: False)
    import_dataset(empty, uri / "datasets" / "empty", SplitOptions())
    with pytest.raises(DataError, match="nuclei in the split 'train'"):
        train(recipe_for(uri, tmp_path, dataset="empty"), RunOptions(run="too-empty"))
    assert list_versions(trained.bucket, "tiny") == [1]
    assert not {"too-large", "too-small", "too-empty"} & set(trained.bucket.folders("runs"))  # their names are free


def test_one_worker_publishes_the_same_bytes_as_two(trained: Trained, tmp_path: Path) -> None:
    """In as many parts as there were workers, on the same batches, it adds up the same numbers in the same order."""
    recorder = Recorder()
    optimizer = {**trained.recipe.optimizer.model_dump(), "gradient_accumulation_steps": 2}
    changes = {"workers": 1, "optimizer": optimizer, "tracking": {"wandb": "disabled"}}
    manifest = train(
        recipe_for(trained.bucket.uri, tmp_path, model="alone", **changes),
        RunOptions(folder=tmp_path / "runs"),
        recorder,
    )
    for alone, together in zip(recorder.epochs, trained.recorder.epochs, strict=True):
        assert alone["loss"] == pytest.approx(together["loss"], rel=1e-5)
    assert manifest.origin.metrics.keys() == trained.manifest.origin.metrics.keys()
    for split, scores in manifest.origin.metrics.items():  # one worker batches the images otherwise than two
        assert_same_scores(scores, trained.manifest.origin.metrics[split])
    name = "model.weights.h5"
    assert manifest.files[name].sha256 == trained.manifest.files[name].sha256
    assert manifest.origin.wandb_run is None


def learning(trained: Trained, images: Path, cache: Path, **changes: Any) -> Recipe:
    """A recipe that starts with a pulled version, on fewer images than a batch has, and mixes in those it knows."""
    optimizer = {"epochs": 2, "steps_per_epoch": 3, "warmup_steps": 1, "learning_rate": 1e-3}
    return recipe_for(
        trained.bucket.uri,
        cache,
        dataset=str(import_dataset(images, trained.bucket.uri / "datasets" / "new", SplitOptions()).dataset),
        mix={"dozen": 0.5},
        tracking={"wandb": "disabled"},
        **{"network": {"start": str(trained.folder)}, "optimizer": optimizer, **changes},
    )


@pytest.fixture(scope="module")
def new_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new-images")
    write_generated(folder, 5, seed=50, side=80)
    return folder


@pytest.fixture(scope="module")
def learned(
    trained: Trained, new_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Recorder, ModelManifest]:
    """The run `learns` of two workers: its recipe, what it showed, and the version that it published."""
    folder = tmp_path_factory.mktemp("learned")
    recipe = learning(trained, new_images, folder / "cache", model="learned")
    recorder = Recorder()
    return recipe, recorder, train(recipe, RunOptions(run="learns", folder=folder / "runs"), recorder)


def test_a_run_starts_with_a_version_and_mixes_in_what_it_knows(
    trained: Trained, learned: tuple[Recipe, Recorder, ModelManifest], tmp_path: Path
) -> None:
    recipe, recorder, manifest = learned
    origin = manifest.origin
    assert origin.dataset == recipe.dataset
    assert [epoch["images_dropped"] for epoch in recorder.epochs] == [0, 0]
    assert origin.encoder_weights == trained.manifest.origin.encoder_weights
    for key in ("encoder", "decoder_channels", "heads"):
        assert origin.recipe["network"][key] == trained.manifest.origin.recipe["network"][key]
    assert origin.start is not None
    assert (origin.start.version, origin.start.sha256) == ("tiny@1", trained.manifest.files["model.weights.h5"].sha256)
    start, new = load_model_folder(trained.folder), open_dataset(locate_dataset(origin.dataset))
    cache = ShardCache(tmp_path / "cache")
    assert_same_scores(origin.start.scores, evaluate(start, new, ("test",), cache).overall)
    (mixed,) = origin.mix
    assert (mixed.dataset, mixed.share) == (str(trained.dataset), 0.5)
    assert_same_scores(mixed.before, trained.manifest.origin.metrics["test"])
    pull(trained.bucket, Reference("learned"), tmp_path / "learned")
    model = load_model_folder(tmp_path / "learned")
    assert_same_scores(mixed.scores, evaluate(model, trained.dataset, ("test",), cache).overall)
    decision = read_decision(trained.bucket, "learned", 1)
    assert decision is not None
    assert (decision.start, decision.start_score) == ("tiny@1", origin.start.scores["all"]["map"])
    card = re.sub(r"\s+", " ", (tmp_path / "learned" / "card.md").read_text())
    assert f"with all weights of `tiny@1` (SHA-256 `{origin.start.sha256}`)" in card
    assert f"test map {mixed.before['all']['map']:.4f} -> {mixed.scores['all']['map']:.4f} on {mixed.dataset}" in card
    record = json.loads(trained.bucket.get("runs/learns/report/record.json"))
    assert record["start"]["version"] == "tiny@1"
    plan = load_plan(trained.bucket, "learns")
    assert trained.bucket.find(f"{str(plan.start_uri).removeprefix(f'{trained.bucket.uri}/')}/model.weights.h5")


def test_training_begins_with_all_weights_of_the_start(trained: Trained, new_images: Path, tmp_path: Path) -> None:
    """With steps that change next to nothing, on one worker, the weights are those of the version."""
    optimizer = {"epochs": 1, "steps_per_epoch": 1, "learning_rate": 1e-12, "final_learning_rate": 1e-12}
    changes = {"model": "still", "workers": 1, "optimizer": optimizer}
    train(learning(trained, new_images, tmp_path / "cache", **changes), RunOptions(folder=tmp_path / "runs"))
    pull(trained.bucket, Reference("still"), tmp_path / "still")
    image = generated_image(99, 64, 64)[0][np.newaxis].astype(np.float32)
    still, start = (load_model(path)[0](image, training=False).numpy() for path in (tmp_path / "still", trained.folder))
    assert still == pytest.approx(start, abs=1e-6)


def test_mixed_batches_are_the_same_on_one_worker(
    trained: Trained, learned: tuple[Recipe, Recorder, ModelManifest], new_images: Path, tmp_path: Path
) -> None:
    """As on two, in as many parts."""
    recipe, _, of_two = learned
    optimizer = {**recipe.optimizer.model_dump(exclude_unset=True), "gradient_accumulation_steps": 2}
    changes = {"model": "mixed", "workers": 1, "optimizer": optimizer}
    alone = learning(trained, new_images, tmp_path / "cache", **changes)
    name = "model.weights.h5"
    assert train(alone, RunOptions(folder=tmp_path / "runs")).files[name].sha256 == of_two.files[name].sha256


def test_a_run_that_w_and_b_refuses_goes_on_offline(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server accepts the key, so that only the worker finds out; it does not start again."""
    recorder = Recorder()
    with wandb_server() as server:
        server.decide = lambda name: 403 if name == "UpsertBucket" else 200
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        pass_to_controller("WANDB_BASE_URL")
        wandb.teardown()  # it reads the environment once
        changes = {"workers": 1, "tracking": {"wandb": "online"}}
        manifest = train(
            recipe_for(trained.bucket.uri, tmp_path, model="untracked", **changes),
            RunOptions(folder=tmp_path / "runs"),
            recorder,
        )
        wandb.teardown()
    (warning,) = [text for text in recorder.texts if "W&B" in text and "offline" in text]
    assert "failed" in warning
    assert len([text for text in recorder.texts if text.startswith("Workers started")]) == 1
    origin = manifest.origin
    assert (origin.wandb_mode, origin.tracked) == ("offline", f"nucleus/{origin.run} (offline)")
    record = json.loads(trained.bucket.get(f"runs/{origin.run}/report/record.json"))
    assert record["wandb_mode"] == "offline"
    losses = [row["loss"] for row in rows_of_run(tmp_path, origin.run) if "loss" in row]
    assert losses == [metrics["loss"] for metrics in recorder.epochs]
    for path in offline_files(tmp_path, origin.run):
        assert trained.bucket.get(f"runs/{origin.run}/wandb/{path.parent.name}/{path.name}") == path.read_bytes()


def test_dataset_is_found_by_version(trained: Trained) -> None:
    name = f"dozen@{trained.dataset.manifest.version}"
    assert open_dataset(locate_dataset(name, str(trained.bucket.uri))) == trained.dataset


def read_wandb(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """History and configuration of an offline run."""
    history, config = [], {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            history.append(
                {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            )
        if record.WhichOneof("record_type") == "run":
            config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
    return history, config
