"""The state of a run: what its driver writes, and what readers make of it."""

import json
import threading
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from nucleus.cli.main import cli
from nucleus.config.settings import parse_recipe
from nucleus.errors import AccessDeniedError, DataError, JobError, RunStoppedError, StorageError
from nucleus.registry.manifest import EncoderWeightsOrigin
from nucleus.runs import state as run_state
from nucleus.runs.listing import find_run
from nucleus.runs.plan import RunFolder, RunPlan, load_plan, save_plan
from nucleus.runs.record import ATTEMPTS_FILE, HISTORY_FILE, Attempt, attempts_json, read_attempts
from nucleus.runs.state import (
    LOST_SECONDS,
    STATE_FILE,
    AttemptCallback,
    RunState,
    StateWriter,
    Status,
    read_state,
    server_time,
    status_of,
)
from nucleus.storage.bucket import Bucket

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)


def written(word: Any = "running", **known: Any) -> RunState:
    return RunState(state=word, since=NOON - timedelta(hours=1), host="node-1", process=42, **known)


def begin(bucket: Bucket, run: str = "trial", **changes: Any) -> RunPlan:
    recipe = parse_recipe({"model": "m", "dataset": "d"}, "r.toml").model_dump(mode="json") | changes
    plan = RunPlan(
        run=run,
        bucket=str(bucket.uri),
        recipe=recipe,
        dataset="s3://b/datasets/d@0123456789ab",
        weights_uri=None,
        weights=EncoderWeightsOrigin(source="none", sha256=None),
        wandb_mode="disabled",
        wandb_dir="/w",
    )
    save_plan(bucket, plan)
    return plan


class FakeFolder:
    """In the place of a `RunFolder`: calls `put` with each state that is written."""

    def __init__(self, put: Any) -> None:
        self._put = put

    state_key = "runs/.states/trial.json"

    def apart(self) -> Any:
        return SimpleNamespace(put=lambda _key, data: self._put(json.loads(data)["state"]))


@pytest.mark.parametrize(
    ("state", "seconds", "word", "text"),
    [
        (written(), 60.0, "running", "running since 2026-11-28 11:00 on node-1 (process 42), last heartbeat"),
        (written(), LOST_SECONDS, "running", "running since"),
        (written(), LOST_SECONDS + 1, "lost", "lost: no heartbeat since 2026-11-28 11:54; it ran on node-1"),
        (written(), -3600.0, "running", "running since"),  # written after the server was asked for the time
        (written("stopped"), 1e6, "stopped", "stopped since 2026-11-28 11:00, can be resumed"),
        (written("failed", cause="no room"), 1e6, "failed", "failed since 2026-11-28 11:00: no room"),
        (written("published", version="m@3"), 1e6, "published", "published as m@3"),
        (written("finished"), 1e6, "finished", "finished"),
    ],
)
def test_where_a_run_stands(state: RunState, seconds: float, word: str, text: str) -> None:
    heard = NOON - timedelta(seconds=seconds)
    found = status_of(state, heard, NOON)
    assert (found.state, found.host, found.process, found.last_heard) == (word, "node-1", 42, heard)
    assert found.text.startswith(text)


def test_a_run_that_wrote_no_state() -> None:
    assert status_of(None, None, NOON) == Status("unknown")
    assert Status("unknown").text == "unknown"


def test_the_servers_clock_counts() -> None:
    """A machine whose clock is an hour ahead of the server's does not take a run that goes on for lost."""
    same, ahead = (SimpleNamespace(seconds_ahead=lambda _, s=seconds: s) for seconds in (None, 3600.0))
    assert server_time(same) - server_time(ahead) > timedelta(minutes=59)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "word", "cause"),
    [
        (RunStoppedError("asked to"), "stopped", None),
        (KeyboardInterrupt(), "stopped", None),
        (DataError("no images\nhere"), "failed", "no images"),
        (ValueError(), "failed", "ValueError"),
    ],
)
def test_what_a_run_ends_as(error: BaseException, word: str, cause: str | None, bucket: Bucket) -> None:
    folder = RunFolder(bucket, "trial")
    with pytest.raises(type(error)), StateWriter(folder):
        raise error
    found = read_state(folder)
    assert (found.state, found.cause) == (word, cause)


def test_a_published_run_stays_published(bucket: Bucket) -> None:
    folder = RunFolder(bucket, "trial")

    def publish_and_fail() -> None:
        with StateWriter(folder) as state:
            state.published("m@3")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        publish_and_fail()
    assert (read_state(folder).state, read_state(folder).version) == ("published", "m@3")
    with StateWriter(folder) as state:  # resumed, as a trial
        state.finished()
    assert read_state(folder).state == "finished"


def test_the_state_is_written_again_while_a_run_goes_on() -> None:
    words: list[str] = []
    thrice = threading.Event()

    def put(word: str) -> None:
        words.append(word)
        if len(words) == 3:
            thrice.set()

    with StateWriter(FakeFolder(put), beat_seconds=0.001) as state:  # type: ignore[arg-type]
        assert thrice.wait(600)
        state.finished()
    assert set(words[:-1]) == {"running"}
    assert words[-1] == "finished"


def test_a_bucket_that_refuses_or_hangs_does_not_hurt_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_state, "_LAST_WRITE_SECONDS", 0.01)
    never, refused = threading.Event(), threading.Event()

    def refuse(_word: str) -> None:
        refused.set()
        raise JobError("denied")

    for put in (refuse, lambda _: never.wait()):
        with StateWriter(FakeFolder(put)) as state:  # type: ignore[arg-type]
            state.published("m@1")
    never.set()
    assert refused.wait(600)  # the block may have ended before


