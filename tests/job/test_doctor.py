"""`nucleus doctor` as typed: it finds each broken set-up, says what puts it right, and lets the rest be."""

import errno
import fcntl
import json
import os
import platform
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import job.cluster_check
import nucleus.doctor
from job.cluster_check import Gpus, check_gpus, query_head
from nucleus.cli.main import cli
from nucleus.doctor import call_in_subprocess
from nucleus.errors import ClusterError, NucleusError
from nucleus.storage.bucket import Bucket
from nucleus.storage.local_server import RunningStore
from nucleus.storage.uri import S3Uri
from tests.faults.proxy import Answer, Fault, Proxy, Request, proxied, refusal

pytestmark = pytest.mark.filterwarnings("default")

HEALTHY = {
    "packages": "ok",
    "model": "ok",
    "service": "ok",
    "cache": "ok",
    "file locks": "ok",
    "temporary folder": "ok",
    "store room": "ok",
    "bucket": "ok",
    "endpoint": "ok",
    "credentials": "ok",
    "clock": "ok",
    "checksums": "ok",
    "conditional writes": "ok",
    "weights": "ok",
    "Ray": "warning",  # training starts a cluster
    "GPU": "warning",  # training runs on CPUs
    "engine": "ok",
    "W&B": "ok",
}
"""The checks in their order, and what they find where nothing is missing but a cluster and a GPU."""
SLOW = [
    (nucleus.doctor, "_ENGINE_SECONDS"),
    (nucleus.doctor, "_WANDB_SECONDS"),
    (job.cluster_check, "_NVIDIA_SECONDS"),
    (job.cluster_check, "_TENSORFLOW_SECONDS"),
    (job.cluster_check, "_SECONDS"),
]
"""How long programs are waited for, which a machine that does much else at the same time would exceed."""
WEIGHTS = "weights/mobilenet_v2/0123456789ab.weights.h5"
ALL_OF_THE_BUCKET = {"endpoint", "credentials", "clock", "checksums", "conditional writes", "weights"}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["doctor", *arguments])


