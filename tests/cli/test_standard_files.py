"""stdin, stdout and stderr that are closed, full or read by nobody, in real processes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

WRITES = """
import os, sys
import click
from nucleus.cli import main as module

@module.cli.command()
@click.argument("file")
def hidden(file):
    with open(file, "x") as opened:
        click.echo("to stdout")
        click.echo("to stderr", err=True)
        print("printed")
        os.system("echo from a child; echo from a child >&2")
        opened.write(f"own {opened.fileno() > 2}")

module._COMMANDS["hidden"] = ("builtins", "", "")
module.cli.get_command = lambda context, name: hidden
module.main()
"""
"""The command line, with a command that opens a file before it prints."""
CLOSED = [set(each) for count in (1, 2, 3) for each in itertools.combinations((0, 1, 2), count)]


@pytest.mark.parametrize("closed", CLOSED, ids=str)
def test_closed_files(closed: set[int], tmp_path: Path) -> None:
    """The command works, and nothing that is printed lands in the file that it opened."""
    marks = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in closed)
    command = ["sh", "-c", f'"$@" {marks}', "sh", sys.executable, "-c", WRITES, "hidden", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == "own True"
    assert set(done.stdout.splitlines()) == (set() if 1 in closed else {"to stdout", "printed", "from a child"})
    assert set(done.stderr.splitlines()) == (set() if 2 in closed else {"to stderr", "from a child"})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["store", "--help"], ["store", "status", "--json"]])
def test_a_full_disk_behind_stdout(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "nucleus", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: Expected to write the results to stdout")
    assert "No space left on device" in line


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["nonsense"], 2), (["data", "list"], 2)])
def test_a_full_disk_behind_stderr_changes_nothing(arguments: list[str], status: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "NUCLEUS_BUCKET"}
    command = [sys.executable, "-m", "nucleus", *arguments]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, env=environment, check=False)
    assert done.returncode == status


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["store", "--help"], ["store", "status"]])
def test_nobody_reads(arguments: list[str], tmp_path: Path) -> None:
    """As behind `head`: the status is that of SIGPIPE in a shell, and nothing is said."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "nucleus", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_broken_connection_is_no_closed_stdout(tmp_path: Path) -> None:
    """EPIPE from elsewhere is an error that is told."""
    code = WRITES.replace('with open(file, "x") as opened:', 'raise BrokenPipeError(32, "Broken pipe")\n    if True:')
    done = subprocess.run(
        [sys.executable, "-c", code, "hidden", str(tmp_path / "file")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "Error: [Errno 32] Broken pipe\n"


def test_text_keeps_its_encoding() -> None:
    code = "from nucleus.cli.main import _open_standard_files as opened; opened(); print('\\u00b5\\u4e2d')"
    for encoding in ("utf-8", "utf-16"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
        assert done.stdout.decode(encoding) == "µ中\n"
