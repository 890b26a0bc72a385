"""`blocks.Reader`: folder, variables and files carry over, and failures are reported with their place."""

import os
from pathlib import Path

import pytest

from tests.docs import blocks
from tests.docs.blocks import Block, Reader, blocks_of


def block(text: str, language: str = "sh", kind: str = "run", value: str | None = None) -> Block:
    return Block("a.md", 3, language, kind, value, text)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    (tmp_path / "here").mkdir()
    return Reader(tmp_path / "here", {"PATH": os.environ["PATH"], "NAME": "x"}, tmp_path)


def test_folder_variables_and_files_hold_for_the_blocks_after(reader: Reader, tmp_path: Path) -> None:
    reader.follow(block("a = 1\n", "toml", "file", "in/a.toml"))
    reader.follow(block('mkdir "$NAME"\ncd x\nexport TWO="1\n2"\nLOCAL=3\n'))
    reader.follow(
        block('test "$(basename "$PWD")" = x\ntest "$TWO" = "1\n2"\ntest -z "${LOCAL:-}"\ncat ../in/a.toml\n')
    )
    reader.follow(block("a = 1\n", "text", "output"))
    reader.follow(block('from pathlib import Path\nassert Path.cwd().name == "x"\nprint("from Python")\n', "python"))
    reader.follow(block("from ...\n", "", "output"))
    reader.follow(block("echo one\necho two\necho three\n"))
    reader.follow(block("two\n", "text", "output"))
    reader.follow(block("exit 1\n", kind="not run"))
    assert (tmp_path / "here" / "in" / "a.toml").read_text() == "a = 1\n"


@pytest.mark.parametrize(
    "wrong",
    [
        block("false\ntrue\n"),
        block("false | true\n"),
        block("echo $UNKNOWN\n"),
        block("assert False\n", "python"),
        block("something else\n", "text", "output"),
        block("--- a/f\n+++ b/f\n@@\n-not there\n+there\n", "diff"),
        block("--- a/f\n+++ b/f\n@@\n-twice\n+once\n", "diff"),
    ],
    ids=lambda wrong: wrong.text[:20],
)
def test_failures_name_their_place(reader: Reader, tmp_path: Path, wrong: Block) -> None:
    (tmp_path / "here" / "f").write_text("twice\ntwice\n")
    reader.follow(block("echo printed\n"))
    with pytest.raises(AssertionError, match=r"a\.md:3"):
        reader.follow(wrong)


def test_a_diff_changes_the_lines_it_shows(reader: Reader, tmp_path: Path) -> None:
    file = tmp_path / "here" / "f"
    file.write_text("one\ntwo\nthree\nfour\n")
    reader.follow(block("--- a/f\n+++ b/f\n@@\n one\n-two\n+2\n@@\n+3.5\n four\n", "diff"))
    assert file.read_text() == "one\n2\nthree\n3.5\nfour\n"


def test_blocks_are_found_with_their_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ROOT", tmp_path)
    shell, text = "<!-- run -->\n```sh\na\n```\n", "\n```\nc\n```\n"
    python = "\n- item\n\n  <!-- not run: no machine -->\n  ```python\n  b\n  ```\n"
    (tmp_path / "a.md").write_text(shell + python + text)
    first, second, third = blocks_of("a.md")
    assert (first.language, first.kind, first.text, first.line) == ("sh", "run", "a\n", 2)
    assert (second.language, second.kind, second.value, second.text) == ("python", "not run", "no machine", "b\n")
    assert (third.language, third.kind) == ("", None)
    (tmp_path / "a.md").write_text("```sh\na\n")
    with pytest.raises(ValueError, match=r"a\.md:1"):
        blocks_of("a.md")
