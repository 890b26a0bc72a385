"""The locks and what installs them: `make install`, as far as no registry is needed."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = runpy.run_path(str(ROOT / "requirements" / "lock.py"))["EXTRAS"]
MAKEFILE = (ROOT / "Makefile").read_text()
PYTHONS = re.findall(r"3\.\d+", re.findall(r"^PYTHONS := (.*)$", MAKEFILE, flags=re.MULTILINE)[0])
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64")]
MACHINES = [
    {"sys_platform": system, "platform_machine": machine, "python_version": version, "python_full_version": version}
    for system, machine in PLATFORMS
    for version in PYTHONS
]
OTHER = {"platform_system": "", "os_name": "", "platform_python_implementation": "CPython", "extra": ""}


def locked(name: str) -> list[Requirement]:
    """The lines of a lock, without their hashes."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return [Requirement(line.removesuffix(" \\")) for line in lines if line and not line.startswith(" ")]


def wanted(extras: list[str]) -> Iterator[Requirement]:
    """What the project asks for with these extras; an extra may name another."""
    for line in PROJECT["project"]["dependencies"]:
        yield Requirement(line)
    for extra in extras:
        for line in PROJECT["project"]["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name == PROJECT["project"]["name"]:
                yield from wanted(sorted(requirement.extras))
            else:
                yield requirement


def holds(requirement: Requirement, machine: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**OTHER, **machine})


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_what_the_project_asks_for(name: str) -> None:
    """On each platform and Python that the project names, exactly one version that fits."""
    lines = locked(name)
    for machine in MACHINES:
        for requirement in wanted(LOCKS[name]):
            if holds(requirement, machine):
                same = [line for line in lines if canonicalize_name(line.name) == canonicalize_name(requirement.name)]
                (found,) = [line for line in same if holds(line, machine)]
                (version,) = found.specifier
                assert requirement.specifier.contains(version.version, prereleases=True), f"{requirement}: {found}"


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_hashes_and_no_host(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert not re.search(r"://|^-", text, flags=re.MULTILINE)
    packages = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in package for package in packages)


def test_the_light_lock_lacks_what_trains() -> None:
    light = {line.name for line in locked("predict")}
    assert "onnxruntime" in light
    assert not light & {"tensorflow", "tensorflow-cpu", "keras", "ray", "wandb", "pyarrow", "matplotlib", "ministack"}


def test_the_locked_uv_builds_the_project_itself() -> None:
    (asked,) = map(Requirement, PROJECT["build-system"]["requires"])
    assert asked.name == "uv_build"
    of_uv = [line for line in locked("dev") if line.name in {"uv", "uv-build"}]
    versions = {line.name: next(iter(line.specifier)).version for line in of_uv}
    assert versions.keys() == {"uv", "uv-build"}
    assert all(asked.specifier.contains(version) for version in versions.values())


def test_every_python_is_named_everywhere() -> None:
    classified = {line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line}
    assert {*PYTHONS} <= classified
    installer = runpy.run_path(str(ROOT / "requirements" / "install.py"))
    assert {installer["OLDEST"], installer["NEWEST"]} == {tuple(map(int, PYTHONS[at].split("."))) for at in (0, -1)}
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(PYTHONS[0])
    tested = re.findall(r"test-fast-(3\.\d+)", MAKEFILE)
    assert {PYTHONS[0], *tested} == {*PYTHONS}
    assert all(version in (ROOT / ".ci" / "run").read_text() for version in PYTHONS)


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def find(tmp_path: Path, *versions: str) -> subprocess.CompletedProcess[str]:
    """Run the search on a machine with the programs in `bin` and pyenv's folder."""
    environment = {"PATH": f"{tmp_path / 'bin'}:/nowhere", "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path / "pyenv")}
    command = ["/bin/sh", str(ROOT / "requirements" / "find_python.sh"), *versions]
    program(tmp_path / "bin" / "sed", 'exec /bin/sed "$@"')
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_first_python_that_runs_is_found(tmp_path: Path) -> None:
    """A shim of pyenv is there and fails; the Python behind it is in pyenv's folder."""
    program(tmp_path / "bin" / "python3.11", 'echo "pyenv: python3.11: command not found" >&2; exit 127')
    program(tmp_path / "bin" / "python3.13", "echo /thirteen")
    program(tmp_path / "pyenv" / "versions" / "3.12.1" / "bin" / "python", "echo /twelve")
    assert find(tmp_path, "3.11", "3.12", "3.13").stdout == "/twelve\n"
    assert find(tmp_path, "3.13", "3.12").stdout == "/thirteen\n"


def test_the_python_of_an_environment_is_not_taken(tmp_path: Path) -> None:
    version = "{}.{}".format(*sys.version_info)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    assert (tmp_path / "bin" / f"python{version}").exists()
    found = Path(find(tmp_path, version).stdout.strip())
    assert found.resolve() == Path(sys.executable).resolve()
    assert found.parent != tmp_path / "bin"


def test_what_was_looked_for_and_found_is_said(tmp_path: Path) -> None:
    program(tmp_path / "bin" / "python3", "echo Python 3.9.18")
    done = find(tmp_path, "3.11", "3.12")
    assert (done.returncode, done.stdout) == (1, "")
    assert all(words in done.stderr for words in ("3.11, 3.12", "found: Python 3.9.18", "make install PYTHON="))


def installing(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What make would do."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | environment
    command = ["make", "--dry-run", "--no-print-directory", *words]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("there", "target", "installs"),
    [
        ("", "demo", "train"),
        ("predict", "demo", "train"),
        ("train", "demo", ""),
        ("dev", "demo", ""),
        ("dev", "test-fast", ""),
        ("train", "test-fast", "dev"),
        ("train-gpu", "install", "dev"),
    ],
)
def test_make_installs_what_is_missing(there: str, target: str, installs: str, tmp_path: Path) -> None:
    if there:
        (tmp_path / f".installed-{there}").touch()
    done = installing(target, f"VENV={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert re.findall(rf'install\.py .*"{tmp_path}" "([\w-]+)"', done.stdout) == ([installs] if installs else [])


def test_an_unknown_extra_is_refused() -> None:
    done = installing("install", "EXTRA=cpu")
    assert done.returncode != 0
    assert 'EXTRA is "cpu"; expected one of: predict train train-gpu dev' in done.stderr


def test_another_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check: Any = runpy.run_path(str(ROOT / "requirements" / "install.py"))["check_python"]
    for version in ((3, 10, 4), (3, 14, 0)):
        monkeypatch.setattr(sys, "version_info", version)
        with pytest.raises(SystemExit, match=r"found: 3\.1[04]\.\d\. .*make install PYTHON="):
            check()
