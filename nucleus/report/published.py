"""What others reached on the images of the Data Science Bowl 2018, from `published.toml`."""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nucleus.report.tables import Table
from nucleus.report.wording import KINDS, MISSING, count, score

__all__ = ["PublishedSystem", "published_systems", "published_table"]

_HEADLINES = ("ap_50", "ap_70", "ap_90")
_UP_TO_90 = tuple(f"ap_{threshold}" for threshold in range(50, 95, 5))


class PublishedSystem(BaseModel):
    """What a paper reports.

    Attributes:
        name: Of the system.
        source: Who reports it, where and when.
        url: Of the paper.
        images: On which images.
        kind: The kind of image with which it can be compared, or `all`.
        ap: AP by IoU threshold in hundredths.
        mean_ap_50_90: The mean over thresholds 0.50, 0.55, ..., 0.90.
        map: The mean over thresholds 0.50, 0.55, ..., 0.95.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: str
    url: str
    images: str
    kind: str
    ap: dict[str, float] = {}
    mean_ap_50_90: float | None = None
    map: float | None = None


@cache
def published_systems() -> tuple[PublishedSystem, ...]:
    """All of them."""
    content = tomllib.loads((Path(__file__).parent / "published.toml").read_text())
    return tuple(PublishedSystem.model_validate(system) for system in content["systems"])


def published_table(ours: Mapping[str, Mapping[str, float]]) -> Table:
    """This run's test scores, by kind of image, above the published ones."""
    rows = [
        (
            "this run",
            f"{KINDS[kind]}, {count(ours[kind].get('images', 0))} test images",
            *(score(ours[kind], key) for key in _HEADLINES),
            _mean_to_90(ours[kind]),
            score(ours[kind], "map"),
        )
        for kind in ("dark-field", "all")
        if kind in ours
    ]
    rows += [
        (
            f"{system.name} ({system.source})",
            system.images,
            *(_given(system.ap.get(key.removeprefix("ap_"))) for key in _HEADLINES),
            _given(system.mean_ap_50_90),
            _given(system.map),
        )
        for system in published_systems()
    ]
    columns = ("system", "images", "AP.5", "AP.7", "AP.9", "mean AP .50 to .90", "mAP (.50 to .95)")
    return Table("AP of this run and of published systems", columns, rows, words=frozenset({1}))


def _mean_to_90(scores: Mapping[str, float]) -> str:
    if not all(key in scores for key in _UP_TO_90):
        return MISSING
    return f"{sum(scores[key] for key in _UP_TO_90) / len(_UP_TO_90):.3f}"


def _given(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"
