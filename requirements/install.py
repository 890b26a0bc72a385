"""Make an environment from a lock, with this project in it: `make install`.

Runs on the Python that the environment will have, with the standard library alone. uv installs, in the version and with
the hashes of the lock; it comes by this Python's pip, by a uv that is on PATH, or by `ensurepip`, whichever is there
(Debian has each in a package of its own). `--installer pip` does without uv.
"""

from __future__ import annotations  # an older Python reads this too, and says which one is needed

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)
PIP = ("--disable-pip-version-check", "--quiet", "install")
PROJECT = ("--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def main() -> None:
    """Install a lock and this project, and leave the mark that `make` looks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("environment", type=Path, help="folder of the environment")
    parser.add_argument("extra", help="name of the lock: predict, train, train-gpu or dev")
    parser.add_argument("--installer", choices=["uv", "pip"], default="uv")
    given = parser.parse_args()
    check_python()
    began, version = time.monotonic(), ".".join(map(str, sys.version_info[:3]))
    print(f"Installing requirements/{given.extra}.txt into {given.environment} by {given.installer}, Python {version}")
    try:
        (by_uv if given.installer == "uv" else by_pip)(given.environment, given.extra)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{Path(error.cmd[0]).name} failed; its message is above.{other_way(given.installer)}")
    (given.environment / f".installed-{given.extra}").touch()
    print(f"Installed in {time.monotonic() - began:.0f} s")


def check_python() -> None:
    """End with a message unless this Python can run the project."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"Python 3.11, 3.12 or 3.13 is needed; found: {found}. Run: make install PYTHON=/path/to/python3.12")


def other_way(installer: str) -> str:
    """Return the hint for a registry that only pip is told of."""
    hint = " If your package registry is set for pip alone, run: make install INSTALLER=pip, or set UV_DEFAULT_INDEX."
    return hint if installer == "uv" else ""


def by_uv(environment: Path, extra: str) -> None:
    """Make the environment hold exactly what the lock names, uv and this project."""
    python, uv = environment / "bin" / "python", environment / "bin" / "uv"
    unmark(environment)
    if not runs_here(python):
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", environment)
    with tempfile.TemporaryDirectory() as name:
        own = Path(name) / "uv.txt"
        own.write_text(locked("uv"))
        if not uv.exists():
            run(*uv_installer(python), "--require-hashes", "--requirement", own)
        lock = ROOT / "requirements" / f"{extra}.txt"
        # Elsewhere the first import of a module writes its bytecode; here each process would compile everything again.
        compiled = ["--compile-bytecode"] if sys.dont_write_bytecode else []
        run(uv, "pip", "sync", "--quiet", *compiled, "--python", python, "--require-hashes", lock, own)
    run(uv, "pip", "install", "--quiet", "--python", python, *PROJECT)


def by_pip(environment: Path, extra: str) -> None:
    """Install the lock, the builder of wheels and this project; what is not of this lock alone is made anew."""
    python = environment / "bin" / "python"
    before = unmark(environment)
    if before != {extra} or not runs_here(python) or not python.with_name("pip").exists():
        need_ensurepip()
        run(sys.executable, "-m", "venv", "--clear", environment)
    with tempfile.TemporaryDirectory() as name:
        own = Path(name) / "builder.txt"
        own.write_text(locked("uv-build"))
        lock = ROOT / "requirements" / f"{extra}.txt"
        run(python, "-m", "pip", *PIP, "--require-hashes", "--requirement", lock, "--requirement", own)
    run(python, "-m", "pip", *PIP, *PROJECT, path=python.parent)  # where uv-build looks for itself


def uv_installer(python: Path) -> list[str | Path]:
    """Return the command that installs uv into an environment without pip; pip there takes longer than all the rest."""
    of_this_python = [sys.executable, "-m", "pip", "--python", python]
    if succeeds(*of_this_python, "--version"):
        return [*of_this_python, *PIP]
    found = shutil.which("uv")
    if found:
        return [found, "pip", "install", "--quiet", "--python", python]
    need_ensurepip()
    run(python, "-m", "ensurepip")
    return [python, "-m", "pip", *PIP]


def succeeds(*command: str | Path) -> bool:
    """Whether a command ends with status 0; its output is not shown."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def need_ensurepip() -> None:
    """End with a message unless this Python makes environments with pip."""
    if not succeeds(sys.executable, "-c", "import ensurepip"):
        version = "python{}.{}-venv".format(*sys.version_info)
        sys.exit(
            f"Expected Python's pip or ensurepip, or uv on PATH; found none. On Debian run: apt-get install {version}"
        )


def runs_here(python: Path) -> bool:
    """Whether the environment's Python starts and is of the version of this one."""
    script = "import sys; print(*sys.version_info[:2])"
    try:
        found = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False).stdout
    except OSError:
        return False
    return found.split() == [str(number) for number in sys.version_info[:2]]


def locked(name: str) -> str:
    """Return the lines of a package in the lock for development, with its hashes."""
    text = (ROOT / "requirements" / "dev.txt").read_text()
    found = re.search(rf"^{name}==(?:.*\\\n)*.*\n", text, flags=re.MULTILINE)
    if found is None:
        sys.exit(f"requirements/dev.txt lacks {name}. Run: make lock")
    return found[0]


def unmark(environment: Path) -> set[str]:
    """Remove the marks of what is installed, and return their locks; what is interrupted leaves none."""
    marks = list(environment.glob(".installed-*"))
    for path in marks:
        path.unlink()
    return {path.name.removeprefix(".installed-") for path in marks}


def run(*command: str | Path, path: Path | None = None) -> None:
    """Run a command, with a folder before PATH; `CalledProcessError` if it fails."""
    before = [str(path.absolute())] if path else []
    variables = {**os.environ, "PATH": os.pathsep.join([*before, os.environ.get("PATH", os.defpath)])}
    subprocess.run(command, check=True, env=variables)


if __name__ == "__main__":
    main()
