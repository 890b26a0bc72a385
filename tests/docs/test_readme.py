"""The README's file map is the tree, and its commands exist."""

import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from nucleus.cli.main import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_file_map_is_the_tree() -> None:
    listed = set(
        re.findall(r"^\| `([^`]+)` \|", README.split("## Files")[1].split("</details>")[0], flags=re.MULTILINE)
    )
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    on_disk = {name for name in tracked if (ROOT / name).exists() and not name.endswith(("__init__.py", "py.typed"))}
    assert listed == on_disk


COMMANDS = sorted(set(re.findall(r"^nucleus ((?:[a-z]+)(?: [a-z]+)?)", README, flags=re.MULTILINE)))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line: str) -> None:
    first, *rest = line.split()
    groups = {"data", "weights", "models", "runs", "store"}
    words = [first, *rest] if first in groups else [first]
    run = CliRunner().invoke(cli, [*words, "--help"])
    assert run.exit_code == 0, run.output


def test_every_benchmark_has_its_number() -> None:
    names = re.findall(
        r'^    "(\w+)": "\w+",$', (ROOT / "tests/benchmarks/__main__.py").read_text(), flags=re.MULTILINE
    )
    assert len(names) == 14
    listed = set(re.findall(r"^\| `(\w+)` \| .*\d", README.split("## Fast")[1], flags=re.MULTILINE))
    assert listed == set(names)


def test_every_measured_number_is_filled_in() -> None:
    assert not re.search(r"@[A-Z_]+@", README)
