"""Tables of the final scores: by split and kind of image, and where the model fails."""

from collections.abc import Mapping

from nucleus.metrics.headlines import HEADLINES
from nucleus.report.dataset_figures import SPLIT_NAMES
from nucleus.report.tables import Table
from nucleus.report.wording import KINDS, MISSING, count, score

__all__ = ["Metrics", "all_scores_table", "failure_table", "found_of", "scores_table"]

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
