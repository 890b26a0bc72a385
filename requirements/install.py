"""Make an environment from a lock, with this project in it: `make install`.

Runs on the Python that the environment will have, with the standard library alone. uv installs, in the version and with
the hashes of the lock; it comes by pip, or by a uv that is on PATH where Python has no `ensurepip` (Debian without
`python3-venv`). `--installer pip` does without uv.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet", "install")
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
    mark(given.environment, given.extra)
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
    if not runs_here(python):
        make_environment(environment)
    with tempfile.TemporaryDirectory() as name:
        own = Path(name) / "uv.txt"
        own.write_text(locked("uv"))
        if not uv.exists():
            run(*installer_of(python), "--require-hashes", "--requirement", own)
        lock = ROOT / "requirements" / f"{extra}.txt"
        run(uv, "pip", "sync", "--quiet", "--python", python, "--require-hashes", lock, own)
    run(uv, "pip", "install", "--quiet", "--python", python, *PROJECT)


def by_pip(environment: Path, extra: str) -> None:
    """Install the lock, the builder of wheels and this project; an environment of another lock is made anew."""
    python, pip = environment / "bin" / "python", environment / "bin" / "pip"
    if not runs_here(python) or not pip.exists() or marks(environment) - {extra}:
        need_ensurepip()
        run(sys.executable, "-m", "venv", "--clear", environment)
    with tempfile.TemporaryDirectory() as name:
        own = Path(name) / "builder.txt"
        own.write_text(locked("uv-build"))
        lock = ROOT / "requirements" / f"{extra}.txt"
        run(python, *PIP, "--require-hashes", "--requirement", lock, "--requirement", own)
    run(python, *PIP, *PROJECT)


def make_environment(environment: Path) -> None:
    """Make an empty environment, by a uv on PATH if Python itself cannot."""
    if has_ensurepip():
        run(sys.executable, "-m", "venv", "--clear", environment)
    elif found := shutil.which("uv"):
        run(found, "venv", "--quiet", "--clear", "--python", sys.executable, environment)
    else:
        need_ensurepip()


def installer_of(python: Path) -> list[str | Path]:
    """Return the command that installs uv: the environment's pip, or a uv on PATH if it has none."""
    if python.with_name("pip").exists():
        return [python, *PIP]
    found = shutil.which("uv")
    return [found, "pip", "install", "--quiet", "--python", python] if found else [python, *PIP]


def has_ensurepip() -> bool:
    """Whether this Python makes environments with pip; Debian's does not without a package of its own."""
    return not subprocess.run([sys.executable, "-c", "import ensurepip"], capture_output=True, check=False).returncode


def need_ensurepip() -> None:
    """End with a message unless this Python makes environments with pip."""
    if not has_ensurepip():
        version = "python{}.{}-venv".format(*sys.version_info)
        sys.exit(f"Expected Python's ensurepip, or uv on PATH; found neither. On Debian run: apt-get install {version}")


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


def marks(environment: Path) -> set[str]:
    """Return the locks that the environment was made from."""
    return {path.name.removeprefix(".installed-") for path in environment.glob(".installed-*")}


def mark(environment: Path, extra: str) -> None:
    """Leave the file that says which lock is installed, and no other."""
    for name in marks(environment):
        (environment / f".installed-{name}").unlink()
    (environment / f".installed-{extra}").touch()


def run(*command: str | Path) -> None:
    """Run a command; `CalledProcessError` if it fails."""
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
