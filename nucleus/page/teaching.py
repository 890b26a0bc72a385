"""Teaching from the page: corrections become a dataset, a run on the cluster trains from it, and its progress.

The page starts nothing but the two commands that it shows, as processes of their own: `nucleus data import` and
`nucleus submit`. What they are given is checked names and a recipe that is made here; no shell sees them.
"""

import json
import math
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nucleus.config.names import check_name
from nucleus.config.settings import parse_recipe
from nucleus.data.dataset import DATASETS
from nucleus.data.samples import SPLITS
from nucleus.errors import NucleusError, RecipeError, RequestError, UsageError
from nucleus.registry.aliases import read_decision
from nucleus.runs.listing import EpochMetrics, StoredRun, find_run
from nucleus.runs.plan import PLAN_FILE, RunFolder, new_run_name
from nucleus.runs.run_rows import list_runs
from nucleus.serve.problems import without_paths
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import temporary_folder
from nucleus.text import first_line

__all__ = ["RECIPE", "Command", "TeachState", "Teaching", "read_template", "run_document", "run_nucleus"]

RECIPE = """\
model = "{dataset}"
dataset = "{dataset}"
workers = 2
# mix = { "dsb2018@latest" = 0.75 }   # with a dataset of what it knows, it forgets less

[network]
start = "{model}"

[optimizer]
epochs = 10
steps_per_epoch = 24
validate_every = 5
"""
"""Recipe of a run that starts with the version that proposed the nuclei; `{dataset}` and `{model}` are replaced."""
_DATASET, _MODEL = "{dataset}", "{model}"
_SPLITS = ("--val", "0.2", "--test", "0.2")
_LOOK_SECONDS, _JOB_SECONDS, _LONGEST_WAIT = 2.0, 20.0, 7200.0
"""Seconds between looks for the run's plan and for its job, and after which a job that waits is left to itself."""
_ENDED = {"FAILED", "STOPPED"}
_CURVE = ("epoch", "loss")
_BUSY = 409
_ERROR = "Error: "

Command = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]
"""Runs `nucleus` with arguments; returns exit status, stdout and stderr."""
Stage = Literal["importing", "submitting", "waiting", "begun", "failed"]


