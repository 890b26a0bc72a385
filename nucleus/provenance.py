"""Provenance of a run: the versions of Python, of the packages that it depends on, and of this code."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["COMMIT_VARIABLE", "PACKAGES", "commit", "installed_versions"]

COMMIT_VARIABLE = "WANDB_GIT_COMMIT"
"""W&B's own variable for the commit of code that is not in its clone, as in a job or an image."""

PACKAGES = ("nucleus", "ray", "tensorflow", "keras")


def installed_versions() -> dict[str, str]:
    """The version of Python, and by name those of `PACKAGES` that are here; `tensorflow-cpu` is TensorFlow."""
    found = {name: _version(name) or _version(f"{name}-cpu") for name in PACKAGES}
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text}}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this code, from `WANDB_GIT_COMMIT` or its clone; with `-dirty` where a file of it was changed.

    None if the code is not in a clone, or git is not installed.
    """
    told = os.environ.get(COMMIT_VARIABLE)
    root = Path(__file__).parents[1]
    if told or not (root / ".git").exists() or not shutil.which("git"):
        return told or None
    head = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if head and changed else head or None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)  # noqa: S603, S607
    return done.stdout.strip() if done.returncode == 0 else ""
