"""Every block of code in the documents is run, in the order in which a reader meets it, or says why not."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image
from nucleus.storage.uri import S3Uri
from tests.docs.blocks import DOCUMENTS, ROOT, Block, Reader, blocks_of

ON_A_CLUSTER = ["docs/tutorial.md"]
WITH_A_SERVICE = ["docs/service.md"]
WITH_THE_PAGE = ["docs/teach.md"]
"""Followed by `tests/page/test_whole_loop.py`, after a browser has done its part."""
IN_A_COPY_OF_THE_TREE = ["docs/distributed.md", "docs/extending.md"]

RUNNABLE = {"sh", "python", "diff"}
PROGRAMS = ("nucleus", "make", "python", "pip", "docker", "kubectl", "aws", "ray", "git", "export", "cd")

BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def test_no_document_is_overlooked() -> None:
    assert {"README.md", "docs/segmentation.md", *ON_A_CLUSTER, *IN_A_COPY_OF_THE_TREE} <= set(DOCUMENTS)
    assert len(BLOCKS) > 20


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_run_or_says_why_not(block: Block) -> None:
    if block.kind is None:
        assert block.language in {"", "text"}, f"{block} has no marker: see tests/docs/blocks.py"
        commands = [line for line in block.text.splitlines() if line.removeprefix("$ ").split(" ")[0] in PROGRAMS]
        is_usage = block.document == "docs/reference/commands.md"
        assert is_usage or not commands, f"{block} holds commands: name its language, and mark it"
    if block.kind == "run":
        assert block.language in RUNNABLE
        followed = {*ON_A_CLUSTER, *WITH_A_SERVICE, *WITH_THE_PAGE, *IN_A_COPY_OF_THE_TREE}
        assert block.document in followed, f"no test follows {block.document}"
    if block.kind == "not run":
        assert len((block.value or "").split()) >= 3, f"{block} gives no reason"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_no_marker_is_misspelt(block: Block) -> None:
    """A comment above a block that is not a marker would silently exclude the block."""
    above = (ROOT / block.document).read_text().splitlines()[block.line - 2]
    assert block.kind is not None or "<!--" not in above, f"{block}: {above}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if "run by " in (block.value or "")], ids=str)
def test_what_runs_it_instead_is_named(block: Block) -> None:
    """`test_links.py` checks that the named test exists."""
    assert re.search(r"run by (tests/[\w/]+\.py(::test_\w+)?|\.ci/run)", block.value or ""), f"{block} names no test"


@pytest.mark.timeout(3000)  # two runs and a dozen commands: two minutes on a machine that does nothing else
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("document", ON_A_CLUSTER)
def test_blocks_on_a_cluster(document: str, ray_cluster: str, bucket_uri: S3Uri, tmp_path: Path) -> None:
    """With the session's S3 server and Ray cluster, in an empty folder."""
    import ray

    changes = {
        "NUCLEUS_BUCKET": str(bucket_uri),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "CLUSTER": ray_cluster,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    follow(document, tmp_path / "here", ROOT, changes, tmp_path)


@pytest.mark.server
@pytest.mark.parametrize("document", IN_A_COPY_OF_THE_TREE)
def test_blocks_in_a_copy_of_the_tree(document: str, tmp_path: Path) -> None:
    """As a developer would, in a copy of the tree."""
    listed = subprocess.run(
        ["git", "ls-files", "--", "nucleus", "job", "tests", "docs", "pyproject.toml"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    copy = tmp_path / "here"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    follow(document, copy, copy, {}, tmp_path)


@pytest.mark.server
@pytest.mark.parametrize("document", WITH_A_SERVICE)
def test_blocks_with_a_service(document: str, tmp_path: Path) -> None:
    """In a folder with an image; a service that a failure leaves behind is ended."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "image.png").write_bytes(encode_png(generated_image(3, 96, 128)[0]))
    try:
        follow(document, folder, ROOT, {"NUCLEUS_BUCKET": ""}, tmp_path)
    finally:
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((folder / "service.pid").read_text()), signal.SIGTERM)


def follow(document: str, folder: Path, code: Path, changes: dict[str, str], notes: Path) -> None:
    """Run the blocks of a document in a folder, with the package in `code`."""
    folder.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    reader = Reader(folder, {**os.environ, "PYTHONPATH": str(code), "PATH": path, **changes}, notes)
    blocks = blocks_of(document)
    assert any(block.kind == "run" for block in blocks)
    for block in blocks:
        reader.follow(block)
