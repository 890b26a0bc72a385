"""Fixtures of the page: a service in a process of its own, and images."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from nucleus.config.recipe import GateOptions
from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image
from nucleus.registry.aliases import pass_gate
from nucleus.registry.publish import publish
from nucleus.registry.versions import read_included
from nucleus.runs.plan import RunPlan, save_plan
from nucleus.storage.bucket import Bucket
from tests.small_model import origin

__all__ = ["RunningPage", "published_run", "running_page"]


@dataclass(frozen=True)
class RunningPage:
    """A service with the page.

    Attributes:
        address: Its address.
        process: Its process.
    """

    address: str
    process: "subprocess.Popen[str]"


@contextmanager
def running_page(*options: str, environment: Mapping[str, str] | None = None) -> Iterator[RunningPage]:
    """Run `nucleus serve` while the block runs. Its log is read to the end: a pipe that is full would stop it."""
    command = [sys.executable, "-m", "nucleus", "serve", *(() if "--port" in options else ("--port", "0")), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(environment or os.environ)) as process:
        assert process.stderr is not None
        reading = threading.Thread(target=process.stderr.read)
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                found = re.search(r"http://[\w.:]+", line)
                if found:
                    reading.start()
                    yield RunningPage(found[0], process)
                    break
            else:
                pytest.fail("".join(lines))
        finally:
            process.kill()
            if reading.is_alive():
                reading.join()


def published_run(bucket: Bucket, run: str, folder: Path, **instances: float) -> None:
    """Write what a run leaves that published the model that comes along, with other thresholds for labels."""
    included = read_included().folder
    folder.mkdir()
    for name in ("card.md", "metrics.json", "model.onnx", "model.weights.h5"):
        (folder / name).write_bytes((included / name).read_bytes())
    config = json.loads((included / "model.json").read_text())
    config["instances"] |= instances
    (folder / "model.json").write_text(json.dumps(config))
    settings = {"model": "cells", "optimizer": {"epochs": 80}}
    weights = {"source": "none", "sha256": None}
    plan = {"run": run, "bucket": str(bucket.uri), "recipe": settings, "dataset": "s3://b/datasets/d@0123456789ab"}
    more = {"weights_uri": None, "weights": weights, "wandb_mode": "disabled", "wandb_dir": "."}
    save_plan(bucket, RunPlan.model_validate(plan | more))
    pass_gate(bucket, publish(bucket, "cells", folder, origin(run)), GateOptions(), lambda _: None)


@pytest.fixture(scope="session")
def page_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with about twenty nuclei."""
    path = tmp_path_factory.mktemp("image") / "cells one.png"
    path.write_bytes(encode_png(generated_image(0, 192, 256)[0]))
    return path
