"""Progress in bytes of what goes to the bucket and comes from it, each byte counted once."""

import os
from pathlib import Path

import pytest

from nucleus.config.names import Reference
from nucleus.errors import ObjectExistsError
from nucleus.registry.publish import publish
from nucleus.registry.versions import pull
from nucleus.storage.bucket import Bucket
from tests.small_model import origin

SIZE = 5 << 20


class Told:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.told.append((done, total))

    def check(self, total: int, *, steps: int) -> None:
        """From nothing to all, never back, in at least so many steps."""
        assert {whole for _, whole in self.told} == {total}
        done = [part for part, _ in self.told]
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0, total)
        assert len(set(done)) > steps


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_a_file_up_and_down(bucket: Bucket, file: Path, tmp_path: Path) -> None:
    sent, come = Told(), Told()
    bucket.put("x", file, if_absent=True, advance=sent)
    sent.check(SIZE, steps=3)  # in the summing before it no byte is sent, so there is no way back
    bucket.download("x", tmp_path / "y", advance=come)
    come.check(SIZE, steps=3)
    assert (tmp_path / "y").read_bytes() == file.read_bytes()
    with pytest.raises(ObjectExistsError):
        bucket.put("x", file, if_absent=True, advance=sent)


def test_an_empty_file(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    told = Told()
    bucket.put("x", tmp_path / "x", advance=told)
    assert bucket.get("x") == b""
    assert told.told == [(0, 0)]


def test_a_version_up_and_down(bucket: Bucket, model_files: Path, tmp_path: Path) -> None:
    (model_files / "model.weights.h5").write_bytes(os.urandom(SIZE))
    total = sum(path.stat().st_size for path in model_files.iterdir())
    sent, come, again = Told(), Told(), Told()
    publish(bucket, "m", model_files, origin(), sent)
    sent.check(total, steps=5)
    pull(bucket, Reference("m"), tmp_path / "pulled", come)
    come.check(total, steps=5)
    pull(bucket, Reference("m"), tmp_path / "pulled", again)
    assert again.told == []  # it is there
