"""`nucleus submit` as typed: which clusters it refuses, and a job on one that asks for a token."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests
from click.testing import CliRunner

from job import cluster
from job.job_api import check_address, cluster_flags
from job.submit import prepare
from nucleus.cli.jobs import _check_name_is_free
from nucleus.cli.main import cli
from nucleus.errors import JobError, UsageError
from nucleus.storage.bucket import Bucket
from nucleus.storage.retries import storage_timeout
from nucleus.storage.uri import S3Uri
from tests.faults.proxy import Proxy
from tests.job.conftest import BreakingLine
from tests.ray_nodes import free_ports

pytestmark = pytest.mark.filterwarnings("default")


def submit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own."""
    command = [sys.executable, "-m", "nucleus", "submit", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("address", ["http://cluster.example:8265", "http://192.0.2.7", "http://0.0.0.0:8265"])
def test_plain_http_to_another_machine_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=rf"{re.escape(address)}.*https://.*--insecure"):
        check_address(address, insecure=False)
    check_address(address, insecure=True)
    run = CliRunner().invoke(cli, ["submit", "demo", "--address", address])
    assert run.exit_code == 2
    assert address in run.stderr


@pytest.mark.parametrize("address", ["ray://cluster:10001", "cluster:8265", "http://", "http://host:port", "auto", ""])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match=r"https://.*http://127\.0\.0\.1:8265"):
        check_address(address, insecure=True)


def test_encrypted_and_local_addresses_are_accepted() -> None:
    for address in ("https://cluster.example", "http://127.0.0.1:8265", "http://localhost:1", "http://[::1]:8265"):
        check_address(address, insecure=False)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = submit("demo", "--address", f"http://127.0.0.1:{port}")
    assert done.returncode == 1
    assert f"http://127.0.0.1:{port}" in done.stderr
    assert "ray start --head" in done.stderr


@pytest.fixture(scope="module")
def open_cluster() -> Iterator[str]:
    """The address of a Ray head that runs the code of anybody."""
    port, dashboard, agent = free_ports(3)
    folder = Path(tempfile.mkdtemp(prefix="open", dir="/tmp"))  # Ray's sockets take no long path
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "1"]
    command += ["--port", str(port), "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent)]
    command += ["--temp-dir", str(folder)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with (folder / "log").open("wb") as out:
        process = psutil.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    address, deadline = f"http://127.0.0.1:{dashboard}", time.monotonic() + 600
    while True:
        with suppress(requests.ConnectionError):
            requests.get(f"{address}/api/version", timeout=60)
            break
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.2)
    yield address
    for each in [*process.children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)  # what was killed may still be about to end


def test_a_cluster_that_asks_for_no_token_is_refused(open_cluster: str) -> None:
    done = submit("demo", "--address", open_cluster)
    assert done.returncode == 1
    assert open_cluster in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr
    assert requests.get(f"{open_cluster}/api/jobs/", timeout=60).json() == []


def test_a_cluster_whose_head_has_died_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray would wait for minutes"))
    with pytest.raises(JobError, match=str(port)):
        cluster._joined({})


def test_the_token_is_asked_for(ray_cluster: str, tmp_path: Path) -> None:
    done = submit("demo", "--address", ray_cluster, RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_TOKEN_PATH=str(tmp_path / "no"))
    assert done.returncode == 1
    assert ray_cluster in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr


def test_a_job_ends_as_its_run_does_and_is_sent_no_key(
    ray_cluster: str, breaking_line: BreakingLine, cluster_line: Proxy, bucket_uri: S3Uri
) -> None:
    """One that fails, for it is short: the dataset is not there. Its log comes, though no stream brings any of it."""
    breaking_line.pieces = 1
    secrets = {"AWS_SESSION_TOKEN": "marked-session", "WANDB_API_KEY": "marked-key"}
    address = breaking_line.address
    done = submit(
        "demo", "--set", "dataset=nothing", "--run", "sent", "--address", address, "--json",
        NUCLEUS_BUCKET=str(bucket_uri), AWS_ENDPOINT_URL_S3=cluster_line.endpoint, **secrets,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stdout, done.stderr
    assert json.loads(done.stdout) == {"job": "sent", "run": "sent", "address": address, "status": "FAILED"}
    assert "nucleus data import" in done.stderr
    assert breaking_line.broken

    from ray.job_submission import JobSubmissionClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        client = JobSubmissionClient(ray_cluster)
        kept, log = client.get_job_info("sent"), client.get_job_logs("sent")
    assert without_remark(done.stderr) == f"submitted sent to {address}\n{log}"
    assert kept.entrypoint == "python -m nucleus train recipe.toml --run sent --set=dataset=nothing"
    passed = {"NUCLEUS_BUCKET": str(bucket_uri), "AWS_ENDPOINT_URL_S3": cluster_line.endpoint}
    assert kept.runtime_env["env_vars"].items() >= passed.items()
    assert not any(text in str(kept) for text in (*secrets.values(), os.environ["AWS_SECRET_ACCESS_KEY"]))
    done = submit("demo", "--run", "sent", "--address", ray_cluster)
    assert done.returncode == 1
    assert "a job named sent (FAILED). Choose another name with --run. If" in done.stderr
    assert f"nucleus submit --resume sent --address {ray_cluster}" in done.stderr
    assert len(without_remark(done.stderr).splitlines()) == 1  # and not Ray's traceback


def without_remark(told: str) -> str:
    """What was said besides that the store was too slow for a look whether the name is free, on a busy machine."""
    lines = told.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("Whether there is a run sent already"))


CLIENT = SimpleNamespace(get_address=lambda: "http://127.0.0.1:8265")


def test_a_taken_name_is_refused_before_a_job_is_made(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))
    bucket.put("runs/taken/run.json", b"{}")
    again = "nucleus submit --resume taken --address http://127.0.0.1:8265"
    with pytest.raises(JobError, match=again):
        _check_name_is_free("taken", None, CLIENT)
    _check_name_is_free("free", None, CLIENT)
    with pytest.raises(JobError, match=again):
        _check_name_is_free("taken", str(bucket.uri), CLIENT)
    monkeypatch.delenv("NUCLEUS_BUCKET")
    _check_name_is_free("taken", None, CLIENT)  # only the cluster knows its bucket
    assert capsys.readouterr().err == ""


def test_a_bucket_that_this_machine_cannot_reach_does_not_keep_a_job_from_starting(
    bucket_uri: S3Uri, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("nucleus.cli.jobs._CHECK_SECONDS", 0.1)
    patience = storage_timeout()
    _check_name_is_free("new", str(bucket_uri), CLIENT)
    assert "the job will check it" in capsys.readouterr().err
    assert storage_timeout() == patience


def test_hints_name_the_cluster_that_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster_flags(CLIENT) == "--address http://127.0.0.1:8265"
    monkeypatch.setattr("job.job_api._accepted", {"http://127.0.0.1:8265"})
    assert cluster_flags(CLIENT) == "--address http://127.0.0.1:8265 --insecure"


def test_a_resumed_run_needs_no_recipe(tmp_path: Path) -> None:
    found = prepare(None, "again", ["--resume", "first"], tmp_path, verbose=False)
    assert found.entrypoint == "python -m nucleus train --resume first"
    assert not (tmp_path / "recipe.toml").exists()
