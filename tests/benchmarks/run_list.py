"""`runs_list`: `nucleus runs list` in a bucket with the runs of years."""

import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from nucleus.runs.plan import PLAN_FILE, RUNS, STATES
from nucleus.runs.run_rows import RunRow
from nucleus.runs.run_rows import _Index as Index
from nucleus.runs.run_rows import _Known as Known
from nucleus.storage.bucket import Bucket
from nucleus.storage.small_objects import SmallObjects
from nucleus.storage.uri import parse_uri
from tests.benchmarks.measure import report, seconds, temporary_store

_RUNS = int(os.environ.get("RUNS", "10000"))
_ROUNDS = 3
_GOAL_SECONDS = 3.0


def runs_list() -> None:
    """The command with all rows in the index, its processor's time against 3 s; most of `RUNS` (10,000) are not new.

    A plan and a state stand for each run, as many bytes as real ones have; the list reads neither.
    """
    with temporary_store():
        bucket = Bucket(parse_uri("s3://nucleus"))
        objects = SmallObjects(bucket)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(partial(_add_run, objects), range(_RUNS)))
        known = {}
        for state in bucket.objects(STATES):
            name = state.key.removeprefix(STATES).removesuffix(".json")
            known[name] = Known(etag=state.etag, modified=state.modified, row=_row(name, state.modified))
        bucket.put(f"{RUNS}.index.json", Index(runs=known).model_dump_json(exclude_none=True).encode())
        command = [sys.executable, "-m", "nucleus", "runs", "list"]
        clock, cpu = [], []
        for _ in range(_ROUNDS):
            began = _children_seconds()
            clock.append(seconds(lambda: _listed(command)))
            cpu.append(_children_seconds() - began)
    report("runs_list", min(cpu) / _GOAL_SECONDS, runs=_RUNS, cpu_s=min(cpu), clock_s=min(clock))


def _add_run(objects: SmallObjects, number: int) -> None:
    name = f"cells-{number:06d}"
    objects.put(f"{RUNS}{name}/{PLAN_FILE}", b"{" + b" " * 2_000 + b"}")
    objects.put(f"{STATES}{name}.json", b"{" + b" " * 200 + b"}")


def _row(run: str, moment: object) -> RunRow:
    found = {"run": run, "model": "cells", "state": "published", "version": f"cells@{int(run[-6:]) + 1}"}
    dates = {"begun": moment, "last_write": moment, "since": str(moment)}
    progress = {"epochs": 74, "epochs_asked": 80, "monitor": "val_map", "best_epoch": 66, "best_score": 0.61}
    scores = {
        "best_epoch_map": 0.61,
        "val_map": 0.62,
        "test_map": 0.6,
        "dataset": "s3://nucleus/datasets/cells@0123456",
    }
    return RunRow.model_validate(
        {**found, **dates, **progress, **scores, "details": f"published as {found['version']}"}
    )


def _listed(command: list[str]) -> None:
    environment = {**os.environ, "NUCLEUS_BUCKET": "s3://nucleus"}
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert told.count("\ncells-") == _RUNS, told[:500]


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
