"""Runs that lose a worker, a machine, the driver, the line or the store: each epoch once, one version in the end."""

import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest

from nucleus.config.names import Reference
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.data.synthetic import write_generated
from nucleus.registry.manifest import list_versions
from nucleus.registry.versions import pull
from nucleus.runs.listing import find_run
from nucleus.runs.plan import RunFolder
from nucleus.runs.state import read_state
from nucleus.storage import local_server as server
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import parse_uri
from nucleus.tracking.tensorboard import EVENTS_FILE
from nucleus.tracking.wandb_run import kept_files
from tests.conftest import SECRET
from tests.faults.proxy import Proxy, seldom
from tests.ray_nodes import ray_command, started_node
from tests.tracking.offline_log import rows_of_run

pytestmark = pytest.mark.filterwarnings("default")

RECIPE = """
model = "{model}"
dataset = "forty"
workers = {workers}
max_failures = 3
stall_timeout = {stall_timeout}
resize_interval = 5.0

[network]
encoder = "plain"
weights = "none"
freeze_encoder = false
decoder_channels = [16, 16, 16, 16, 16]

[input]
crop = 64
batch_size = 12
tile = 64
overlap = 16

[optimizer]
epochs = {epochs}
steps_per_execution = 1
validate_every = 2
warmup_steps = 2
patience = 999
"""
EPOCHS = 14


@dataclass
class Place:
    """Where this file's runs happen: a bucket with a dataset, and a folder for what they write to disk."""

    bucket: Bucket
    folder: Path
    address: str
    started: list["Driver"] = field(default_factory=list)

    def train(
        self,
        run: str,
        *,
        resume: bool = False,
        before: tuple[str, ...] = (),
        endpoint: str | None = None,
        workers: str = "2",
        epochs: int = EPOCHS,
        stall_timeout: float = 60.0,
        cwd: Path | None = None,
        out: bool = True,
        changes: Mapping[str, str] = MappingProxyType({}),
    ) -> "Driver":
        """`nucleus train` in a process group of its own; the model is named as the run."""
        recipe = self.folder / f"{run}.toml"
        content = {"model": run, "workers": workers, "epochs": epochs, "stall_timeout": stall_timeout}
        recipe.write_text(RECIPE.format(**content))
        environment = {
            **os.environ,
            "RAY_ADDRESS": self.address,
            "NUCLEUS_BUCKET": str(self.bucket.uri),
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(self.folder),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            **({"AWS_ENDPOINT_URL_S3": endpoint} if endpoint else {}),
            **changes,
        }
        name = ("--resume" if resume else "--run", run)
        command = [
            sys.executable,
            "-m",
            "nucleus",
            *before,
            "train",
            str(recipe),
            *(("--out", str(self.folder / "runs")) if out else ()),
            *name,
        ]
        log = self.folder / f"{run}-{len(self.started)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.started.append(Driver(process, log))
        return self.started[-1]

    def latest(self, run: str) -> str | None:
        """The checkpoint that a run would resume from: the last one that Ray has recorded."""
        key = f"runs/{run}/checkpoint_manager_snapshot.json"
        if not list(self.bucket.objects(key)):
            return None
        noted = json.loads(self.bucket.get(key))["checkpoint_results"]
        return noted[-1]["checkpoint_dir_name"] if noted else None

    def progress(self, run: str) -> tuple[int, int]:
        """The epoch and step that a run would resume after."""
        state = json.loads(self.bucket.get(f"runs/{run}/{self.latest(run)}/state.json"))
        return state["epochs_done"], state["steps_done"]

    def history(self, run: str) -> list[dict[str, float]]:
        """The metrics of each epoch of a run, which is started if it has not been."""
        if not list_versions(self.bucket, run):
            driver = self.train(run)
            assert driver.ended() == 0, driver.text
        folder = self.folder / run
        pull(self.bucket, Reference(run), folder)
        return list(json.loads((folder / "metrics.json").read_text())["history"])


