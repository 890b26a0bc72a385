"""Teaching from the page: which commands run, what is refused, what is said of failures, and what is shown of a run."""

import json
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from nucleus.errors import NucleusError, RecipeError, RequestError, UriError, UsageError
from nucleus.page.layers import FOUND
from nucleus.page.other_layers import compared_layers
from nucleus.page.page_images import PageImage
from nucleus.page.teaching import RECIPE, Teaching, TeachState, read_template, run_document, run_nucleus
from nucleus.runs.listing import StoredRun
from nucleus.runs.plan import RunPlan
from nucleus.storage.bucket import Bucket

CLUSTER = "https://cluster.example"
COUNTS = {"train": {"images": 3}, "val": {"images": 1}, "test": {"images": 0}}
IMPORTED = json.dumps({"name": "cells", "splits": COUNTS})
DONE = {"data": (0, IMPORTED, "")}
PENDING = {"jobs status": (0, '{"status": "PENDING"}', "")}
FAILED_JOB = {"jobs status": (0, '{"status": "FAILED"}', ""), "jobs logs": (0, "x\nError: No room.\ny", "")}


class Commands:
    """Answers commands, and remembers them.

    Args:
        answers: Exit status, stdout and stderr by the first word.
        bucket: Gets the plan of a run when it is submitted; None for a cluster that never begins it.
    """

    def __init__(self, answers: dict[str, tuple[int, str, str]], bucket: Bucket | None = None) -> None:
        self.answers, self.bucket = answers, bucket
        self.given: list[list[str]] = []
        self.recipe = ""

    def __call__(self, arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        self.given.append(list(arguments))
        if arguments[0] == "submit":
            self.recipe = Path(arguments[1]).read_text()
            if self.bucket is not None:
                self.bucket.put(f"runs/{arguments[3]}/run.json", b"{}")
        word = " ".join(arguments[:2]) if arguments[0] == "jobs" else arguments[0]
        return subprocess.CompletedProcess(list(arguments), *self.answers.get(word, (0, "", "")))


def ended(teaching: Teaching) -> TeachState:
    """Wait until the run has begun, or it failed."""
    while teaching.state is None or teaching.state.stage not in {"begun", "failed"}:
        time.sleep(0.01)
    return teaching.state


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nucleus.page.teaching._LOOK_SECONDS", 0.01)
    monkeypatch.setattr("nucleus.page.teaching._JOB_SECONDS", 0.0)


def test_the_commands_are_those_that_the_page_shows(bucket: Bucket) -> None:
    commands = Commands({"data": (0, IMPORTED, "read images\nWarning: left out a: too small\n")}, bucket)
    teaching = Teaching("s3://b/corrections/", bucket, CLUSTER, RECIPE, commands)
    teaching.start("first", "cells", "nuclei@c3e536c992cd")
    state = ended(teaching)
    assert (state.stage, state.set, state.dataset) == ("begun", "first", "cells")
    assert state.message == (
        "cells has 4 images: 3 to learn from, 1 to choose by, 0 to judge by. Without one to judge by, the gate lets no "
        "new version pass; correct more images. Warning: left out a: too small"
    )
    imported, submitted = commands.given
    source = "s3://b/corrections/first"
    assert imported == ["data", "import", source, "cells", "--val", "0.2", "--test", "0.2", "--json"]
    assert submitted[2:] == ["--run", state.run, "--detach", "--address", CLUSTER]
    assert Path(submitted[1]).name == "cells.toml"
    assert '[network]\nstart = "nuclei@c3e536c992cd"\n' in commands.recipe
    assert 'model = "cells"\ndataset = "cells"\n' in commands.recipe
    bucket.put("datasets/cells/0123456789ab/manifest.json", b"{}")
    teaching.start("first", "cells", "cells@1")
    ended(teaching)
    assert commands.given[2] == ["data", "import", source, "--into", "cells", "--json"]


@pytest.mark.parametrize("name", ["--into", "a b", "x; rm -rf .", "$(id)", "../up", "a/b", "", 'a"\n[x]', "A"])
def test_what_is_no_name_starts_nothing(bucket: Bucket, name: str) -> None:
    commands = Commands({})
    teaching = Teaching("corrections", bucket, CLUSTER, RECIPE, commands)
    for chosen, dataset in ((name, "cells"), ("first", name)):
        with pytest.raises(UriError):
            teaching.start(chosen, dataset, "nuclei@1")
    assert (commands.given, teaching.state) == ([], None)


def test_without_a_cluster_or_a_bucket_nothing_starts(bucket: Bucket) -> None:
    for teaching in (Teaching("c", bucket, None), Teaching("c", None, CLUSTER)):
        assert not teaching.available
        with pytest.raises(UsageError, match="RAY_ADDRESS"):
            teaching.start("first", "cells", "nuclei@1")
    assert Teaching("c", None, None).newest("cells") is None


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (
            {"data": (1, "", "read images\nError: Expected images in /srv/hidden/a; none.\n")},
            "images in a; none.",
        ),
        ({**DONE, "submit": (1, "", "Error: Expected a token of the cluster.\n")}, "Expected a token of the cluster."),
        ({**DONE, "submit": (-9, "", "Traceback")}, "nucleus submit ended with status -9."),
        ({**DONE, **FAILED_JOB}, "its job ended before. No room."),
        ({"data": (0, "no JSON", "")}, "Expecting value"),
    ],
)
def test_a_failure_is_said_in_words(bucket: Bucket, answers: dict[str, tuple[int, str, str]], said: str) -> None:
    teaching = Teaching("corrections", bucket, CLUSTER, RECIPE, Commands(answers))
    teaching.start("first", "cells", "nuclei@1")
    state = ended(teaching)
    assert state.stage == "failed"
    assert said in (state.message or "")
    assert "/srv" not in (state.message or "")
    teaching.start("first", "cells", "nuclei@1")  # another try is possible
    ended(teaching)


