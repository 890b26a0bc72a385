"""Commands as they are typed: the contract's set of them, their JSON, and what bad input says."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import pytest
import tifffile
from click.testing import CliRunner, Result

from nucleus.cli.main import _COMMANDS, cli
from nucleus.cli.options import FiniteRange
from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image, write_generated
from nucleus.registry.publish import publish
from nucleus.registry.versions import read_included
from nucleus.storage.bucket import Bucket
from nucleus.storage.claims import claimed_folder
from nucleus.storage.uri import S3Uri
from tests.small_model import origin

CONTRACT = {
    "demo": {"--workdir", "--weights", "--recipe", "--set"},
    "store start": {"--dir", "--port"},
    "store stop": {"--dir"},
    "store status": {"--dir", "--json"},
    "data import": {
        *("--into", "--seed", "--val", "--test", "--group-by", "--license", "--source", "--single-writer", "--json"),
        *("--labels", "--channel", "--z", "--t", "--anonymous", "--workers"),
    },
    "data list": {"--json"},
    "data show": {"--out", "--json"},
    "data verify": {"--json"},
    "weights add": {"--encoder", "--single-writer"},
    "weights list": {"--json"},
    "train": {"--set", "--run", "--resume", "--single-writer", "--out", "--json"},
    "submit": {
        *("--set", "--run", "--resume", "--single-writer", "--address", "--insecure", "--detach", "--dry-run"),
        "--json",
    },
    "sweep": {"--over", "--set", "--name", "--at-once", "--single-writer", "--out", "--json"},
    "jobs list": {"--address", "--insecure", "--json"},
    "jobs status": {"--address", "--insecure", "--json"},
    "jobs logs": {"--follow", "-f", "--address", "--insecure", "--json"},
    "jobs stop": {"--address", "--insecure", "--json"},
    "doctor": {"--address", "--insecure", "--json"},
    "runs list": {"--model", "--group", "--limit", "--json"},
    "runs show": {"--out", "--json"},
    "runs compare": {"--out", "--json"},
    "models list": {"--json"},
    "models show": {"--json"},
    "models compare": {"--out", "--json"},
    "models pull": {"--half", "--json"},
    "models alias": {"--single-writer"},
    "models clean": {"--remove", "--older-than", "--single-writer", "--json"},
    "models export": {"--format", "--json"},
    "models rollback": {"--single-writer"},
    "evaluate": {"--split", "--tta", "--engine", "--gallery", "--workers", "--json"},
    "predict": {
        *(
            "--model",
            "--out",
            "--diameter",
            "--pixel-size",
            "--channel",
            "--z",
            "--t",
            "--tta",
            "--as-is",
            "--denoise",
            "--overwrite",
            "--workers",
        ),
        *("--engine", "--format", "--single-writer", "--json", "--anonymous"),
        *("--series", "--expand", "--into-image", "--label-name"),
    },
    "serve": {
        *("--model", "--engine", "--host", "--port", "--token-file", "--images", "--corrections", "--recipe", "--ray"),
        *("--max-bytes", "--max-pixels", "--max-seconds", "--max-requests"),
    },
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def here(bucket_uri: S3Uri, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket_uri))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_and_flags_are_those_of_the_contract() -> None:
    found: dict[str, set[str]] = {}

    def visit(name: str, command: click.Command, context: click.Context) -> None:
        if isinstance(command, click.Group):
            for child in command.list_commands(context):
                inner = command.get_command(context, child)
                assert inner is not None
                visit(f"{name} {child}".strip(), inner, context)
        else:
            options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
            found[name] = {flag for option in options for flag in option.opts}

    visit("", cli, click.Context(cli))
    assert found == CONTRACT


def test_no_option_takes_nan() -> None:
    """NaN passes every comparison with the ends of click's own range of numbers."""

    def parameters(command: click.Command, context: click.Context) -> Iterator[click.Parameter]:
        yield from command.params
        if isinstance(command, click.Group):
            for child in command.list_commands(context):
                inner = command.get_command(context, child)
                assert inner is not None
                yield from parameters(inner, context)

    numbers = [each for each in parameters(cli, click.Context(cli)) if isinstance(each.type, click.FLOAT.__class__)]
    assert [each.name for each in numbers if not isinstance(each.type, FiniteRange)] == []
    assert "storage_timeout" in {each.name for each in numbers}
    for wrong in ("nan", "inf", "-inf", "-1", "0"):
        assert invoke("--storage-timeout", wrong, "store", "status").exit_code == 2, wrong


