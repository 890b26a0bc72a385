"""The alias of a service: a newer version answers once it is ready; one that does not load leaves the old one."""

import logging
import shutil
from pathlib import Path

import pytest

from nucleus.errors import ModelError, UnreachableError
from nucleus.registry.aliases import move_alias
from nucleus.registry.publish import publish
from nucleus.registry.versions import read_included
from nucleus.serve import following
from nucleus.serve.following import FollowedAlias, ServedModel, find_served, followed_alias
from nucleus.storage.bucket import Bucket
from tests.serve.conftest import Connect
from tests.small_model import origin


@pytest.fixture
def registry(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket with two versions of a model, of which the first is in production."""
    files = tmp_path / "files"
    shutil.copytree(read_included().folder, files, ignore=shutil.ignore_patterns("manifest.json"))
    for run in ("a", "b"):
        publish(bucket, "cells", files, origin(run))
    move_alias(bucket, "cells", "production", 1)
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return bucket


def states(served: ServedModel) -> dict[str, str]:
    return {each["model"]: each["state"] for each in served.description()}


def test_the_alias_is_followed(registry: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    served = find_served("cells@production", "onnx")
    first = served.model
    served.look()
    assert served.model is first
    move_alias(registry, "cells", "production", 2)
    asked = []
    segment = following.Model.segment

    def seen(model: following.Model, image: object) -> object:
        asked.append((str(model), str(served.model)))
        return segment(model, image)  # type: ignore[arg-type]

    monkeypatch.setattr(following.Model, "segment", seen)
    served.look()
    assert asked == [("cells@2", "cells@1")], "it is warmed up while the old one answers"
    assert states(served) == {"cells@2": "serving"}
    assert served.description()[0]["follows"] == "cells@production"
    move_alias(registry, "cells", "production", 1)
    served.look()
    assert states(served) == {"cells@1": "serving"}


def test_a_version_that_does_not_load(
    registry: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, connect: Connect
) -> None:
    """It is told in the log and by the API, without a path, and not tried again; the next move of the alias is."""
    served = find_served("cells@production", "onnx")
    move_alias(registry, "cells", "production", 2)
    loaded = following.load_pulled
    tried = []

    def fails(*_: object) -> None:
        tried.append(1)
        raise ModelError("Expected a network in /home/someone/.cache/model.onnx; it cannot be used.")

    monkeypatch.setattr(following, "load_pulled", fails)
    with caplog.at_level(logging.INFO):
        served.look()
        served.look()
    assert (len(tried), caplog.text.count("cannot be loaded")) == (1, 1)
    assert states(served) == {"cells@1": "serving", "cells@2": "failed"}
    client = connect()
    client.service.served = served
    told = client.get("/v1/models").json()["models"][1]
    assert (told["model"], "model.onnx" in told["error"], "/home" in told["error"]) == ("cells@2", True, False)
    monkeypatch.setattr(following, "load_pulled", loaded)
    move_alias(registry, "cells", "production", 1)
    served.look()
    assert states(served) == {"cells@1": "serving"}
    move_alias(registry, "cells", "production", 2)
    served.look()
    assert states(served) == {"cells@2": "serving"}


def test_a_bucket_that_does_not_answer(registry: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model stays, and the version is tried again."""
    served = find_served("cells@production", "onnx")
    move_alias(registry, "cells", "production", 2)
    pull = FollowedAlias.pull
    monkeypatch.setattr(FollowedAlias, "pull", lambda *_: (_ for _ in ()).throw(UnreachableError("No answer.")))
    served.look()
    assert states(served) == {"cells@1": "serving", "cells@production": "failed"}
    monkeypatch.setattr(FollowedAlias, "pull", pull)
    served.look()
    assert states(served) == {"cells@2": "serving"}


def test_what_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUCLEUS_BUCKET", "s3://b")
    for text in (None, "nuclei", "cells@3"):
        assert followed_alias(text) is None
    for text, ref in (("cells", "latest"), ("cells@production", "production"), ("s3://c/models/x@best", "best")):
        found = followed_alias(text)
        assert found is not None
        assert found.reference.ref == ref
