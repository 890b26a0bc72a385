"""Fixtures: the model that comes along, loaded once, and clients of services with it, in this process."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tifffile

from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image
from nucleus.serve.app import create_app
from nucleus.serve.following import ServedModel, find_served
from nucleus.serve.lanes import Lanes, Segmenter
from nucleus.serve.service import ServeSettings, Service

__all__ = ["Client", "Connect"]


class Client:
    """A client of an application in this process: an event loop of its own, and httpx over ASGI."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.app = create_app(service)
        self.runner = asyncio.Runner()

    async def ask(self, method: str, path: str, **how: Any) -> httpx.Response:
        """Send a request."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, **how)

    def post(self, content: Any, query: str = "", accept: str = "application/json", **headers: str) -> httpx.Response:
        """Ask for a segmentation."""
        more = {"accept": accept, **headers}
        return self.runner.run(self.ask("POST", f"/v1/segment{query}", content=content, headers=more))

    def get(self, path: str, **headers: str) -> httpx.Response:
        """Get an address."""
        return self.runner.run(self.ask("GET", path, headers=headers))


Connect = Callable[..., Client]


@pytest.fixture(scope="session")
def served() -> ServedModel:
    """The model that comes along."""
    return find_served(None, "onnx")


@pytest.fixture
def connect(served: ServedModel) -> Iterator[Connect]:
    """Makes clients of services with some settings."""
    made: list[Client] = []

    def connected(segmenter: Segmenter | None = None, **settings: Any) -> Client:
        lanes = segmenter or Lanes(lambda: served.model)
        made.append(Client(Service(ServeSettings(**settings), served, lanes)))
        return made[-1]

    yield connected
    for client in made:
        client.service.segmenter.close()
        client.runner.close()


@pytest.fixture(scope="session")
def small_png() -> bytes:
    """An image of 96 px with nuclei."""
    return encode_png(generated_image(3, 96, 96)[0])


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of several kinds: RGB and RGBA as PNG, 16 bits with a pixel size and a stack as TIFF."""
    folder = tmp_path_factory.mktemp("pictures")
    rgb = generated_image(3, 160, 192)[0]
    grey = rgb[..., 1].astype(np.uint16) * 201
    (folder / "plain.png").write_bytes(encode_png(rgb))
    alpha = np.full((160, 192, 1), 255, np.uint8)
    tifffile.imwrite(folder / "alpha.tif", np.dstack([rgb, alpha]), photometric="rgb", extrasamples=["unassalpha"])
    tifffile.imwrite(folder / "deep.tif", grey, resolution=(20000, 20000), resolutionunit="CENTIMETER")
    stack = np.stack([grey // 2, grey, generated_image(4, 160, 192)[0][..., 1].astype(np.uint16) * 201])
    tifffile.imwrite(folder / "stack.tif", stack, imagej=True, metadata={"axes": "ZYX"})
    return folder