@dataclass
class Driver:
    """A running `nucleus train`."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text()

    def ended(self, seconds: float = 600) -> int:
        """Wait for its end; return the exit status."""
        return self.process.wait(seconds)

    def wait_until(self, condition: Callable[[], object], seconds: float = 600) -> None:
        """Poll until a condition holds, while the run goes on."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.1)

    def wait_for(self, text: str) -> None:
        self.wait_until(lambda: text in self.text)


def workers() -> list[psutil.Process]:
    """The processes of Ray Train's workers on this session's cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def some_worker(driver: Driver) -> psutil.Process:
    """One of the workers, at a random moment."""
    driver.wait_until(workers)
    seed = random.randrange(1 << 30)
    sys.stderr.write(f"seed {seed}\n")
    chance = random.Random(seed)
    time.sleep(chance.random())
    return chance.choice(workers())


@pytest.fixture(scope="module")
def place(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:  # noqa: ARG001
    import ray

    folder = tmp_path_factory.mktemp("faults")
    write_generated(folder / "forty", 40, side=64)
    uri = parse_uri("s3://nucleus/faults")
    import_dataset(folder / "forty", uri / "datasets" / "forty", SplitOptions())
    here = Place(Bucket(uri), folder, ray.get_runtime_context().gcs_address)
    yield here
    for driver in here.started:
        if driver.process.poll() is None:
            driver.process.kill()
            driver.process.wait()


def is_complete(place: Place, run: str) -> None:
    """One version whose history, like that in W&B and TensorBoard, has each epoch once."""
    assert list_versions(place.bucket, run) == [1]
    history = place.history(run)
    once = Counter(range(1, EPOCHS + 1))
    assert Counter(int(row["epoch"]) for row in history) == once
    assert Counter(logged(place.folder, run)) == once
    kept = [item.key.removeprefix(f"runs/{run}/wandb/") for item in place.bucket.objects(f"runs/{run}/wandb/")]
    assert kept == sorted(kept_files(place.folder, run))
    assert len(kept) > 1
    losses = scalars(place.bucket.get(f"runs/{run}/{EVENTS_FILE}"), "loss")
    assert losses == pytest.approx({int(row["epoch"]): row["loss"] for row in history}, rel=1e-6)


def logged(folder: Path, run: str) -> list[int]:
    """Every epoch whose metrics W&B's files of a run hold, in all attempts together."""
    return [int(row["epoch"]) for row in rows_of_run(folder, run) if "loss" in row]


def scalars(events: bytes, tag: str) -> dict[int, float]:
    """A scalar of an event file, each step once: TFRecords of `Event`."""
    from tensorboard.compat.proto.event_pb2 import Event

    found: dict[int, float] = {}
    at = 0
    while at < len(events):
        (length,) = struct.unpack_from("<Q", events, at)
        event = Event.FromString(events[at + 12 : at + 12 + length])
        at += 16 + length
        for value in event.summary.value:
            if value.tag == tag:
                assert event.step not in found
                found[event.step] = value.simple_value
    return found


def test_a_machine_comes_and_is_taken_away(place: Place, cluster_line: Proxy, cluster_cache: Path) -> None:
    """Two workers are joined by a third on a new machine, which is drained, then lost; the two are asked to stop."""
    driver = place.train("elastic", workers="[1, 4]", epochs=1000)  # more than there is time for
    driver.wait_until(lambda: place.latest("elastic"))
    cache = place.folder / "cache-of-another"
    with another_node(place, cluster_line, cache) as node:
        driver.wait_until(lambda: [count for _, count in gone_on(driver)] == [3])
        for each in (cache, cluster_cache):
            assert list(each.rglob("forty/*/train-*"))
        drain(place, node)
        driver.wait_for("a machine will be lost")
        step = saved(driver, "a machine will be lost")
        driver.wait_until(lambda: place.progress("elastic") >= step)
    driver.wait_until(lambda: [count for _, count in gone_on(driver)] == [3, 2])
    assert gone_on(driver)[-1][0] >= step

    driver.process.send_signal(signal.SIGTERM)
    assert driver.ended() == 143, driver.text
    stopped_at = saved(driver, "a stop was requested")
    assert stopped_at >= step
    assert place.progress("elastic") == stopped_at
    assert "--resume elastic" in driver.text
    assert find_run(place.bucket, "elastic").status.state == "stopped"
    assert list_versions(place.bucket, "elastic") == []
    epochs = logged(place.folder, "elastic")
    assert Counter(epochs) == Counter(range(1, len(epochs) + 1))
    assert len(epochs) >= place.progress("elastic")[0]