def test_the_last_state_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_state, "_RETRY_SECONDS", 0.0)
    words: list[str] = []

    def put(word: str) -> None:
        words.append(word)
        if words.count("published") < 3 and word == "published":
            raise StorageError("busy")

    with StateWriter(FakeFolder(put)) as state:  # type: ignore[arg-type]
        state.published("m@1")
    assert words.count("published") == 3


def test_a_denied_state_is_not_tried_again() -> None:
    words: list[str] = []

    def put(word: str) -> None:
        words.append(word)
        raise AccessDeniedError("no")

    with StateWriter(FakeFolder(put)) as state:  # type: ignore[arg-type]
        state.published("m@1")
    assert words.count("published") == 1


def test_commands_show_the_state(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))
    for run in ("alive", "broken", "old"):
        begin(bucket, run)
    for run, state in (("alive", written()), ("broken", written("failed", cause="no room"))):
        bucket.put(RunFolder(bucket, run).state_key, state.model_dump_json().encode())

    def listed() -> dict[str, Any]:
        done = CliRunner().invoke(cli, ["runs", "list", "--json"])
        assert done.exit_code == 0, done.output
        return {row["run"]: row for row in json.loads(done.stdout)}

    rows = listed()
    assert {run: row["state"] for run, row in rows.items()} == {
        "alive": "running",
        "broken": "failed",
        "old": "unknown",
    }
    keys = ("since", "host", "process", "cause", "version")
    assert [rows["alive"][key] for key in keys] == ["2026-11-28T11:00:00+00:00", "node-1", 42, None, None]
    assert rows["broken"]["cause"] == "no room"
    assert [rows["old"][key] for key in (*keys, "last_heard")] == [None] * 6
    heard = datetime.fromisoformat(rows["alive"]["last_heard"])
    for module in ("run_rows", "listing"):
        later = heard + timedelta(seconds=LOST_SECONDS + 1)
        monkeypatch.setattr(f"nucleus.runs.{module}.server_time", lambda _, now=later: now)
    assert (listed()["alive"]["state"], listed()["broken"]["state"]) == ("lost", "failed")
    shown = CliRunner().invoke(cli, ["runs", "show", "alive"]).stdout
    assert "lost: no heartbeat since" in shown
    assert "node-1 (process 42)" in shown
    assert find_run(bucket, "broken").status.text.endswith("no room")


def test_a_plan_of_another_version_is_listed_and_not_resumed(bucket: Bucket) -> None:
    plan = begin(bucket, "older", a_key_of_old=1)
    assert find_run(bucket, "older").plan == plan
    with pytest.raises(JobError, match="a_key_of_old"):
        load_plan(bucket, "older")
    begin(bucket, "ours")
    assert load_plan(bucket, "ours").recipe == parse_recipe({"model": "m", "dataset": "d"}, "r.toml")
    assert RunPlan.model_validate_json(plan.model_dump_json()) == plan


def attempts_of(home: RunFolder) -> list[Attempt]:
    return read_attempts(home.bucket.get(home.key(ATTEMPTS_FILE)), "x")


def test_each_start_of_the_workers_is_recorded_with_what_it_cost(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the last checkpoint before it to its first step, by the server's clock, which the test drives."""
    home = RunFolder(bucket, "trial")
    clock: dict[str, datetime] = {}

    def last_write(_: AttemptCallback, *names: str) -> datetime | None:
        return max((clock[name] for name in names if name in clock), default=None)

    monkeypatch.setattr(AttemptCallback, "_last_write", last_write)

    def start(driver: int, epoch: int, at: int) -> None:
        state = RunState(state="running", since=NOON, host="node-1", process=driver)
        home.bucket.put(home.key(STATE_FILE), state.model_dump_json().encode())
        callback = AttemptCallback(home)
        clock[ATTEMPTS_FILE] = NOON + timedelta(seconds=at)
        for step in range(3):  # only the first counts
            callback.on_steps_end(epoch, 9, step + 1, 3, 0.5, 4.0)

    start(driver=1, epoch=1, at=0)
    assert [(each.epochs_done, each.lost) for each in attempts_of(home)] == [(0, 0.0)]
    start(driver=1, epoch=1, at=40)  # lost before its first checkpoint
    clock[HISTORY_FILE] = NOON + timedelta(seconds=100)
    start(driver=1, epoch=4, at=151)
    start(driver=2, epoch=4, at=4000)
    found = attempts_of(home)
    assert [(each.epochs_done, each.lost) for each in found] == [(0, 0.0), (0, 40.0), (3, 51.0), (3, 3849.0)]
    assert len({each.driver for each in found}) == 2
    assert found[2].driver == found[1].driver != found[3].driver


def test_attempts_are_read_from_the_servers_times(bucket: Bucket) -> None:
    home = RunFolder(bucket, "trial")
    home.bucket.put(home.key(ATTEMPTS_FILE), attempts_json([Attempt(driver="", epochs_done=0)]))
    AttemptCallback(home).on_steps_end(3, 9, 1, 3, 0.5, 4.0)
    first, second = attempts_of(home)
    assert (first.epochs_done, second.epochs_done) == (0, 2)
    assert 0 <= second.lost < 600
    with pytest.raises(JobError, match="attempts at x; they are damaged"):
        read_attempts(b"[{}]", "x")
