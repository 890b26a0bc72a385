"""The service on Ray Serve: its answers are those of one process; a killed replica loses nothing that was answered."""

import http.client
import json
import os
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from job.serving import ServingArguments, build, deployed
from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image
from nucleus.errors import UsageError
from nucleus.registry.aliases import move_alias
from nucleus.registry.publish import publish
from nucleus.registry.versions import read_included
from nucleus.serve.following import find_served
from nucleus.serve.service import ServeSettings
from nucleus.storage.bucket import Bucket
from tests.small_model import origin

TOKEN = "0123456789abcdef"
SECONDS = 300
MODELS = "/v1/models"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


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


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("ray_cluster")
def test_a_service_on_ray(bucket: Bucket, tmp_path: Path) -> None:
    files = tmp_path / "files"
    shutil.copytree(read_included().folder, files, ignore=shutil.ignore_patterns("manifest.json"))
    for run in ("a", "b"):
        publish(bucket, "cells", files, origin(run))
    move_alias(bucket, "cells", "production", 1)
    images = [encode_png(generated_image(seed, 96, 96)[0]) for seed in range(6)]
    model = find_served(None, "onnx").model
    expected = []
    for number, data in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(data)
        expected.append([row["area"] for row in model.segment(tmp_path / f"{number}.png").rows])
    port = free_port()
    settings = ServeSettings(port=port, token=TOKEN)

    def areas(number: int) -> tuple[int, list[int] | None]:
        status, found = ask(port, f"/v1/segment?name=n{number}.png", images[number % 6])
        assert found is None or {row["image"] for row in found["table"]} <= {f"n{number}.png"}
        return status, found and [row["area"] for row in found["table"]]

    with deployed(f"{bucket.uri}/models/cells@production", settings, engine="onnx"), ThreadPoolExecutor(6) as pool:
        assert ask(port, MODELS)[1]["models"][0]["model"] == "cells@1"
        assert list(pool.map(areas, range(12))) == [(200, expected[number % 6]) for number in range(12)]
        running = [pool.submit(areas, number) for number in range(36)]
        running[6].result()
        (replica,) = replicas()
        os.kill(replica, signal.SIGKILL)
        for number, future in enumerate(running):
            status, found = future.result()
            assert found == expected[number % 6] if status == 200 else found is None
        while ask(port, MODELS)[0] != 200:
            time.sleep(0.2)
        assert areas(1) == (200, expected[1])
        move_alias(bucket, "cells", "production", 2)
        while (found := ask(port, MODELS)[1]["models"])[0]["model"] != "cells@2":
            assert [each["state"] for each in found] == ["serving"]
            time.sleep(0.2)
        assert areas(2) == (200, expected[2])
    assert ask(port, MODELS)[0] != 200


def test_a_configuration_needs_its_token(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="token"):
        build(ServingArguments(token_file=str(tmp_path / "none")))