def test_one_run_meets_everything(
    place: Place, store: server.RunningStore, cluster_line: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is killed, another stalls, the driver is killed; then the line is bad and the store gone for a while."""
    driver = place.train("hunted", stall_timeout=20.0)  # less, and a busy machine looks stalled
    driver.wait_for(f"epoch 3/{EPOCHS}:")
    driver.wait_until(lambda: place.latest("hunted"))
    some_worker(driver).kill()
    driver.wait_until(lambda: gone_on(driver))

    stopped = some_worker(driver)
    stopped.suspend()
    driver.wait_until(lambda: not stopped.is_running())  # a timeout ended it: a stopped process does not end itself
    assert find_run(place.bucket, "hunted").status.state == "running"
    driver.process.kill()
    driver.process.wait()
    left = read_state(RunFolder(place.bucket, "hunted"))  # what makes it lost in five minutes
    assert (left.state, left.process) == ("running", driver.process.pid)

    before = cluster_line.met.total()
    monkeypatch.setattr(cluster_line, "decide", seldom(0.1, seed=3))
    driver = place.train(
        "hunted", resume=True, stall_timeout=20.0, before=("--storage-timeout", "90"), endpoint=cluster_line.endpoint
    )
    driver.wait_until(lambda: gone_on(driver))
    folder = Path(store.folder)
    running = server.status(folder)
    assert running is not None
    psutil.Process(running.pid).kill()
    time.sleep(31)  # longer than its silence counts as a failure: a third of the timeout
    server.start(folder, store.port)
    assert driver.ended() == 0, driver.text
    assert len(gone_on(driver)) == 1
    assert cluster_line.met.total() > before + 3
    monkeypatch.undo()
    is_complete(place, "hunted")
    assert find_run(place.bucket, "hunted").status.short == "published as hunted@1"
    assert read_state(RunFolder(place.bucket, "hunted")).state == "published"


def test_a_published_run_whose_folders_vanished_has_succeeded(place: Place, tmp_path: Path) -> None:
    """Ctrl-C, as a terminal sends it, saves; then the current folder, with all that the run keeps there, is removed."""
    here = tmp_path / "here"
    here.mkdir()
    settings = {"cwd": here, "out": False, "changes": {"WANDB_DIR": str(here)}}
    driver = place.train("vanishing", **settings)
    driver.wait_until(lambda: place.latest("vanishing"))
    os.killpg(driver.process.pid, signal.SIGINT)
    assert driver.ended() == 130, driver.text
    assert "SIGINT: the workers save and stop" in driver.text
    assert place.progress("vanishing") == saved(driver, "a stop was requested")
    assert "nucleus train --resume vanishing" in driver.text
    assert find_run(place.bucket, "vanishing").status.state == "stopped"

    driver = place.train("vanishing", resume=True, **settings)
    driver.wait_until(lambda: gone_on(driver))
    shutil.rmtree(here)
    assert driver.ended() == 0, driver.text
    assert "Traceback" not in driver.text
    assert "W&B's files of this run have vanished" in driver.text
    assert find_run(place.bucket, "vanishing").status.short == "published as vanishing@1"
    assert place.bucket.find("runs/vanishing/report/report.html")


def test_signals_to_all_processes_save_and_a_lost_cluster_is_told(place: Place, tmp_path: Path) -> None:
    """On a cluster that the command starts; in a folder, and with settings of Keras, that are not for this project."""
    for name in ("job", "keras", "ray", "random", "tensorflow"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current folder')")
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "torch", "image_data_format": "channels_first"}))
    changes = {"RAY_ADDRESS": "local", "KERAS_HOME": str(tmp_path), "KERAS_BACKEND": "torch"}
    driver = place.train("ended", epochs=1000, cwd=tmp_path, changes=changes)
    driver.wait_until(lambda: place.latest("ended"))
    processes = of_driver(driver)
    os.killpg(driver.process.pid, signal.SIGTERM)
    for each in processes:
        with suppress(psutil.NoSuchProcess):  # a job's processes come and go
            each.send_signal(signal.SIGTERM)
    assert driver.ended() == 143, driver.text
    stopped_at = saved(driver, "a stop was requested")
    assert place.progress("ended") == stopped_at
    assert "nucleus train --resume ended" in driver.text
    assert psutil.wait_procs(processes, 600)[1] == []

    driver = place.train("ended", resume=True, epochs=1000, cwd=tmp_path, changes=changes)
    driver.wait_until(lambda: gone_on(driver))
    assert gone_on(driver)[0][0] == stopped_at
    processes = of_driver(driver)
    (head,) = [each for each in processes if name_of(each) == "gcs_server"]
    head.kill()
    assert driver.ended() == 1, driver.text
    last = driver.text.splitlines()[-1]
    for text in ("gcs_server", "SIGKILL", "nucleus train --resume ended"):
        assert text in last
    assert "Traceback" not in driver.text
    assert psutil.wait_procs(processes, 600)[1] == []
    assert find_run(place.bucket, "ended").status.state == "failed"

    driver = place.train("ended", resume=True, epochs=8, cwd=tmp_path, changes=changes)
    assert driver.ended() == 2
    assert "optimizer.epochs: 1000 in the run, 8 here" in driver.text


def of_driver(driver: Driver) -> list[psutil.Process]:
    """All processes of a driver's cluster, and what they have started."""
    return psutil.Process(driver.process.pid).children(recursive=True)


def name_of(process: psutil.Process) -> str:
    """Its name; nothing if it has ended."""
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def test_no_key_was_printed(place: Place) -> None:
    assert place.history("hunted")
    assert not [driver.log for driver in place.started if SECRET in driver.text]


def saved(driver: Driver, why: str) -> tuple[int, int]:
    """Epoch and step after which a run was saved for a reason."""
    ((epoch, step),) = re.findall(rf"Saving after epoch (\d+), step (\d+): {why}", driver.text)
    return int(epoch), int(step)


def gone_on(driver: Driver) -> list[tuple[tuple[int, int], int]]:
    """After which epoch and step, and on how many workers, a run went on, each time."""
    found = re.findall(r"Resuming after epoch (\d+), step (\d+) on (\d+) workers?", driver.text)
    return [((int(epoch), int(step)), int(count)) for epoch, step, count in found]


@contextmanager
def another_node(place: Place, line: Proxy, cache: Path) -> Iterator[str]:
    """One more machine of one CPU with a cache of its own, gone without farewell when the block ends; gives its id."""
    before = set(alive())
    settings = {"AWS_ENDPOINT_URL_S3": line.endpoint, "XDG_CACHE_HOME": str(cache)}
    log = place.folder / "node.log"
    with started_node(place.address, 1, settings, log):
        deadline = time.monotonic() + 600
        while not (new := set(alive()) - before):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield new.pop()


def alive() -> list[str]:
    """Ids of the cluster's nodes."""
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def drain(place: Place, node: str) -> None:
    """Give notice that a node will be lost, as a preStop hook does."""
    reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test")
    limit = ("--deadline-remaining-seconds", 120)
    command = ray_command("drain-node", "--address", place.address, "--node-id", node, *reason, *limit)
    subprocess.run(command, check=True, capture_output=True)
