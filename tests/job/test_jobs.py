"""`nucleus submit --dry-run`, Ctrl-C and `nucleus jobs` as typed, on a cluster that asks for a token."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.storage.local_server import RunningStore
from nucleus.storage.uri import S3Uri
from tests.faults.proxy import Fault, proxied, seldom
from tests.job.conftest import BreakingLine

pytestmark = pytest.mark.filterwarnings("default")

COMMAND = [sys.executable, "-m", "nucleus"]


def nucleus(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own."""
    return subprocess.run(
        [*COMMAND, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_a_dry_run_says_what_would_be_and_starts_nothing(ray_cluster: str, dozen: Path, bucket_uri: S3Uri) -> None:
    dataset = import_dataset(dozen, bucket_uri / "datasets" / "d", SplitOptions()).dataset
    images = len(dataset.manifest.split_samples("train"))
    options = ("--set", "dataset=d", "--set", "input.batch_size=4", "--set", "optimizer.epochs=5", "--run", "imagined")
    command = ("submit", "demo", *options, "--address", ray_cluster, "--dry-run")
    bucket = {"NUCLEUS_BUCKET": str(bucket_uri), "AWS_SESSION_TOKEN": "marked-session"}
    done = nucleus(*command, "--json", **bucket)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["entrypoint"].startswith("python -m nucleus train recipe.toml --run imagined --set=dataset=d")
    assert (found["bucket"], found["dataset"]) == (str(bucket_uri), str(dataset))
    assert (found["images"], found["epochs"], found["steps"]) == (images, 5, images // 4 * 5)
    assert (found["needed"], found["total"]) == ({"CPU": 2, "GPU": 0}, {"CPU": 2, "GPU": 0})
    assert found["versions"].keys() == {"python", "nucleus", "onnxruntime", "ray", "tensorflow", "keras"}
    assert found["environment"]["NUCLEUS_BUCKET"] == str(bucket_uri)
    assert "marked" not in done.stdout
    done = nucleus(*command, "--set", "workers=4", **bucket)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split("\t") for line in done.stdout.splitlines())
    assert (lines["needed"], lines["total"]) == ("CPU 4, GPU 0", "CPU 2, GPU 0")
    assert lines["waits for"].startswith("4 CPUs (")
    assert "imagined" not in nucleus("jobs", "list", "--address", ray_cluster).stdout


def test_ctrl_c_asks_and_stops(
    ray_cluster: str, breaking_line: BreakingLine, store: RunningStore, bucket_uri: S3Uri
) -> None:
    """A job whose bucket does not answer, so that it runs for as long as the test wants; its log comes once."""
    with proxied(store.port, seldom(1.0, 0, (Fault.STALL,)), stall_seconds=120) as proxy:
        environment = {
            **os.environ,
            "NUCLEUS_BUCKET": str(bucket_uri),
            "AWS_ENDPOINT_URL_S3": proxy.endpoint,
        }
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*COMMAND, "submit", "demo", "--run", "stuck", "--address", breaking_line.address],
            env=environment, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        shown = wait_for(ours, "submitted stuck")
        assert "the job will check it" in shown  # whether the name is free: this machine gives up soon
        ours_met, deadline = proxy.met[Fault.STALL], time.monotonic() + 600
        while not (proxy.met[Fault.STALL] > ours_met and breaking_line.broken > 2):  # the job is at work
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        shown += wait_for(ours, "detach or stop")
        assert shown.count("Running entrypoint for job stuck") == 1
        os.write(ours, b"stop\n")
        out, _ = process.communicate(timeout=900)
        os.close(ours)
    assert out.decode() == "stuck STOPPED\n"
    assert process.returncode == 1

    status = nucleus("jobs", "status", "stuck", "--address", ray_cluster, "--json")
    found = json.loads(status.stdout)
    assert (found["job"], found["status"]) == ("stuck", "STOPPED")
    assert found["seconds"] > 0
    stopped = nucleus("jobs", "stop", "stuck", "--address", ray_cluster, "--json")
    assert json.loads(stopped.stdout) == found
    assert stopped.stderr == f"to continue: nucleus submit --resume stuck --address {ray_cluster}\n"
    rows = {job["job"]: job for job in json.loads(nucleus("jobs", "list", "--address", ray_cluster, "--json").stdout)}
    assert rows["stuck"] == found
    followed = nucleus("jobs", "logs", "stuck", "--follow", "--address", ray_cluster)
    assert followed.returncode == 1
    assert followed.stdout == nucleus("jobs", "logs", "stuck", "--address", ray_cluster).stdout
    for command in ("status", "logs", "stop"):
        done = nucleus("jobs", command, "nobody", "--address", ray_cluster)
        assert done.returncode == 1
        assert "'nobody'" in done.stderr
        assert f"nucleus jobs list --address {ray_cluster}" in done.stderr


def wait_for(terminal: int, text: str, seconds: float = 600) -> str:
    """Read what is written on a terminal until a text comes; give all of it."""
    os.set_blocking(terminal, False)
    seen, deadline = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < deadline, seen
        try:
            seen += os.read(terminal, 4096).decode()
        except BlockingIOError:
            pass
        except OSError:
            raise AssertionError(seen) from None
        time.sleep(0.05)
    return seen
