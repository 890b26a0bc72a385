"""The versions of Python and of the packages that a run depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["PACKAGES", "installed_versions"]

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
