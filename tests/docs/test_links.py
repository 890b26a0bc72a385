"""Links between documents: files and headings exist, and so does every test that is named."""

import re
from pathlib import Path

import pytest

from tests.docs.blocks import DOCUMENTS, ROOT

LINK = re.compile(r"!?\[(?:[^\]]|\][^(])*\]\((?P<target>[^)\s]+)\)")
ELSEWHERE = re.compile(r"^(https?:|mailto:)")


def prose(path: Path) -> str:
    """A document without its blocks and without code in lines, which may hold brackets."""
    text = re.sub(r"^(\s*)```.*?^\1```\s*$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()]", "", code[0]), text)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: list[str] = []
    for title in re.findall(r"^#{1,6} +(.+?) *$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.M):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.append(anchor if anchor not in found else f"{anchor}-{found.count(anchor)}")
    return set(found)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    targets = [link["target"] for link in LINK.finditer(prose(path))]
    for target in targets:
        if ELSEWHERE.match(target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.is_relative_to(ROOT), f"{document}: {target} leads out of the repository"
        assert there.exists(), f"{document}: {target} leads nowhere"
        if anchor:
            assert anchor in anchors(there), f"{document}: {target}; found {', '.join(sorted(anchors(there)))}"


def test_links_are_found() -> None:
    assert sum(len(LINK.findall(prose(ROOT / document))) for document in DOCUMENTS) > 60
    assert {"metrics", "augmentation-for-images-like-these-and-for-others"} <= anchors(ROOT / "docs/segmentation.md")


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    inside = [document.removeprefix("docs/") for document in DOCUMENTS if document.startswith("docs/")]
    assert [name for name in inside if name != "README.md" and f"]({name})" not in index] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_that_are_named_exist(document: str) -> None:
    for path, test in re.findall(r"\b(tests/[\w/]+\.py)(?:::(\w+))?", (ROOT / document).read_text()):
        made_there = f"<!-- file: {path} -->" in (ROOT / document).read_text()
        assert made_there or (ROOT / path).is_file(), f"{document}: {path}"
        if test and not made_there:
            assert f"def {test}(" in (ROOT / path).read_text(), f"{document}: {path}::{test}"
