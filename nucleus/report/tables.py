"""Tables of the page: text in rows and columns."""

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nucleus.data.dataset import SPLITS, DatasetManifest, LeftOut
from nucleus.data.images import Kind
from nucleus.metrics.scores import HEADLINES
from nucleus.report.drawing import Table
from nucleus.runs.record import RunRecord
from nucleus.text import KINDS, MISSING, SPLIT_NAMES, count, date_of, plural, score

__all__ = [
    "Metrics",
    "PublishedSystem",
    "all_scores_table",
    "dataset_facts",
    "failure_table",
    "found_of",
    "left_out_tables",
    "published_systems",
    "published_table",
    "scores_table",
    "splits_table",
]


Metrics = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Split, then `all` or kind of image, then metric."""

_MISTAKES = {"nuclei_missed": "missed", "nuclei_extra": "extra", "nuclei_merged": "merged", "nuclei_split": "split"}
_BY_DIAMETER = {
    "recall_50_under_12px": "under 12 px",
    "recall_50_12_to_24px": "12 to 24 px",
    "recall_50_24_to_48px": "24 to 48 px",
    "recall_50_over_48px": "over 48 px",
}


def scores_table(metrics: Metrics) -> Table:
    """The headlines, the test split first."""
    rows = [
        (
            SPLIT_NAMES.get(split, split),
            KINDS.get(kind, kind),
            count(scores["images"]) if "images" in scores else MISSING,
            *(score(scores, key) for key, _ in HEADLINES),
        )
        for split, by_kind in sorted(metrics.items(), key=lambda item: item[0] != "test")
        for kind, scores in by_kind.items()
    ]
    columns = ("split", "kind of image", "images", *(title for _, title in HEADLINES))
    return Table("Scores, mean over images", columns, rows, words=frozenset({1}))


def all_scores_table(metrics: Metrics) -> Table:
    """Every metric over all images of each split."""
    splits = list(metrics)
    overall = {split: metrics[split].get("all", {}) for split in splits}
    keys = list(dict.fromkeys(key for scores in overall.values() for key in scores))
    rows = [(key, *(_value(overall[split], key) for split in splits)) for key in keys]
    columns = ("metric", *(SPLIT_NAMES.get(split, split) for split in splits))
    return Table("Every metric, over all images of a split", columns, rows)


def failure_table(by_kind: Mapping[str, Mapping[str, float]]) -> Table | None:
    """Mistakes by kind of image, and how many nuclei are found by their diameter; None if that was not counted."""
    present = [scores for scores in by_kind.values() if scores]
    mistakes = {key: title for key, title in _MISTAKES.items() if any(key in scores for scores in present)}
    diameters = {key: title for key, title in _BY_DIAMETER.items() if any(key in scores for scores in present)}
    if not mistakes and not diameters:
        return None
    rows = [
        (
            KINDS.get(kind, kind),
            count(scores["nuclei_true"]) if "nuclei_true" in scores else MISSING,
            *(_with_part(scores, key) for key in mistakes),
            *(f"{scores[key]:.0%}" if key in scores else MISSING for key in diameters),
        )
        for kind, scores in by_kind.items()
    ]
    columns = ("kind of image", "nuclei", *mistakes.values(), *(f"found, {title}" for title in diameters.values()))
    return Table("Mistakes by kind of image, and nuclei found by diameter", columns, rows)


def found_of(scores: Mapping[str, float]) -> tuple[int, int, int] | None:
    """Nuclei found at IoU 0.5, how many there are, and how many were predicted; None if that is not known.

    F1 is 2 * found / (there + predicted), so it gives the number found.
    """
    if not {"nuclei_true", "nuclei_predicted", "pooled_f1_50"} <= scores.keys():
        return None
    true, predicted = round(scores["nuclei_true"]), round(scores["nuclei_predicted"])
    return round(scores["pooled_f1_50"] * (true + predicted) / 2), true, predicted


def _with_part(scores: Mapping[str, float], key: str) -> str:
    if key not in scores:
        return MISSING
    nuclei = scores.get("nuclei_true", 0)
    return count(scores[key]) + (f" ({scores[key] / nuclei:.0%})" if nuclei else "")


def _value(scores: Mapping[str, float], key: str) -> str:
    if key not in scores:
        return MISSING
    value = scores[key]
    return count(value) if value.is_integer() and value > 1 else f"{value:.4f}"


_MOST_LEFT_OUT = 100


def dataset_facts(record: RunRecord, dataset: DatasetManifest) -> list[tuple[str, str]]:
    """Term and text."""
    diameter = record.nucleus_diameter
    return [
        ("Dataset", record.dataset),
        ("Made from", f"{dataset.source} (layout {dataset.layout}, seed {dataset.seed})"),
        ("Imported", date_of(dataset.created)),
        (
            "Images",
            f"{count(len(dataset.samples))}, with {count(sum(sample.nuclei for sample in dataset.samples))} nuclei",
        ),
        (
            "Diameter of nuclei",
            "not known" if diameter is None else f"{diameter:.1f} px in the middle (validation split)",
        ),
        ("Removed duplicates", plural(len(dataset.duplicates), "image")),
        ("Left out", plural(len(dataset.left_out), "image")),
    ]


def splits_table(dataset: DatasetManifest) -> Table:
    """Counts by split."""
    rows = []
    for split in SPLITS:
        samples, shards = dataset.split_samples(split), dataset.split_shards(split)
        rows.append(
            (
                SPLIT_NAMES[split],
                count(len(samples)),
                count(len({sample.group for sample in samples})),
                *(count(sum(sample.kind == kind for sample in samples)) for kind in Kind),
                count(sum(sample.nuclei for sample in samples)),
                f"{sum(sample.height * sample.width for sample in samples) / 1e6:,.1f}",
                count(len(shards)),
                f"{sum(shard.size for shard in shards) / 1e6:,.1f}",
            )
        )
    kinds = (KINDS[kind] for kind in Kind)
    columns = ("split", "images", "groups", *kinds, "nuclei", "megapixels", "shards", "MB in the bucket")
    return Table("The splits", columns, rows)


def left_out_tables(dataset: DatasetManifest) -> list[Table]:
    """Images of the source that are not in the dataset."""
    lists = (("Duplicates that were removed", dataset.duplicates), ("Images that were left out", dataset.left_out))
    return [_left_out(caption, items) for caption, items in lists if items]


def _left_out(caption: str, items: Sequence[LeftOut]) -> Table:
    if len(items) > _MOST_LEFT_OUT:
        caption += f" (the first {_MOST_LEFT_OUT} of {count(len(items))})"
    rows = [(item.title, item.reason) for item in items[:_MOST_LEFT_OUT]]
    return Table(caption, ("image", "reason"), rows, words=frozenset({1}))


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
