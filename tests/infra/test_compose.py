"""The compose files: the published schema, and that nothing runs as root, without limits or with a known password."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import boto3
import click
import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from nucleus.cli.main import cli
from nucleus.config.settings import read_recipe, recipe_path
from nucleus.storage.local_server import RunningStore

LOCAL = Path(__file__).parents[2] / "infra" / "local"
FILES = ("compose.yaml", "compose.rustfs.yaml")
ONE_SHOT = {"store-owner", "bucket", "train-cpu", "train-gpu", "nucleus"}
OURS = re.compile(r"nucleus:(train|train-gpu)")


def load(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((LOCAL / name).read_text()))


def merged() -> dict[str, Any]:
    """Both files, as Compose merges them where they meet: maps key by key, volumes by target, the rest replaced."""
    base, over = load(FILES[0]), load(FILES[1])
    for name, service in over["services"].items():
        target = base["services"][name]
        for key, value in service.items():
            if isinstance(value, dict) and key in target:
                target[key] = {**target[key], **value}
            else:
                target[key] = value
    base["volumes"] |= over["volumes"]
    return base


STACKS = {"minio": load(FILES[0]), "rustfs": merged()}
SERVICES = [(stack, name) for stack, content in STACKS.items() for name in content["services"]]


def service(stack: str, name: str) -> dict[str, Any]:
    return dict(STACKS[stack]["services"][name])


@pytest.mark.parametrize("name", FILES)
def test_published_schema(name: str) -> None:
    schema = json.loads(files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(load(name))
    wrong = load(name)
    wrong["services"]["store"]["helthcheck"] = {}
    assert not validator.is_valid(wrong)


@pytest.mark.parametrize(("stack", "name"), SERVICES)
def test_each_part_may_do_little(stack: str, name: str) -> None:
    part = service(stack, name)
    assert part["cap_drop"] == ["ALL"]
    assert part["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in part
    if name == "store-owner":  # hands the volume over, once, without a network
        assert (part["user"], part["cap_add"], part["network_mode"]) == ("0:0", ["CHOWN"], "none")
        return
    assert "cap_add" not in part
    user = part.get("user", "1000:1000" if OURS.fullmatch(part["image"]) else "")  # the Dockerfile's, else root
    assert int(user.partition(":")[0]) > 0


@pytest.mark.parametrize(("stack", "name"), SERVICES)
def test_each_part_restarts_and_tells_its_health(stack: str, name: str) -> None:
    part = service(stack, name)
    if name in ONE_SHOT:
        assert (part["restart"], part["healthcheck"]) == ("no", {"disable": True})
    else:
        assert part["restart"] == "unless-stopped"
        assert {"test", "interval", "timeout", "retries"} <= set(part["healthcheck"])
    for other, when in part.get("depends_on", {}).items():
        done = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
        assert when["condition"] == done, f"{name} waits for {other}"


@pytest.mark.parametrize(("stack", "name"), SERVICES)
def test_images_are_ours_or_by_digest(stack: str, name: str) -> None:
    part = service(stack, name)
    if match := OURS.fullmatch(part["image"]):
        assert part["build"]["args"] == {"EXTRA": match[1]}
        assert (LOCAL / part["build"]["context"] / "Dockerfile").is_file()
    else:
        assert re.search(r"(quay\.io|docker\.io)/[\w/]+:[\w.-]+@sha256:[0-9a-f]{64}", part["image"])


@pytest.mark.parametrize("stack", STACKS)
def test_only_this_machine_reaches_it(stack: str) -> None:
    published = [port for part in STACKS[stack]["services"].values() for port in part.get("ports", [])]
    assert published
    assert all(str(port).startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("name", FILES)
def test_no_password_by_default(name: str) -> None:
    text = (LOCAL / name).read_text()
    secrets = re.findall(r"(\w*(?:PASSWORD|SECRET_KEY|SECRET_ACCESS_KEY)): *(.*)", text)
    assert secrets
    for variable, value in secrets:
        assert value.startswith("${STORE_PASSWORD:?Write STORE_PASSWORD into infra/local/.env"), variable
    example = (LOCAL / "example.env").read_text()
    assert re.search(r"^STORE_PASSWORD=$", example, flags=re.MULTILINE)
    assert re.search(r"^RAY_AUTH_TOKEN=$", example, flags=re.MULTILINE)


def test_variables_are_those_of_the_example() -> None:
    used = {name for file in FILES for name in re.findall(r"(?<!\$)\$\{(\w+)", (LOCAL / file).read_text())}
    used |= {secret["environment"] for secret in load(FILES[0])["secrets"].values()}
    told = set(re.findall(r"^#? ?(\w+)=", (LOCAL / "example.env").read_text(), flags=re.MULTILINE))
    assert used == told


@pytest.mark.parametrize("name", ["ray-cpu", "ray-gpu", "train-cpu", "train-gpu"])
def test_ray_asks_for_the_token(name: str) -> None:
    part = service("minio", name)
    assert part["environment"]["RAY_AUTH_MODE"] == "token"
    assert part["environment"]["RAY_AUTH_TOKEN_PATH"] == f"/run/secrets/{part['secrets'][0]['source']}"
    # With uid or gid Docker looks for the user on this machine instead of in the image, and nothing starts.
    assert part["secrets"] == [{"source": "ray-token", "mode": "0444"}]
    assert not part.get("read_only")  # Compose writes such a secret into the container
    assert "RAY_AUTH_TOKEN" not in part["environment"]


@pytest.mark.parametrize("stack", STACKS)
def test_named_volumes_are_declared(stack: str) -> None:
    mounts = [mount for part in STACKS[stack]["services"].values() for mount in part.get("volumes", [])]
    named = {mount.partition(":")[0] for mount in mounts if isinstance(mount, str)}
    assert named <= set(STACKS[stack]["volumes"])
    assert not [name for name in named if name.startswith((".", "/"))]


@pytest.mark.parametrize("name", ["ray-cpu", "ray-gpu"])
def test_stopping_leaves_time_for_a_checkpoint(name: str) -> None:
    part = service("minio", name)
    drain = float(part["environment"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert 60 <= drain < float(part["stop_grace_period"].removesuffix("s"))
    from ray._private import ray_constants

    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")  # Ray's own variable, of this version


@pytest.mark.parametrize(("name", "token", "code"), [("ray-cpu", "", 64), ("ray-gpu", "a" * 40, 0)])
def test_head_command(name: str, token: str, code: int, tmp_path: Path) -> None:
    """The shell line as it stands, with a `ray` that prints its arguments."""
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\necho "$@"\n')
    ray.chmod(0o755)
    (tmp_path / "token").write_text(token)
    shell, option, line = service("minio", name)["command"]
    line = line.replace("$$", "$").replace("/run/secrets/ray-token", str(tmp_path / "token"))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_CPUS": "3"}
    done = subprocess.run([shell, option, line], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    if code:
        assert "RAY_AUTH_TOKEN" in done.stderr
        return
    from ray.scripts.scripts import start

    arguments = shlex.split(done.stdout)
    assert arguments[0] == "start"
    parsed = start.make_context("start", arguments[1:]).params
    assert (parsed["head"], parsed["block"], parsed["num_cpus"]) == (True, True, 3)
    assert parsed["dashboard_port"] == 8265  # what is published, and the default of `nucleus submit`


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_job_is_sent_from_inside(kind: str) -> None:
    part = service("minio", f"train-{kind}")
    assert part["network_mode"] == f"service:ray-{kind}"
    assert "--insecure" not in part["command"]
    assert part["profiles"] == service("minio", f"ray-{kind}")["profiles"] == [kind]
    name, submit, *arguments = part["command"]
    assert name == "nucleus"
    found = cli.get_command(click.Context(cli), submit)
    assert found is not None
    params = found.make_context(submit, arguments).params
    recipe = read_recipe(recipe_path(params["recipe"]), params["settings"])
    assert recipe.gpus_per_worker == (1 if kind == "gpu" else 0)
    assert recipe.workers.most == (1 if kind == "gpu" else 2)
    assert ("deploy" in service("minio", f"ray-{kind}")) == (kind == "gpu")


def test_bucket_is_made_once_and_again(store: RunningStore) -> None:
    """The very program of the service, against a real server, where the bucket is there and where not."""
    program = service("minio", "bucket")["command"]
    assert program[:2] == ["python", "-c"]
    for _ in range(2):
        environment = {
            **os.environ,
            "NUCLEUS_BUCKET": "s3://fresh-bucket/prefix",
            "AWS_ENDPOINT_URL_S3": store.endpoint,
        }
        done = subprocess.run([sys.executable, "-c", program[2]], env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
    names = [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]]
    assert "fresh-bucket" in names
    refused = subprocess.run(
        [sys.executable, "-c", program[2]], capture_output=True, check=False,
        env={**os.environ, "NUCLEUS_BUCKET": "s3://B", "AWS_ENDPOINT_URL_S3": store.endpoint},
    )  # fmt: skip
    assert refused.returncode != 0


def test_steps_in_the_comment_exist() -> None:
    comment = "\n".join(line for line in (LOCAL / FILES[0]).read_text().splitlines() if line.startswith("#"))
    steps = re.findall(r"dc run --rm ([\w-]+)(?: ([^#\n]*))?", comment)
    assert {name for name, _ in steps} <= set(STACKS["minio"]["services"])
    typed = [words.split() for name, words in steps if name == "nucleus"]
    assert len(typed) == 4
    for first, second, *rest in typed:
        words = [first] if first == "predict" else [first, second]
        assert CliRunner().invoke(cli, [*words, "--help"]).exit_code == 0
        assert all(word.startswith(("/data/", "/results/")) for word in rest if word.startswith("/"))


def test_images_are_read_only_and_results_are_not() -> None:
    binds = [volume for volume in service("minio", "nucleus")["volumes"] if isinstance(volume, dict)]
    assert [(bind["target"], bind.get("read_only", False)) for bind in binds] == [("/data", True), ("/results", False)]
    assert not any(bind["bind"]["create_host_path"] for bind in binds)  # they would be root's
