"""The recipes that come along, by name."""

from pathlib import Path

__all__ = ["recipe_path"]


def recipe_path(text: str) -> Path:
    """The file that the user means: a path, or the name of a recipe that comes along."""
    shipped = Path(__file__).parent / f"{text}.toml"
    return shipped if shipped.is_file() and not Path(text).is_file() else Path(text)
