"""The service on Ray Serve: its answers are those of one process; a killed replica loses nothing that was answered."""

import http.client
import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from job.serving import ServingArguments, build, deployed
from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image
from nucleus.errors import JobError, UsageError
from nucleus.registry.aliases import move_alias
from nucleus.registry.publish import publish
from nucleus.registry.versions import read_included
from nucleus.serve.following import find_served
from nucleus.serve.service import ServeSettings, Token
from nucleus.storage.bucket import Bucket
from tests.ray_nodes import free_ports
from tests.small_model import origin

TOKEN = secrets.token_urlsafe()  # nothing else that Ray keeps holds it
SECONDS = 600
MODELS = "/v1/models"
SPACES = ("serve", None)


def ask(port: int, path: str, body: bytes | None = None) -> tuple[int, Any]:
    """Status and JSON of an answer; None for what is no JSON, as an error of Ray's own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("POST" if body else "GET", path, body, {"Authorization": f"Bearer {TOKEN}"})
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if answer.status == 200 else None
    except (ConnectionError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()


def replicas() -> list[int]:
    """Processes of the replicas."""
    from ray.util.state import list_actors

    alive = list_actors(filters=[("state", "=", "ALIVE")])
    return [actor.pid for actor in alive if "ServeReplica" in actor.class_name]


def stored_by_ray() -> bytes:
    """What Ray Serve keeps of its applications, and what Ray has logged."""
    from ray._private.worker import _global_node
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    kept = [
        _internal_kv_get(key, namespace=space) or b""
        for space in SPACES
        for key in _internal_kv_list(b"", namespace=space)
    ]
    logs = [path.read_bytes() for path in Path(_global_node.get_session_dir_path()).rglob("*") if path.is_file()]
    return b"".join([*kept, *logs])


def until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.2)


def damaged(files: Path) -> Path:
    """Files of a version whose sums are right, and whose network is none."""
    copied = files.with_name("damaged")
    shutil.copytree(files, copied)
    (copied / "model.onnx").write_bytes(b"no network")
    return copied


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("ray_cluster")
def test_a_service_on_ray(bucket: Bucket, tmp_path: Path) -> None:
    files = tmp_path / "files"
    shutil.copytree(read_included().folder, files, ignore=shutil.ignore_patterns("manifest.json"))
    for run, content in (("a", files), ("b", files), ("c", damaged(files))):
        publish(bucket, "cells", content, origin(run))
    move_alias(bucket, "cells", "production", 1)
    images = [encode_png(generated_image(seed, 96, 96)[0]) for seed in range(6)]
    model = find_served(None, "onnx").model
    expected = []
    for number, data in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(data)
        expected.append([row["area"] for row in model.segment(tmp_path / f"{number}.png").rows])
    (port,) = free_ports(1)
    settings = ServeSettings(port=port, token=Token.of(TOKEN), max_seconds=600.0)  # a replica starts again meanwhile

    def areas(number: int) -> tuple[int, list[int] | None, str | None]:
        status, found = ask(port, f"/v1/segment?name=n{number}.png", images[number % 6])
        assert found is None or {row["image"] for row in found["table"]} <= {f"n{number}.png"}
        return status, found and [row["area"] for row in found["table"]], found and found["model"]

    def answers(version: int, numbers: range) -> list[tuple[int, list[int], str]]:
        return [(200, expected[number % 6], f"cells@{version}") for number in numbers]

    def states() -> dict[str, str]:
        return {each["model"]: each["state"] for each in ask(port, MODELS)[1]["models"]}

    with deployed(f"{bucket.uri}/models/cells@production", settings, engine="onnx"), ThreadPoolExecutor(6) as pool:
        assert states() == {"cells@1": "serving"}
        assert list(pool.map(areas, range(12))) == answers(1, range(12))
        assert ask(port, "/")[0] == 404
        with pytest.raises(JobError, match="found nucleus"), deployed(None, settings):
            pass
        stored = stored_by_ray()
        assert settings.token is not None
        assert settings.token.sha256 in stored
        assert TOKEN.encode() not in stored
        running = [pool.submit(areas, number) for number in range(36)]
        running[6].result()
        (replica,) = replicas()
        os.kill(replica, signal.SIGKILL)
        assert [future.result() for future in running] == answers(1, range(36))
        move_alias(bucket, "cells", "production", 3)
        until(lambda: states() == {"cells@1": "serving", "cells@3": "failed"})
        assert areas(1) == answers(1, range(1, 2))[0]
        move_alias(bucket, "cells", "production", 2)
        seen = [areas(0)]
        while seen[-1][2] == "cells@1":
            seen.append(areas(0))
        assert seen == [*answers(1, range(1)) * (len(seen) - 1), *answers(2, range(1))]
        assert states() == {"cells@2": "serving"}
    assert ask(port, MODELS)[0] != 200


def test_a_configuration_needs_its_token(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="token"):
        build(ServingArguments(token_file=str(tmp_path / "none")))
