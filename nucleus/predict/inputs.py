"""Which image files a user means."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from nucleus.data.images import IMAGE_SUFFIXES
from nucleus.errors import UsageError

__all__ = [
    "FILES_AT_ONCE",
    "IMAGES_TABLE",
    "LABELS_ENDING",
    "NUCLEI_TABLE",
    "OUTPUT_ENDINGS",
    "OVERLAY_ENDING",
    "check_outputs",
    "check_stems",
    "find_inputs",
]

FILES_AT_ONCE = 8
"""Images that are opened together, so that small ones are computed together."""

LABELS_ENDING = ".labels.tif"
OVERLAY_ENDING = ".overlay.png"
OUTPUT_ENDINGS = (LABELS_ENDING, OVERLAY_ENDING)
NUCLEI_TABLE = "nuclei.csv"
IMAGES_TABLE = "images.csv"


def find_inputs(inputs: Sequence[Path]) -> list[Path]:
    """The image files that arguments name: files as they are, and those directly in folders.

    Raises:
        UsageError: A path does not exist, there are no images, or two would write the same output.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(item for item in path.iterdir() if _is_input(item))
        elif path.exists():
            files.append(path)
        else:
            raise UsageError(f"Expected an image or a folder at {path}; nothing is there.")
    if not files:
        raise UsageError(f"Expected image files in {', '.join(map(str, inputs))}; found none.")
    check_stems([(file.stem, str(file)) for file in files])
    return files


def check_stems(images: Iterable[tuple[str, str]]) -> None:
    """Raise `UsageError` if two images, each a stem and a full name, would write the same output."""
    stems: dict[str, str] = {}
    for number, (stem, name) in enumerate(images):
        other = stems.setdefault(stem, name)
        if len(stems) <= number:
            raise UsageError(
                f"Expected images of different names; {other} and {name} would both write {stem}{LABELS_ENDING}. "
                "Run them with different --out folders."
            )


def check_outputs(files: Sequence[Path], out: Path) -> None:
    """Raise `UsageError` if a prediction of these files into `out` would replace files that are there."""
    names = [f"{file.stem}{ending}" for file in files for ending in OUTPUT_ENDINGS]
    there = [name for name in (NUCLEI_TABLE, IMAGES_TABLE, *names) if (out / name).exists()]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UsageError(
            f"Expected nothing in {out} that would be replaced; found {there[0]}{more}. Name another --out, or add "
            "--overwrite."
        )


def _is_input(path: Path) -> bool:
    """Whether a file of a folder is an image, and none that an earlier prediction wrote there."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.endswith(OUTPUT_ENDINGS)
