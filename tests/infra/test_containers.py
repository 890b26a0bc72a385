"""`make containers` without its engine: how it keeps steps, and that its last result in the documents is whole."""

import re
from pathlib import Path

import pytest
import yaml

from tests.containers.__main__ import STORES, main
from tests.containers.guide import Guide
from tests.containers.images import LIMITS
from tests.containers.report import write_report
from tests.containers.steps import Protocol, Shell, StepError

ROOT = Path(__file__).parents[2]
RESULT = (ROOT / "docs" / "infra" / "containers.md").read_text()


def refuse() -> str:
    raise StepError("first line\nlast line")


def test_a_failed_step_ends_its_part_only(capsys: pytest.CaptureFixture[str]) -> None:
    protocol = Protocol()
    for name in ("one", "two"):
        with protocol.part():
            protocol.step(name, "works", lambda: "seen")
            protocol.step(name, "does not", refuse)
            protocol.step(name, "is left out", lambda: "never")
    assert [(line.part, line.name, line.ok) for line in protocol.lines] == [
        ("one", "works", True), ("one", "does not", False), ("two", "works", True), ("two", "does not", False),
    ]  # fmt: skip
    assert not protocol.ok
    assert "first line" in capsys.readouterr().err


def test_another_exit_status_is_a_failure(tmp_path: Path) -> None:
    shell = Shell(tmp_path / "log", {"WORD": "value"}, tmp_path)
    assert shell.run("sh", "-c", "echo $WORD") == "value\n"
    assert shell.json("echo", "[1]") == [1]
    with pytest.raises(StepError, match="exit status 3 instead of 0"):
        shell.run("sh", "-c", "echo said; exit 3")
    assert "said" in (tmp_path / "log").read_text()


def test_the_page_says_what_failed(tmp_path: Path) -> None:
    protocol = Protocol(facts={"Docker Engine": "1.2"})
    protocol.step("part", "works", lambda: "a|b")
    with protocol.part():
        protocol.step("part", "breaks", refuse)
    write_report(protocol, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "1 steps failed" in page
    assert "| part | works | 0 | a\\|b |" in page
    assert "**failed**: last line" in page
    assert "| Docker Engine | 1.2 |" in page


def test_every_step_stands_in_the_last_result(tmp_path: Path) -> None:
    seen = set()
    for store in STORES:
        guide = Guide(store, tmp_path, tmp_path, Shell(tmp_path / "log", {}, ROOT), Protocol())
        wanted = {*(name for name, _ in guide._steps()), "down --volumes"}
        rows = set(re.findall(rf"^\| {re.escape(store.name)} \| (.*?) \| \d+ \|", RESULT, re.M))
        assert rows
        assert rows <= wanted
        seen |= rows
    assert seen == wanted
    assert "**failed**" not in RESULT


def test_sizes_in_the_last_result_are_below_the_limits_and_those_of_the_guide() -> None:
    guide = (ROOT / "docs" / "infra" / "image.md").read_text()
    for extra, limit in LIMITS.items():
        found = re.search(rf"^\| nucleus:{extra} \| (\d+) MB, compressed (\d+) MB", RESULT, re.M)
        assert found
        assert int(found[1]) <= limit
        assert f"| {int(found[1]):,} MB, {found[2]} MB |" in guide


def test_other_stores_replace_the_store_only() -> None:
    services = yaml.safe_load((ROOT / "infra" / "local" / "compose.yaml").read_text())["services"]
    for file in [file for store in STORES for file in store.files]:
        other = yaml.safe_load((ROOT / file).read_text())["services"]
        assert set(other) <= {"store", "store-owner"} <= set(services)


def test_it_needs_root_on_debian(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main(tmp_path / "folder") == 2
    assert "root on Debian" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