def test_one_run_is_started_at_a_time(bucket: Bucket) -> None:
    teaching = Teaching("corrections", bucket, CLUSTER, RECIPE, Commands({**DONE, **PENDING}))
    teaching.start("first", "cells", "nuclei@1")
    with pytest.raises(RequestError) as refused:
        teaching.start("second", "cells", "nuclei@1")
    assert refused.value.status == 409
    bucket.put(f"runs/{teaching.state.run if teaching.state else ''}/run.json", b"{}")
    assert ended(teaching).stage == "begun"


def test_a_command_is_one_of_this_package() -> None:
    done = run_nucleus(["--version"])
    assert (done.returncode, done.stdout.split()[0]) == (0, "nucleus,")


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(RECIPE.replace("epochs = 10", "epochs = 3"))
    assert "epochs = 3" in read_template(file)
    for text, said in (
        (RECIPE.replace("{model}", "nuclei@1"), "{model}"),
        (RECIPE.replace("{dataset}", "cells"), "{dataset}"),
        (f"{RECIPE}\nnothing = ", "TOML"),
        (f"{RECIPE}\nepoch = 3\n", "epoch"),
    ):
        file.write_text(text)
        with pytest.raises(NucleusError, match=said):
            read_template(file)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_template(tmp_path / "none.toml")


def test_the_curve_of_a_run_has_only_numbers(bucket: Bucket) -> None:
    settings = {"model": "cells", "optimizer": {"epochs": 5}}
    origin = {"source": "none", "sha256": None}
    plan = RunPlan.model_validate(
        {"run": "a", "bucket": "s3://b", "recipe": settings, "dataset": "s3://b/datasets/cells@0", "weights_uri": None,
         "weights": origin, "wandb_mode": "disabled", "wandb_dir": "."}
    )  # fmt: skip
    history = [{"epoch": 1.0, "loss": float("nan")}, {"epoch": 2.0, "loss": 0.5, "val_map": 0.25}]
    now = datetime.now(UTC)
    document = run_document(bucket, StoredRun(plan, now, now, (), history))
    assert document["curve"] == [{"epoch": 1, "loss": None, "score": None}, {"epoch": 2, "loss": 0.5, "score": 0.25}]
    assert (document["done"], document["epochs"], document["best"], document["gate"]) == (2, 5, 2, None)
    json.dumps(document, allow_nan=False)


def test_how_another_version_differs(tmp_path: Path) -> None:
    def layer(name: str, *boxes: tuple[int, int, int]) -> None:
        labels = np.zeros((40, 80), np.int32)
        for label, left, width in boxes:
            labels[5:15, left : left + width] = label
        (tmp_path / f"0-{name}").mkdir()
        np.save(tmp_path / f"0-{name}" / "labels.npy", labels)

    layer(FOUND, (1, 0, 10), (2, 20, 10), (7, 40, 10))
    layer("by-x", (3, 0, 8), (4, 44, 10), (5, 60, 10))
    layer("saved-y", (1, 0, 10), (2, 60, 9))
    image = PageImage("i", "a.png", tmp_path, tmp_path / "a.png", "0" * 64)
    found = compared_layers(image, "by-x", "saved-y")
    assert found == {
        "before": 3, "after": 3, "same": 1, "gone": [2, 7], "new": [4, 5],
        "corrected": {"nuclei": 2, "before": 1, "after": 2},
    }  # fmt: skip
    assert compared_layers(image, "by-x", None)["corrected"] is None
    with pytest.raises(UsageError):
        compared_layers(image, "by-z", None)