def test_help_of_the_whole_is_the_help_of_the_parts() -> None:
    for name, (_, _, text) in _COMMANDS.items():
        run = invoke(name, "--help")
        assert run.exit_code == 0
        assert text
    assert all(name in invoke("--help").output for name in _COMMANDS)


def test_datasets_by_command(dozen: Path, here: Path, bucket_uri: S3Uri) -> None:
    run = invoke("data", "import", dozen, "dozen", "--json")
    assert run.exit_code == 0, run.output
    imported = json.loads(run.stdout)
    read, sent = run.stderr.splitlines()
    assert read.startswith("read images: 12 of 12 in ")
    assert sent.startswith("upload shards: ")
    assert imported["created"]
    assert (imported["images"], imported["uri"]) == (12, f"{bucket_uri}/datasets/dozen")
    assert sum(split["images"] for split in imported["splits"].values()) == 12
    again = json.loads(invoke("data", "import", dozen, f"{bucket_uri}/datasets/dozen", "--json").stdout)
    assert (again["created"], again["version"]) == (False, imported["version"])
    listed = json.loads(invoke("data", "list", "dozen", "--json").stdout)
    assert [entry["version"] for entry in listed] == [imported["version"]]
    assert json.loads(invoke("data", "list", "--json").stdout) == listed  # the only dataset of the bucket
    assert invoke("data", "list").stdout.splitlines()[1].startswith(f"dozen\t{imported['version']}\t")
    told = invoke("data", "import", dozen, "dozen")
    assert [line.split(" in ")[0] for line in told.stderr.splitlines()] == ["read images: 12 of 12"]  # all is there
    _, _, facts = told.stdout.partition("what\tvalue\n")
    assert dict(line.split("\t") for line in facts.splitlines()) == {
        "already there": f"{bucket_uri}/datasets/dozen@{imported['version']}",
        "images": "12",
        "nuclei": str(imported["nuclei"]),
        "left out": "0",
        "duplicates removed": "0",
        "licences": "not stated (12 images)",
        "look": "nucleus data show dozen --out examples.png",
        "train": "nucleus train RECIPE --set dataset=dozen",
    }
    shown = invoke("data", "show", "dozen", "--out", here / "examples.png")
    assert "train" in shown.stdout
    sheet = cv2.imread(str(here / "examples.png"))
    assert sheet.shape[1] == 2 * 256 + 12
    assert invoke("data", "verify", "dozen").exit_code == 0
    key = next(item.key for item in Bucket(bucket_uri).objects("datasets/") if item.key.endswith(".tfrecord"))
    Bucket(bucket_uri).put(key, b"damaged")
    run = invoke("data", "verify", "dozen", "--json")
    assert run.exit_code == 1
    assert json.loads(run.stdout)["problems"][0].startswith(Path(key).name)


