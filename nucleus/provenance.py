"""Provenance of a run: the versions of Python and of the main packages, and the git commit of this code."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["COMMIT_VARIABLE", "PACKAGES", "commit", "installed_versions"]

COMMIT_VARIABLE = "WANDB_GIT_COMMIT"
"""W&B's variable for the commit of code outside a git clone, such as in a job or an image."""

PACKAGES = ("nucleus", "ray", "tensorflow", "keras")


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of those of `PACKAGES` that are installed; `tensorflow-cpu` is TensorFlow."""
    found = {name: _version(name) or _version(f"{name}-cpu") for name in PACKAGES}
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text}}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of this code, from WANDB_GIT_COMMIT or its git clone; `-dirty` marks changed files.

    None if the code is not in a clone, or git is not installed.
    """
    given = os.environ.get(COMMIT_VARIABLE)
    root = Path(__file__).parents[1]
    if given or not (root / ".git").exists() or not shutil.which("git"):
        return given or None
    head = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if head and changed else head or None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)  # noqa: S603, S607
    return done.stdout.strip() if done.returncode == 0 else ""
