"""A sweep on a real Ray cluster: trials beside each other, one that diverges, and only the best published."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from nucleus.cli.main import cli
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.registry.manifest import list_versions
from nucleus.runs.listing import find_run
from nucleus.runs.record import read_record
from nucleus.storage.bucket import Bucket
from nucleus.tracking.offline_log import records
from tests.conftest import SECRET, holding
from tests.whole_way import recipe_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("default"),  # Ray 2.60 warns of its own deprecations and leaves sockets to the collector
]


def sweep(recipe: Path, *arguments: str) -> "tuple[int, str, str]":
    run = CliRunner().invoke(cli, ["sweep", str(recipe), *arguments])
    return run.exit_code, run.stdout, run.stderr


@pytest.fixture
def recipe(bucket: Bucket, dozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One worker, one epoch."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # its `runs` is where reports go
    monkeypatch.delenv("WANDB_MODE", raising=False)
    import_dataset(dozen, bucket.uri / "datasets" / "dozen", SplitOptions())
    content = recipe_for(bucket.uri, tmp_path / "cache", workers=1, optimizer={"epochs": 1, "warmup_steps": 0})
    lines = []
    for key, value in content.model_dump(mode="json", exclude_unset=True).items():
        if isinstance(value, dict):
            lines += [f"{key}.{name} = {json.dumps(inner)}" for name, inner in value.items()]
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(lines))
    return path


def test_only_the_best_is_published(bucket: Bucket, recipe: Path, tmp_path: Path) -> None:
    over = ("--over", "optimizer.learning_rate=1e-6,1e30,1e-2", "--name", "some")
    status, told, said = sweep(recipe, *over, "--json")
    assert status == 0, said
    assert "trial 2: optimizer.learning_rate=1e30 (run some-02)" in said
    answer = json.loads(told)
    trials = {trial["run"]: trial for trial in answer["trials"]}
    assert {run: trial["settings"] for run, trial in trials.items()} == {
        f"some-{number:02d}": [f"optimizer.learning_rate={rate}"]
        for number, rate in enumerate(("1e-6", "1e30", "1e-2"), 1)
    }
    assert re.search("training has diverged.*learning_rate lower", trials["some-02"]["error"])
    assert answer["trials"][-1]["run"] == "some-02"
    scores = {run: trials[run]["score"] for run in ("some-01", "some-03")}
    for run, score in scores.items():
        assert score == trials[run]["fitted"]["metrics"]["val"]["all"]["map"]
    best = max(sorted(scores), key=lambda run: scores[run])
    assert answer["trials"][0]["run"] == answer["published"]["origin"]["run"] == best
    assert answer["published"]["origin"]["metrics"] == trials[best]["fitted"]["metrics"]
    assert list_versions(bucket, "tiny") == [1]
    for run in scores:
        paths = list(tmp_path.glob(f"wandb/offline-run-*/run-{run}.wandb"))
        assert len(paths) == (2 if run == best else 1)  # the second has the version
        groups = {record.run.run_group for path in paths for record in records(path) if record.HasField("run")}
        assert groups == {"some"}
        told = read_record((tmp_path / "runs" / run / "report" / "record.json").read_bytes(), run)
        assert (told.group, told.version, told.metrics) == (
            "some",
            1 if run == best else None,
            trials[run]["fitted"]["metrics"],
        )
    from ray._private.worker import _global_node

    assert not holding(Path(_global_node.get_session_dir_path()), SECRET.encode())  # Ray Tune's own list has AWS's keys
    states = {run: find_run(bucket, run).status for run in trials}
    assert {run: found.state for run, found in states.items()} == {
        **dict.fromkeys(scores, "finished"),
        best: "published",
        "some-02": "failed",
    }
    assert "training has diverged" in (states["some-02"].cause or "")
    status, _, said = sweep(recipe, *over)
    assert (status, "in use" in said) == (1, True)


def test_trials_must_be_alike(recipe: Path) -> None:
    status, _, said = sweep(recipe, "--over", "model=a,b")
    assert (status, "one model" in said) == (2, True)
    status, _, said = sweep(recipe, "--over", "optimizer.learning_rat=1,2")
    assert (status, "did you mean 'learning_rate'" in said) == (2, True)
