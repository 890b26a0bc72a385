"""The versions of Python and of the packages that a run depends on."""

import platform
from importlib.metadata import distributions

__all__ = ["PACKAGES", "installed_versions"]

PACKAGES = ("nucleus", "ray", "tensorflow", "keras")


def installed_versions() -> dict[str, str]:
    """The version of Python, and by name those of `PACKAGES` that are here; `tensorflow-cpu` is TensorFlow."""
    found = {each.name.replace("_", "-").removesuffix("-cpu"): each.version for each in distributions()}
    return {"python": platform.python_version(), **{name: found[name] for name in PACKAGES if name in found}}