def test_adding_by_command(dozen: Path, here: Path) -> None:
    first = json.loads(invoke("data", "import", dozen, "cells", "--json").stdout)
    write_generated(here / "more", 4, seed=60, side=96)
    run = invoke("data", "import", here / "more", "--into", "cells", "--json")
    assert run.exit_code == 0, run.output
    added = json.loads(run.stdout)
    assert (added["parent"], added["images"] > 12, added["created"]) == (first["version"], True, True)
    assert [item["source"] for item in added["additions"]] == ["more"]
    told = invoke("data", "import", here / "more", "--into", f"cells@{added['version']}")
    facts = dict(line.split("\t") for line in told.stdout.partition("what\tvalue\n")[2].splitlines())
    assert facts["already there"].endswith(added["version"])
    assert (facts["images added"], facts["look"]) == ("0", "nucleus data show cells --out examples.png")
    listed = invoke("data", "list", "cells").stdout.splitlines()
    assert [line.split("\t")[-1] for line in listed] == ["added to", "–", first["version"]]
    assert "more\t" in invoke("data", "show", "cells").stdout


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--into"),
        (("cells", "--into", "cells"), "give one of them"),
        (("--into", "nothing"), "nucleus data import"),
    ],
)
def test_where_to_import_to(dozen: Path, arguments: tuple[str, ...], said: str) -> None:
    run = invoke("data", "import", dozen, *arguments)
    assert run.exit_code == (1 if "nothing" in arguments else 2)
    assert said in run.stderr


@pytest.mark.parametrize("damage", [b"[" * 100_000, b'{"format": 1}', b'{"format": 9}', b"\xff", b""])
def test_a_damaged_dataset_does_not_break_the_list(dozen: Path, here: Path, bucket_uri: S3Uri, damage: bytes) -> None:
    good = json.loads(invoke("data", "import", dozen, "good", "--json").stdout)
    bucket = Bucket(bucket_uri)
    for name in ("good", "bad"):
        bucket.put(f"datasets/{name}/{'0' * 12}/manifest.json", damage)
    for arguments, names in (((), ["bad", "good", "good"]), (("good",), ["good", "good"]), (("bad",), ["bad"])):
        run = invoke("data", "list", *arguments, "--json")
        assert run.exit_code == 1
        rows = json.loads(run.stdout)
        assert sorted(row["name"] for row in rows) == names
        assert [row["version"] for row in rows if "damaged" not in row] == [good["version"]] * ("good" in names)
        assert {row["version"] for row in rows if "damaged" in row} == {"0" * 12}
        assert f"/{'0' * 12}/manifest.json" in run.stderr
        table = invoke("data", "list", *arguments)
        assert table.exit_code == 1
        assert table.stdout.count("\tdamaged\t") == len({*names})
    assert invoke("data", "show", f"good@{good['version']}").exit_code == 0, "by its version it can be used"
    assert list(here.glob("*.json")) == []


def test_a_dataset_without_nuclei_by_command(here: Path) -> None:
    for number in range(6):
        for kind, pixels in (("images", generated_image(number, 48, 48)[0]), ("labels", np.zeros((48, 48), np.uint16))):
            (here / "empty" / kind).mkdir(parents=True, exist_ok=True)
            (here / "empty" / kind / f"{number}.png").write_bytes(encode_png(pixels))
    run = invoke("data", "import", here / "empty", "none", "--json")
    (warning,) = json.loads(run.stdout)["warnings"]
    assert f"Warning: {warning}" in run.stderr.splitlines()
    assert invoke("data", "import", here / "empty", "none").stderr.count(warning) == 1
    refused = invoke("train", "demo", "--set", "dataset=none", "--set", "input.batch_size=2")
    assert refused.exit_code == 1
    assert "Expected nuclei in the split 'train'" in refused.stderr


