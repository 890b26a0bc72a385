"""Rows and artifacts in W&B's offline files, to prove what was logged."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nucleus.tracking.offline_log import records
from nucleus.tracking.wandb_run import offline_files

__all__ = ["logged_artifacts", "logged_rows", "rows_of_run"]


def logged_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file's history; the parts of a picture are dictionaries."""
    for record in records(path):
        if record.HasField("history"):
            row: dict[str, Any] = {}
            for item in record.history.item:
                *above, last = list(item.nested_key) or [item.key]
                place = row
                for key in above:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            yield row


def rows_of_run(folder: Path, run: str) -> list[dict[str, Any]]:
    """The rows of all attempts of an offline run in a folder."""
    return [row for path in offline_files(folder, run) for row in logged_rows(path)]


def logged_artifacts(folder: Path, run: str) -> list[Any]:
    """The `ArtifactRecord`s of all attempts of an offline run in a folder."""
    found = [record for path in offline_files(folder, run) for record in records(path)]
    return [record.artifact for record in found if record.HasField("artifact")]