def run_nucleus(arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run a command of this package in a process of its own, without a shell; return what it printed."""
    command = [sys.executable, "-m", "nucleus", *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # noqa: S603  checked names


@dataclass(frozen=True)
class TeachState:
    """How far the last request to teach is.

    Attributes:
        stage: `importing` corrections; `submitting` the run; `waiting` for the cluster to begin it; `begun`, from when
            on the run's own state says more; or `failed`.
        set: Set of corrections.
        dataset: Dataset that it goes into, and name of the model.
        run: Name of the run.
        message: Why it failed, or what the import says of the dataset.
    """

    stage: Stage
    set: str
    dataset: str
    run: str
    message: str | None = None


class Teaching:
    """Starts imports and runs, one at a time, and knows the runs of the project's bucket.

    Args:
        place: Address of the sets of corrections.
        bucket: The project's bucket; None without one.
        cluster: Address of the cluster that runs are submitted to; None if none is configured.
        recipe: Recipe of the runs, from `read_template`.
        command: What runs the commands.
    """

    def __init__(
        self,
        place: str,
        bucket: Bucket | None,
        cluster: str | None,
        recipe: str = RECIPE,
        command: Command = run_nucleus,
    ) -> None:
        self._place, self._bucket, self._cluster, self._command = place.rstrip("/"), bucket, cluster, command
        self.recipe = recipe
        self._lock = threading.Lock()
        self.state: TeachState | None = None

    @property
    def available(self) -> bool:
        """Whether the page can start a run: there is a bucket, and a cluster is configured."""
        return self._bucket is not None and self._cluster is not None

    def document(self) -> dict[str, Any]:
        """Return whether the page can start a run, where, and how far the last one is."""
        return {
            "available": self.available,
            "bucket": self._bucket is not None,
            "state": asdict(self.state) if self.state else None,
        }

    def start(self, chosen: str, dataset: str, model: str) -> TeachState:
        """Begin to import a set of corrections and to train from it; return at once.

        Args:
            chosen: The set.
            dataset: The dataset, which is made if there is none, and name of the model.
            model: Version that training starts with.

        Raises:
            UsageError: No bucket or no cluster is configured.
            UriError: A name is none.
            RequestError: Another run is being started (409).
        """
        if not self.available:
            raise UsageError(
                "Expected a bucket and a cluster that runs are submitted to; found none. Start the service with "
                "NUCLEUS_BUCKET and RAY_ADDRESS=https://..., or use the commands."
            )
        state = TeachState("importing", check_name(chosen, "correction set"), check_name(dataset, "dataset"), "")
        with self._lock:
            if self.state is not None and self.state.stage in {"importing", "submitting", "waiting"}:
                raise RequestError(
                    f"Expected one run at a time; one from {self.state.set} is being started. Wait until it has begun.",
                    _BUSY,
                )
            self.state = replace(state, run=new_run_name(dataset))
            state = self.state
        threading.Thread(target=self._teach, args=(state, model), name="teach", daemon=True).start()
        return state

    def _teach(self, state: TeachState, model: str) -> None:
        try:
            message = self._import(state)
            self._to(replace(state, stage="submitting", message=message))
            self._submit(state, model)
            self._to(replace(state, stage="waiting", message=message))
            self._wait(state)
            self._to(replace(state, stage="begun", message=message))
        except NucleusError as error:
            self._to(replace(state, stage="failed", message=without_paths(str(error))))
        except Exception as error:  # the service goes on, and says it
            self._to(replace(state, stage="failed", message=without_paths(first_line(error) or type(error).__name__)))

    def _to(self, state: TeachState) -> None:
        self.state = state

    def _import(self, state: TeachState) -> str:
        assert self._bucket is not None
        there = self._bucket.folders(f"{DATASETS}{state.dataset}")
        how = ("--into", state.dataset) if there else (state.dataset, *_SPLITS)
        done = self._done("data", "import", f"{self._place}/{state.set}", *how, "--json")
        return without_paths(_imported(done))

    def _submit(self, state: TeachState, model: str) -> None:
        with temporary_folder("teach") as folder:
            recipe = folder / f"{state.dataset}.toml"
            recipe.write_text(_filled(self.recipe, state.dataset, model), encoding="utf-8")
            self._done("submit", str(recipe), "--run", state.run, "--detach", *self._where)

    @property
    def _where(self) -> tuple[str, ...]:
        return ("--address", str(self._cluster))

    def _wait(self, state: TeachState) -> None:
        """Return when the run has begun. Raises `UsageError` if its job has ended before, or waits for hours."""
        assert self._bucket is not None
        plan, begun = RunFolder(self._bucket, state.run).key(PLAN_FILE), time.monotonic()
        looked = begun
        while self._bucket.find(plan) is None:
            now = time.monotonic()
            if now - begun > _LONGEST_WAIT:
                raise UsageError(
                    f"Expected the cluster to begin {state.run}; it still waits for room. Look at it: nucleus jobs "
                    f"status {state.run}"
                )
            if now - looked > _JOB_SECONDS:
                looked = now
                self._check_job(state)
            time.sleep(_LOOK_SECONDS)

    def _check_job(self, state: TeachState) -> None:
        """Raise `UsageError`, with what its log says last, if a job has ended."""
        status = self._command(["jobs", "status", state.run, *self._where, "--json"])
        if status.returncode or json.loads(status.stdout)["status"] not in _ENDED:
            return  # also if the cluster does not answer just now
        log = self._command(["jobs", "logs", state.run, *self._where])
        said = _error_in(log.stdout) or f"Its log: nucleus jobs logs {state.run}"
        raise UsageError(f"Expected the cluster to begin {state.run}; its job ended before. {said}")

    def _done(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a command. Raises `UsageError` with its words if it fails."""
        done = self._command(arguments)
        if done.returncode:
            said = _error_in(done.stderr) or f"nucleus {arguments[0]} ended with status {done.returncode}."
            raise UsageError(said)
        return done

    # Runs

    def newest(self, model: str) -> dict[str, Any] | None:
        """Return the newest run of a model; None if there is none.

        Raises:
            JobError: One of its documents cannot be read.
            StorageError: The bucket cannot be read.
            UriError: The name is not valid.
        """
        if self._bucket is None:
            return None
        check_name(model, "model")
        found = list_runs(self._bucket, model=model, limit=1)
        return self.run(found[0].run) if found else None

    def run(self, name: str) -> dict[str, Any] | None:
        """Return a run. Raises `JobError` if there is none."""
        return None if self._bucket is None else run_document(self._bucket, find_run(self._bucket, name))


def read_template(path: Path) -> str:
    """Return a recipe in which `{dataset}` and `{model}` stand for what the page puts there.

    Raises:
        RecipeError: The file cannot be read, has no `{dataset}` or `{model}`, or is no recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(f"Expected a recipe at {path}; it cannot be read: {first_line(error)}") from error
    missing = [name for name in (_DATASET, _MODEL) if name not in text]
    if missing:
        raise RecipeError(
            f"Expected a recipe with {_DATASET} as its dataset and {_MODEL} as network.start in {path}; found no "
            f"{' and no '.join(missing)}. The page puts there what is taught; docs/page.md shows a recipe."
        )
    try:
        parse_recipe(tomllib.loads(_filled(text, "cells", "cells@1")), str(path))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"Expected a recipe in TOML at {path}; found {error}. Correct it.") from error
    return text


def _filled(recipe: str, dataset: str, model: str) -> str:
    return recipe.replace(_DATASET, dataset).replace(_MODEL, model)


def _imported(done: "subprocess.CompletedProcess[str]") -> str:
    """Return what an import says: how many images each split has, what that means, and its warnings."""
    dataset = json.loads(done.stdout)
    train, val, test = (dataset["splits"][split]["images"] for split in SPLITS)
    counts = f"{train} to learn from, {val} to choose by, {test} to judge by"
    said = f"{dataset['name']} has {train + val + test} images: {counts}."
    if not test:
        said += " Without one to judge by, the gate lets no new version pass; correct more images."
    warnings = [line for line in done.stderr.splitlines() if line.startswith("Warning: ")]
    return " ".join([said, *warnings])


def _error_in(text: str) -> str | None:
    """Return the last message of an error that a command printed."""
    found = [line for line in text.splitlines() if line.startswith(_ERROR)]
    return found[-1].removeprefix(_ERROR).strip() if found else None


def run_document(bucket: Bucket, run: StoredRun) -> dict[str, Any]:
    """Return what the page shows of a run: its state, its curve, and the gate's decision about its version.

    The curve is a list of `epoch`, `loss` and `score`, each None where it is not a finite number.
    """
    status, (done, epochs), best = run.status, run.epochs, run.best
    decision = None
    if status.version:
        name, _, number = status.version.partition("@")
        decision = read_decision(bucket, name, int(number))
    return {
        "run": run.run,
        "state": status.state,
        "message": status.cause,
        "begun": run.begun.isoformat(),
        "done": done,
        "epochs": epochs,
        "monitor": run.monitor,
        "curve": [_point(epoch, run.monitor) for epoch in run.history],
        "best": _finite(best["epoch"]) if best else None,
        "version": status.version,
        "gate": {"passed": decision.passed, "alias": decision.alias, "text": str(decision)} if decision else None,
    }


def _point(epoch: EpochMetrics, monitor: str) -> dict[str, float | None]:
    return {**{name: _finite(epoch.get(name)) for name in _CURVE}, "score": _finite(epoch.get(monitor))}


def _finite(value: float | None) -> float | None:
    """Return a number that JSON has."""
    return value if value is not None and math.isfinite(value) else None