def test_store_by_command(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    status = invoke("store", "status", "--dir", folder, "--json")
    assert (status.exit_code, json.loads(status.stdout)) == (1, {"running": False})
    try:
        run = invoke("store", "start", "--dir", folder, "--port", 0)
        lines = run.stdout.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith("export AWS_ENDPOINT_URL_S3=http://127.0.0.1:")
        assert lines[1].startswith("export AWS_ACCESS_KEY_ID=")
        assert "NUCLEUS_BUCKET=s3://nucleus" in lines[1]
        assert json.loads(invoke("store", "status", "--dir", folder, "--json").stdout)["running"]
        assert invoke("store", "start", "--dir", folder).stdout == run.stdout
    finally:
        assert invoke("store", "stop", "--dir", folder).exit_code == 0
    assert invoke("store", "status", "--dir", folder).exit_code == 1


@pytest.mark.usefixtures("here")
def test_json_of_an_empty_bucket() -> None:
    for command in (["weights", "list"], ["data", "list"]):
        assert json.loads(invoke(*command, "--json").stdout) == []
        assert invoke(*command).exit_code == 0


def test_the_model_that_comes_along_by_command(
    bucket: Bucket, model_files: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is listed first and shown without a bucket; a bucket's model of its name is asked for with a version."""
    included = read_included().reference.ref
    along = {"model": "nuclei", "latest": included, "from": "package"}
    assert json.loads(invoke("models", "list", "--json").stdout) == [along]
    publish(bucket, "nuclei", model_files, origin())
    assert json.loads(invoke("models", "list", "--json").stdout)[1] == {
        "model": "nuclei",
        "latest": 1,
        "from": "bucket",
    }
    assert [row["version"] for row in json.loads(invoke("models", "list", "nuclei", "--json").stdout)] == [included, 1]
    assert f"models/nuclei/versions/{1:06d}" in invoke("models", "show", "nuclei@1").stdout
    refused = invoke("models", "pull", "nuclei")
    assert refused.exit_code == 2
    assert "such as nuclei@latest" in refused.stderr
    assert invoke("models", "pull", "nuclei@latest", "pulled").exit_code == 0
    assert (here / "pulled" / "model.json").exists()

    monkeypatch.delenv("NUCLEUS_BUCKET")
    run = invoke("models", "list", "--json")
    assert json.loads(run.stdout) == [along]
    assert "NUCLEUS_BUCKET is not set" in run.stderr
    assert [row["version"] for row in json.loads(invoke("models", "list", "nuclei", "--json").stdout)] == [included]
    shown = invoke("models", "show", "nuclei")
    assert shown.stdout.startswith("# nuclei\n")
    assert shown.stdout.splitlines()[-1].startswith(f"nuclei@{included}, ")
    assert json.loads(invoke("models", "show", "nuclei", "--json").stdout)["gate"] is None


def test_prediction_without_a_model_or_a_bucket(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUCLEUS_BUCKET")
    (here / "a.png").write_bytes(encode_png(generated_image(0, 96, 96)[0]))
    for number, named in enumerate(([], ["--model", "nuclei"])):
        run = invoke("predict", "a.png", *named, "--out", f"o{number}", "--engine", "onnx", "--json")
        assert run.exit_code == 0, run.output
        answer = json.loads(run.stdout)
        assert (answer["model"], answer["failures"]) == (str(read_included()), {})
        assert {path.name for path in Path(answer["out"]).iterdir()} == {
            *("a.labels.tif", "a.overlay.png", "images.csv", "nuclei.csv")
        }
    assert "nuclei, the model that comes along" in " ".join(invoke("predict", "--help").output.split())


def test_prediction_of_planes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUCLEUS_BUCKET")
    image = generated_image(0, 96, 96)[0].mean(axis=2).astype(np.uint8)
    planes = np.stack([[image // 8, np.rot90(image, turns)] for turns in range(3)])
    metadata = {"axes": "ZCYX", "Channel": {"Name": ["GFP", "DAPI"]}}
    tifffile.imwrite(here / "a.tif", planes, ome=True, metadata=metadata, photometric="minisblack")
    refused = invoke("predict", "a.tif", "--channel", "DAPI", "--out", "o")
    assert refused.exit_code == 1
    assert "found 3 depths (z). Add: --z max, --z best or --z all" in refused.stderr
    for number, (options, titles) in enumerate((
        (["--z", "all"], ["a.tif z=0", "a.tif z=1", "a.tif z=2"]),
        (["--z", "2", "--t", "0"], ["a.tif"]),
        (["--z", "max"], ["a.tif"]),
    )):  # fmt: skip
        run = invoke("predict", "a.tif", *options, "--channel", "DAPI", "--out", f"o{number}", "--json")
        assert run.exit_code == 0, run.output
        assert list(json.loads(run.stdout)["nuclei"]) == titles
    assert sorted(path.name for path in (here / "o0").glob("*.tif")) == [f"a.z{z}.labels.tif" for z in range(3)]
    whole = tifffile.imread(here / "o0" / "a.z2.labels.tif")
    assert (whole == tifffile.imread(here / "o1" / "a.labels.tif")).all()
    again = invoke("predict", "a.tif", "--z", "all", "--channel", "1", "--out", "o0")
    assert (again.exit_code, "Name another --out" in again.stderr) == (2, True)
    unknown = invoke("predict", "a.tif", "--z", "0", "--channel", "Cy5", "--out", "o4")
    assert (unknown.exit_code, "found the channels 0 'GFP', 1 'DAPI'" in unknown.stderr) == (1, True)
    told = " ".join(invoke("predict", "--help").output.split())
    assert "there is no 3-D segmentation" in told


BAD_INPUT: list[tuple[list[Any], int, str]] = [
    (["train", "nothing.toml"], 2, "shipped recipe: demo, dsb2018-cpu"),
    (["train", "demo", "--set", "workers=0"], 2, "workers: expected a number from 1 to 1024"),
    (["train", "demo", "--set", "optimiser.epochs=1"], 2, "did you mean 'optimizer'?"),
    (["train", "demo", "--set", "epochs"], 2, "Expected a setting KEY=VALUE"),
    (["train", "demo", "--run", "A b"], 2, "Try 'a-b'"),
    (["train", "demo", "--run", "a", "--resume", "b"], 2, "give one of them"),
    (["train"], 2, "Missing argument 'RECIPE'"),
    (["submit"], 2, "Missing argument 'RECIPE'"),
    (["train", "--resume", "no-such-run"], 1, "nucleus runs list"),
    (["train", "demo"], 1, "nucleus data import SRC"),
    (["data", "import", "nothing", "d"], 2, "does not exist"),
    (["data", "import", "empty", "d"], 1, "in empty; found none"),
    (["data", "import", "flat", "d"], 1, "Expected one of these layouts"),
    (["data", "import", "two", "d"], 1, "at least 3 independent images"),
    (["data", "import", "unreadable", "d"], 1, "Expected usable images"),
    (["data", "import", "two", "http://x/d"], 2, "Expected s3://bucket[/prefix]"),
    (["data", "import", "two", "s3://nowhere/d"], 1, "aws s3 mb s3://nowhere"),
    (["data", "import", "two", "Bad Name"], 2, "Try 'bad-name'"),
    (["data", "import", "two", "d", "--group-by", "("], 2, "not a regular expression"),
    (["data", "import", "two", "d", "--val", ".6", "--test", ".6"], 2, "Expected fractions above 0"),
    (["data", "import", "two", "d", "--val", "2"], 2, "not in the range"),
    (["data", "show", "nothing"], 1, "none was imported there"),
    (["data", "list", "nothing"], 1, "nucleus data list"),
    (["models", "pull", "nothing"], 1, "it has no version"),
    (["predict", "flat", "--model", "cells-3", "--out", "o"], 1, "such as cells@3"),
    (["models", "list", "nothing"], 1, "it has no version"),
    (["predict", "flat", "--model", "s3://b/cells/versions/000003", "--out", "o"], 2, "bucket/models/NAME[@REF]"),
    (["models", "export", "nothing", "flat/a.png", "--format", "onnx"], 2, "flat/a.png; it exists already"),
    (["models", "show", "m@"], 2, "version or alias after the @"),
    (["models", "list", "Bad"], 2, "Try 'bad'"),
    (["models", "alias", "nothing", "production"], 1, "it has no version"),
    (["models", "rollback", "nothing", "production"], 1, "does not exist"),
    (["predict", "nothing.png", "--model", "m", "--out", "o"], 2, "nothing is there"),
    (["predict", "flat", "--z", "median", "--out", "o"], 2, "Expected z to be max, mean, best, all or a number from 0"),
    (["predict", "flat", "--t", "max", "--out", "o"], 2, "Expected t to be all or a number from 0; found 'max'"),
    (["predict", "flat", "--expand", "5mm", "--out", "o"], 2, "such as 5um or 8px; found '5mm'"),
    (["predict", "flat", "--into-image", "--out", "o"], 2, "found formats labels, overlay"),
    (["predict", "flat", "--label-name", "a", "--out", "o"], 2, "Expected --into-image with --label-name"),
    (["predict", "flat", "--format", "h5ad", "--out", "o"], 1, "pip install anndata"),
    (["predict", "flat", "--single-writer", "--out", "o"], 2, "Expected results in a bucket for --single-writer"),
    (["predict", "empty", "--model", "m", "--out", "o"], 2, "found none"),
    (["predict", "same", "--model", "m", "--out", "o"], 2, "would both write a.labels.tif"),
    (["predict", "flat", "--model", "m", "--out", "o"], 1, "it has no version"),
    (["predict", "flat", "--model", "m", "--out", "done"], 2, "found a.labels.tif and 1 more. Name another --out"),
    (["predict", "flat", "--model", "m", "--out", "flat/a.png"], 1, "flat/a.png; it is a file"),
    (["predict", "flat", "--model", "m", "--out", "flat/a.png/below"], 1, "flat/a.png; it is a file"),
    (["predict", "flat", "--model", "pulled", "--out", "o"], 2, "pulled/000001, pulled/000002. Name one of them"),
    (["predict", "flat", "--model", "./pulled/", "--out", "o"], 2, "pulled/000001, pulled/000002. Name one of them"),
    (["predict", "flat", "--model", "nothing/there", "--out", "o"], 2, "models pull NAME@VERSION nothing/there"),
    (["predict", "flat", "--model", "./flat", "--out", "o"], 2, "found a folder without manifest.json"),
    (["predict", "flat", "--model", "pulled/000001/manifest.json", "--out", "o"], 2, "is a file. Name its folder"),
    (["predict", "flat", "--model", "pulled@latest", "--out", "o"], 1, "it has no version"),
    (["predict", "flat", "--model", "nuclei@latest", "--out", "o"], 1, "Or use the model that comes along: nuclei"),
    (["predict", "flat", "--model", "nuclei@0123456789ab", "--out", "o"], 1, "another version of this package"),
    (["evaluate", "m", "nothing"], 1, "none was imported there"),
    (["weights", "add", "nothing.h5"], 2, "does not exist"),
    (["weights", "add", "flat/a.png", "--encoder", "resnet"], 2, "is not one of 'mobilenet_v2', 'efficientnet_v2_b0'"),
    (["data", "import", "two", "d@0123456789ab"], 2, "leave out @0123456789ab"),
    (["data", "import", "two", "d", "--seed", "-1"], 2, "is not in the range"),
    (["train", "--resume", "r", "--set", "workers=1"], 2, "leave out --set"),
    (["store", "start", "--dir", "flat/a.png"], 1, "flat/a.png; it is a file"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    BAD_INPUT,
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input(arguments: list[Any], code: int, message: str, here: Path, bucket: Bucket) -> None:
    (here / "empty").mkdir()
    for name in ("flat/a.png", "same/a.png", "same/a.tif", "unreadable/x/images/x.png", "unreadable/x/masks/1.png"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(b"no image")
    (here / "done").mkdir()
    for name in ("a.labels.tif", "a.overlay.png", "other.labels.tif"):
        (here / "done" / name).write_bytes(b"an earlier result")
    for version in ("pulled/000001", "pulled/000002"):
        (here / version).mkdir(parents=True)
        (here / version / "manifest.json").touch()
    write_generated(here / "two", 2, side=48)
    run = invoke(*arguments)
    assert (run.exit_code, run.stdout) == (code, "")
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert list(bucket.objects("")) == []  # nothing half-written under any name
    assert not (here / "o").exists()


def test_two_predictions_into_one_folder(here: Path) -> None:
    (here / "a.png").write_bytes(b"")
    typed = ("predict", "a.png", "--model", "m", "--out", "o")
    with claimed_folder(here / "o"):
        for more in ((), ("--overwrite",)):
            run = invoke(*typed, *more)
            assert run.exit_code == 1
            assert f"process {os.getpid()} on " in run.stderr
    assert "it has no version" in invoke(*typed).stderr


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"NUCLEUS_BUCKET": ""}, 2, "export NUCLEUS_BUCKET=s3://BUCKET"),
        ({"NUCLEUS_BUCKET": "s3://nowhere"}, 1, "aws s3 mb s3://nowhere"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, 1, "nucleus store status"),
        ({"AWS_ENDPOINT_URL_S3": "localhost:9000"}, 1, "Expected a URL such as"),
    ],
)
def test_bad_surroundings(
    changes: dict[str, str], code: int, message: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    for command in (["models", "list", "m"], ["train", "demo"], ["predict", "a.png", "--model", "m", "--out", "o"]):
        (here / "a.png").write_bytes(b"")
        run = invoke(*command)
        assert run.exit_code == code
        assert message in run.stderr


def test_wandb_without_a_key(here: Path, dozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke("data", "import", dozen, "demo")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(here / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = invoke("train", "demo")
    assert run.exit_code == 2
    assert "wandb login" in run.stderr
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    assert "online, offline, disabled" in invoke("train", "demo").stderr


@pytest.mark.usefixtures("bucket")
def test_what_cannot_work_is_said_before_tensorflow_is_imported(here: Path) -> None:
    """It takes seconds to import; an error that needs none of it comes at once."""
    for name in ("empty", "broken/x/images", "broken/x/masks"):
        (here / name).mkdir(parents=True)
    for name in ("images", "masks"):
        (here / "broken" / "x" / name / "x.png").write_bytes(b"no image")
    (here / "there.onnx").touch()
    commands = [
        *(["data", "import", folder, "d"] for folder in ("empty", "broken")),
        ["models", "export", "nothing", "m.onnx", "--format", "onnx"],
        ["models", "export", "nothing", "there.onnx", "--format", "onnx"],
        ["predict", "broken", "--model", "nothing", "--out", "o"],
        ["evaluate", "nothing", "nothing"],
    ]
    code = (
        "import json, sys\nfrom click.testing import CliRunner\nfrom nucleus.cli.main import cli\n"
        "codes = [CliRunner().invoke(cli, command).exit_code for command in json.loads(sys.argv[1])]\n"
        "print(codes, sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[1, 1, 1, 2, 1, 1] []\n", done.stderr


SLOW = """
import sys, tempfile, time
import click
import nucleus.cli.machine
from nucleus.cli.main import main

@click.command()
def slow():
    with tempfile.TemporaryDirectory() as folder:
        print(folder, flush=True)
        for line in sys.stdin:
            print(line, flush=True)

nucleus.cli.machine.doctor = slow
sys.argv = ["nucleus", "doctor"]
main()
"""
"""A command that has a temporary folder and waits for its input."""


def started_slowly(before: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", before + SLOW],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "status", "text"),
    [(signal.SIGINT, 130, "Interrupted.\n"), (signal.SIGTERM, 143, "Terminated.\n"), (signal.SIGHUP, 129, "terminal")],
)
def test_a_signal_ends_a_command_with_one_line(number: int, status: int, text: str) -> None:
    command = started_slowly()
    assert command.stdout is not None
    folder = Path(command.stdout.readline().strip())
    assert folder.is_dir()
    command.send_signal(number)
    _, told = command.communicate()
    assert (command.returncode, len(told.splitlines())) == (status, 1)
    assert text in told
    assert not folder.exists()


def test_a_command_under_nohup_goes_on() -> None:
    command = started_slowly("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    assert command.stdout is not None
    command.stdout.readline()
    command.send_signal(signal.SIGHUP)
    told, _ = command.communicate("still here\n")
    assert (command.returncode, told.strip()) == (0, "still here")


def test_files_of_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    for name in ("job", "keras", "ray", "random", "wandb"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    command = [sys.executable, "-m", "nucleus", "train", "no-such-recipe"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no-such-recipe" in done.stderr
