"""Workspaces of the page: what a browser sends, and what is left of what could not be taken."""

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace

import fastapi
import httpx
import pytest

from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image
from nucleus.errors import RequestError, UsageError
from nucleus.page.page_images import ImageOptions
from nucleus.page.routes import page_router
from nucleus.page.sessions import PageLimits, Workspace, Workspaces
from nucleus.serve.problems import add_problems
from nucleus.storage.bucket import Bucket


def no_model() -> None:
    pytest.fail("nothing is segmented here")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, no_model, PageLimits(images=1))  # type: ignore[arg-type]


def test_nothing_stays_of_what_was_not_taken(workspace: Workspace) -> None:
    def take() -> None:
        with workspace.new_file("a.png") as (_, file):
            file.write_bytes(b"a part")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        take()
    assert list(workspace.folder.iterdir()) == []


@pytest.mark.parametrize(("name", "content"), [("a/B.MRXS", b"\xff\xd8"), ("a.tif", bytes(128) + b"DICM")])
def test_slides_of_several_files_are_refused(workspace: Workspace, name: str, content: bytes) -> None:
    """As by the API: beside one file that is sent, there are no others."""
    file = workspace.folder / "image"
    file.write_bytes(content)
    with pytest.raises(RequestError, match="several files"):
        workspace.add(name, workspace.folder, file)
    assert workspace.images == {}


def test_a_failure_leaves_what_was_found_before(workspace: Workspace) -> None:
    with workspace.new_file("a.png") as (folder, file):
        file.write_bytes(encode_png(generated_image(0, 16, 16)[0]))
        image = workspace.add("a.png", folder, file)
    image.ended("failed", "no image")
    assert (image.status, image.message) == ("failed", "no image")
    image.summary, image.options = {"nuclei": 3, "warning": None}, ImageOptions(diameter=20)
    image.ended("done", None)
    for diameter in (7, 8):  # the second before the first is done
        workspace.segment_again(image, ImageOptions(diameter=diameter))
    assert (image.status, image.document()["nuclei"], image.version) == ("waiting", None, 2)
    image.ended("failed", "too small")
    assert (image.status, image.message, image.version, image.options.diameter) == ("done", "too small", 0, 20)
    assert image.document()["nuclei"] == 3
    workspace.segment_again(image, ImageOptions())
    assert (image.message, image.version) == (None, 3)  # never that of another segmentation


def test_a_system_that_removes_old_temporary_files(tmp_path: Path) -> None:
    """As systemd does after ten days: who comes then begins anew, and who was there is told so."""
    workspaces = Workspaces(no_model, folder=tmp_path)  # type: ignore[arg-type]
    token, workspace = workspaces.create()
    assert workspaces.get(token) is workspace
    shutil.rmtree(workspace.folder.parent)
    assert workspaces.get(token) is None
    token, workspace = workspaces.create()
    assert workspaces.get(token) is workspace
    assert workspace.folder.is_dir()
    workspaces.close()
    assert list(tmp_path.iterdir()) == []


def test_names_of_layers(workspace: Workspace) -> None:
    with workspace.new_file("a.png") as (folder, file):
        file.write_bytes(encode_png(generated_image(0, 16, 16)[0]))
        image = workspace.add("a.png", folder, file)
    for name in ("found", "", "../0-found", "a" * 3000, "é"):
        with pytest.raises(UsageError, match="there are none"):
            image.layer(name)
    with pytest.raises(UsageError, match="at most 1 images"), workspace.new_file("b.png"):
        pass


@pytest.mark.parametrize("key", ["../a.png", "a/../../b.png", "a//b.png", "a\n.png"])
def test_keys_stay_below_the_prefix(bucket: Bucket, key: str) -> None:
    """Some clients and servers take steps upwards for another prefix."""
    app = fastapi.FastAPI()
    app.include_router(page_router(SimpleNamespace(model="nuclei@1", bucket=bucket)))  # type: ignore[arg-type]
    add_problems(app)

    async def ask() -> list[int]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1/page/api"
        ) as client:
            await client.post("/session")
            listed = await client.get("/bucket", params={"prefix": key})
            taken = await client.post("/bucket", json={"keys": [key]})
            return [listed.status_code, taken.status_code]

    assert asyncio.run(ask()) == [400, 400]