def doctor(*arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Its exit status, and what it found by check."""
    run = invoke(*arguments, "--json")
    found = json.loads(run.stdout)
    assert [finding["check"] for finding in found] == list(HEALTHY)
    assert all(finding.keys() == {"check", "state", "found", "fix"} for finding in found)
    return run.exit_code, {finding["check"]: finding for finding in found}


def states(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {check: finding["state"] for check, finding in found.items()}


@dataclass(frozen=True)
class Here:
    """A set-up where all is well, for a test to break."""

    bucket: Bucket
    patch: pytest.MonkeyPatch
    folder: Path
    line: Proxy
    store: RunningStore


@pytest.fixture(scope="module")
def root(store: RunningStore) -> Bucket:  # noqa: ARG001
    """The whole bucket: one client for the weights of all tests."""
    return Bucket(S3Uri("nucleus"))


@pytest.fixture
def here(
    bucket: Bucket, root: Bucket, store: RunningStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Here]:
    root.put(bucket.key(WEIGHTS), b"weights")
    for name, value in {"NUCLEUS_BUCKET": str(bucket.uri), "WANDB_MODE": "disabled", "PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("RAY_ADDRESS", "FORCE_COLOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "token"))  # as it may be set
    monkeypatch.setattr(job, "local_addresses", list)  # others run clusters on this machine
    for module, name in SLOW:
        monkeypatch.setattr(module, name, 600.0)
    with proxied(store.port) as line:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", line.endpoint)
        yield Here(bucket, monkeypatch, tmp_path, line, store)


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


def refusing(fault: Fault) -> Callable[[Here], None]:
    return lambda here: setattr(here.line, "decide", lambda _: fault)


def clock(ahead: float) -> Callable[[Here], None]:
    return lambda here: setattr(here.line, "ahead", ahead)


def environment(name: str, value: str) -> Callable[[Here], None]:
    return lambda here: here.patch.setenv(name, value)


def ignoring(header: str) -> Callable[[Here], None]:
    return lambda here: setattr(here.line, "dropped", here.line.dropped | {header})


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def little_room(here: Here, folder: Path) -> None:
    """Leave 7 MiB on the disk of a folder, and none but that."""
    free = nucleus.doctor.free_bytes
    here.patch.setattr(nucleus.doctor, "free_bytes", lambda place: 7 << 20 if place == folder else free(place))


def damaged_package(here: Here) -> None:
    (here.folder / "fastapi.py").write_text("raise OSError('cut off')")
    here.patch.delitem(sys.modules, "fastapi", raising=False)
    here.patch.syspath_prepend(here.folder)


def nvidia_smi(text: str) -> Callable[[Here], None]:
    """A driver that lists GPUs, or fails to."""

    def write(here: Here) -> None:
        program = here.folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)

    return write


def no_key(mode: str | None) -> Callable[[Here], None]:
    def forget(here: Here) -> None:
        here.patch.delenv("WANDB_API_KEY")
        for name in ("NETRC", "WANDB_CONFIG_DIR"):
            here.patch.setenv(name, str(here.folder / "none"))
        here.patch.setenv("WANDB_MODE", mode) if mode else here.patch.delenv("WANDB_MODE")

    return forget


def without_checksums(here: Here) -> None:
    def old(request: Request) -> Answer | None:
        new = request.method == "PUT" and "x-amz-sdk-checksum-algorithm" in request.headers
        return refusal(400, "XAmzContentSHA256Mismatch") if new else None

    here.line.scripted = old


BROKEN: dict[str, tuple[Callable[[Here], object], str, str, str, str, set[str]]] = {
    # what: (how, check, its state, said of it, in its fix, checks that then are skipped)
    "wrong endpoint": (
        lambda here: here.patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{closed_port()}"),
        "bucket", "failed", "got no answer", "Check AWS_ENDPOINT_URL_S3", ALL_OF_THE_BUCKET,
    ),
    "unknown key": (
        refusing(Fault.UNKNOWN_KEY),
        "bucket", "failed", "InvalidAccessKeyId", "Check AWS_ACCESS_KEY_ID", ALL_OF_THE_BUCKET,
    ),
    "wrong secret": (
        refusing(Fault.WRONG_KEY),
        "bucket", "failed", "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY", ALL_OF_THE_BUCKET,
    ),
    "no bucket": (
        environment("NUCLEUS_BUCKET", "s3://never-made"),
        "bucket", "failed", "does not exist", "aws s3 mb s3://never-made", ALL_OF_THE_BUCKET,
    ),
    "bucket not named": (
        environment("NUCLEUS_BUCKET", ""),
        "bucket", "failed", "it is not set", "export NUCLEUS_BUCKET=s3://BUCKET", ALL_OF_THE_BUCKET,
    ),
    "no create-only writes": (
        ignoring("if-none-match"),
        "conditional writes", "failed", "ignores If-None-Match", "--single-writer", set(),
    ),
    "no compare-and-swap": (
        ignoring("if-match"),
        "conditional writes", "failed", "ignores If-Match", "--single-writer", set(),
    ),
    "no newer checksums": (
        without_checksums,
        "checksums", "failed", "does not take", "AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
        {"conditional writes"},
    ),
    "another region": (
        environment("AWS_REGION", "eu-west-3"),
        "endpoint", "warning", "region eu-west-3", "export AWS_REGION=us-east-1", set(),
    ),
    "temporary keys in the environment": (
        environment("AWS_SESSION_TOKEN", "t"),
        "credentials", "warning", "environment variables, temporary", "credentials file", set(),
    ),
    "server's clock hours ahead": (
        clock(3 * 3600), "clock", "failed", "behind the server's", "timedatectl set-ntp true", set(),
    ),
    "server's clock minutes behind": (
        clock(-120), "clock", "warning", "ahead of the server's", "timedatectl set-ntp true", set(),
    ),
    "refused for the clock": (
        refusing(Fault.WRONG_CLOCK),
        "clock", "failed", "RequestTimeTooSkewed", "timedatectl set-ntp true",
        {"bucket", *ALL_OF_THE_BUCKET} - {"clock"},
    ),
    "no Ray": (
        lambda here: here.patch.setenv("RAY_ADDRESS", closed_port()),
        "Ray", "failed", "none answers", "Start it, or unset RAY_ADDRESS", set(),
    ),
    "no Ray client server": (
        lambda here: here.patch.setenv("RAY_ADDRESS", f"ray://{closed_port()}"),
        "Ray", "failed", "none answers", "Start it, or unset RAY_ADDRESS", set(),
    ),
    "no dashboard": (
        lambda here: here.patch.setenv("RAY_ADDRESS", f"http://{closed_port()}"),
        "Ray", "failed", "it does not answer", "ray start --head", set(),
    ),
    "dashboard by plain HTTP": (
        environment("RAY_ADDRESS", "http://192.0.2.7:8265"),
        "Ray", "failed", "sends code and token in plain text", "ssh -L 8265:localhost:8265", set(),
    ),
    "GPU not seen by TensorFlow": (
        nvidia_smi('[ "$1" = --query-gpu=name ] && echo NVIDIA H100'),
        "GPU", "failed", "(NVIDIA H100), of which TensorFlow sees 0", "make install EXTRA=train-gpu", set(),
    ),
    "GPU without its driver": (
        nvidia_smi("echo NVIDIA-SMI has failed; exit 9"),
        "GPU", "failed", "NVIDIA-SMI has failed", "Reinstall the GPU's driver", set(),
    ),
    "a part of what the service needs": (
        lambda here: here.patch.setitem(sys.modules, "uvicorn", None),
        "service", "failed", "uvicorn not installed", "pip install 'nucleus[serve]'", set(),
    ),
    "a service that cannot be imported": (
        damaged_package,
        "service", "failed", "fastapi cannot be imported: OSError: cut off", "install --force-reinstall fastapi", set(),
    ),
    "no cache": (
        environment("XDG_CACHE_HOME", __file__),
        "cache", "failed", "cannot be written", "export XDG_CACHE_HOME=DIR", {"file locks"},
    ),
    "no locks": (
        lambda here: here.patch.setattr(fcntl, "flock", without_locks),
        "file locks", "failed", "has none (No locks available)", "export XDG_CACHE_HOME=DIR", set(),
    ),
    "little room in the cache": (
        lambda here: little_room(here, here.folder / "cache" / "nucleus"),
        "cache", "warning", "7 MiB are free", "export XDG_CACHE_HOME=DIR", set(),
    ),
    "little room for temporary files": (
        lambda here: little_room(here, Path(tempfile.gettempdir())),
        "temporary folder", "warning", "7 MiB are free", "export TMPDIR=DIR", set(),
    ),
    "a folder for temporary files that cannot be used": (
        environment("TMPDIR", "/nowhere"),
        "temporary folder", "warning", "TMPDIR=/nowhere cannot be written", "export TMPDIR=DIR", set(),
    ),
    "little room in the store": (
        lambda here: little_room(here, Path(here.store.folder)),
        "store room", "warning", "7 MiB are free", "nucleus store start --dir DIR", set(),
    ),
    "no W&B key": (
        no_key("online"),
        "W&B", "failed", "Expected a W&B key", "Run: wandb login", set(),
    ),
    "no W&B key, and none asked for": (
        no_key(None),
        "W&B", "warning", "there is no API key", "wandb login", set(),
    ),
    "no W&B mode of that name": (
        environment("WANDB_MODE", "on"),
        "W&B", "failed", "found 'on'", "Run: export WANDB_MODE=offline", set(),
    ),
    "no weights": (
        lambda here: here.bucket.delete(WEIGHTS),
        "weights", "warning", "the first run takes them from Keras's cache or downloads", "nucleus weights add FILE",
        set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_found_and_nothing_else(case: str, here: Here) -> None:
    break_it, check, state, said, fix, skipped = BROKEN[case]
    break_it(here)
    code, found = doctor()
    assert states(found) == {**HEALTHY, **dict.fromkeys(skipped, "skipped"), check: state}
    assert said in found[check]["found"]
    assert fix in found[check]["fix"]
    assert all(finding["fix"] is None for finding in found.values() if finding["state"] in {"ok", "skipped"})
    assert code == (state == "failed")


def test_all_is_well(here: Here) -> None:
    code, found = doctor()
    assert states(found) == HEALTHY
    assert code == 0
    assert found["bucket"]["found"] == f"{here.bucket.uri} at {here.line.endpoint}"
    assert "region us-east-1, buckets in the path" in found["endpoint"]["found"]
    assert found["credentials"]["found"] == "environment variables, without known end"
    assert found["weights"]["found"].startswith(f"{here.bucket.uri}/{WEIGHTS}")
    assert {item.key for item in here.bucket.objects("")} == {WEIGHTS, "models/.conditional-writes"}


def test_a_line_for_each_check_with_its_fix(here: Here) -> None:
    here.patch.setenv("NUCLEUS_BUCKET", "s3://never-made")
    run = invoke()
    assert run.exit_code == 1
    lines = run.stdout.splitlines()
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in lines] == list(HEALTHY)
    place = list(HEALTHY).index("bucket")
    assert lines[place].startswith("failed   bucket: Expected ")
    assert "Run: aws s3 mb s3://never-made" in lines[place]
    here.patch.setenv("FORCE_COLOR", "1")  # as on a terminal
    here.patch.setenv("COLUMNS", "200")
    shown = invoke().stdout.splitlines()
    assert "\x1b[31mfailed" in shown[place]
    assert shown[place + 1].split("\x1b")[1].startswith("[1mRun: aws s3 mb s3://never-made")


def test_a_driver_without_a_gpu(here: Here) -> None:
    nvidia_smi("echo No devices were found; exit 6")(here)
    assert states(doctor()[1]) == HEALTHY


def test_the_cluster_at_an_address(ray_cluster: str, here: Here) -> None:  # noqa: ARG001
    code, found = doctor("--address", ray_cluster)
    assert (code, states(found)) == (0, {**HEALTHY, "Ray": "ok"})
    assert found["Ray"]["found"].startswith(f"{ray_cluster}: 2 CPUs (")


def test_a_cluster_of_another_version(ray_cluster: str, here: Here) -> None:
    """Its dashboard says so; by its head it is found out too."""
    import ray

    with proxied(int(ray_cluster.rpartition(":")[2])) as dashboard:
        dashboard.changed = lambda body: body.replace(ray.__version__.encode(), b"2.9.0")
        code, found = doctor("--address", dashboard.endpoint)
    assert (code, states(found)) == (1, {**HEALTHY, "Ray": "failed"})
    assert f"Expected Ray {ray.__version__}" in found["Ray"]["found"]
    assert "found 2.9.0" in found["Ray"]["found"]
    assert f"ray==2.9.0 here, or ray=={ray.__version__} there" in found["Ray"]["fix"]
    head = ray.get_runtime_context().gcs_address
    there = ray.__version__
    here.patch.setattr(ray, "__version__", "2.9.0")
    with pytest.raises(ClusterError, match=f"Expected Ray 2.9.0 .*; found Ray {there} .*ray=={there} here"):
        query_head(head)


def test_the_cluster_of_a_head(ray_cluster: str, here: Here) -> None:  # noqa: ARG001
    import ray

    head = ray.get_runtime_context().gcs_address
    here.patch.setenv("RAY_ADDRESS", head)
    code, found = doctor()
    assert (code, states(found)) == (0, {**HEALTHY, "Ray": "ok"})
    assert found["Ray"]["found"].startswith(f"{head}: 2 CPUs (")
    here.patch.delenv("RAY_ADDRESS")
    here.patch.setattr(job, "local_addresses", lambda: [head])  # the one that runs on this machine
    assert doctor()[1]["Ray"]["found"].startswith(f"{head}: 2 CPUs (")
    here.patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    code, found = doctor()
    assert (code, states(found)) == (1, {**HEALTHY, "Ray": "failed"})
    assert head in found["Ray"]["found"]
    assert "RAY_AUTH_MODE=token" in found["Ray"]["fix"]


def test_a_client_server_is_not_asked_what_it_has(here: Here) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here.patch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{server.getsockname()[1]}")
        assert states(doctor()[1]) == {**HEALTHY, "Ray": "ok"}


def test_a_head_that_says_nothing_is_not_waited_for(here: Here) -> None:
    here.patch.setattr(job.cluster_check, "_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        here.patch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        code, found = doctor()
    assert (code, states(found)) == (1, {**HEALTHY, "Ray": "failed"})
    assert "2 s" in found["Ray"]["found"]


def test_gpus_of_the_cluster_count() -> None:
    finding = check_gpus(Gpus(()), 4.0)
    assert (finding.state, "4" in finding.found) == ("ok", True)
    assert check_gpus(Gpus(("H100", "H100"), seen=2), 0.0).state == "ok"


def test_a_function_that_ends_in_another_way() -> None:
    with pytest.raises(NucleusError, match=r"Python; found TypeError: .*0 positional arguments"):
        call_in_subprocess(platform.python_version, "two", who="Python", seconds=600.0)
