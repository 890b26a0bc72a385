"""AP of the test split over the IoU thresholds, by kind of image and beside published figures."""

from collections.abc import Mapping
from typing import Any

from nucleus.metrics import matching
from nucleus.report.drawing import SERIES, Panel
from nucleus.report.published import published_systems
from nucleus.report.tables import Table
from nucleus.report.wording import KINDS, count, score

__all__ = ["THRESHOLDS", "precision_panels"]

THRESHOLDS = tuple(round(100 * threshold) for threshold in matching.THRESHOLDS)
"""IoU thresholds, in hundredths."""

_COMPARED = "dark-field"
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKS = ("o", "s", "^", "D")


_SIZE = (4.2, 3.6)
"""Inches of 72 px, with the legend."""


def precision_panels(by_kind: Mapping[str, Mapping[str, float]], split: str) -> list[Panel]:
    """Two figures, or fewer if the scores for them are not there.

    Args:
        by_kind: Scores of a split by kind of image.
        split: Its name.
    """
    curves = {
        kind: [scores[f"ap_{threshold}"] for threshold in THRESHOLDS]
        for kind, scores in by_kind.items()
        if all(f"ap_{threshold}" in scores for threshold in THRESHOLDS) and kind in KINDS
    }
    panels = []
    if curves:
        panels.append(_by_kind(curves, by_kind, split))
    if _COMPARED in curves:
        panels.append(_beside_published(curves[_COMPARED], split))
    return panels


def _by_kind(curves: dict[str, list[float]], by_kind: Mapping[str, Mapping[str, float]], split: str) -> Panel:
    def draw(axes: Any) -> None:
        for number, (kind, values) in enumerate(curves.items()):
            label = f"{KINDS[kind]}, {count(by_kind[kind].get('images', 0))}"
            axes.plot(
                _places(), values, label=label, color=SERIES[number], linestyle=_DASHES[number], marker=_MARKS[number]
            )
        _frame(axes)

    said = "; ".join(
        f"{KINDS[kind]} {values[0]:.3f} at .50, {values[4]:.3f} at .70, {values[8]:.3f} at .90"
        for kind, values in curves.items()
    )
    rows = [
        (f"{threshold / 100:.2f}", *(score(by_kind[kind], f"ap_{threshold}") for kind in curves))
        for threshold in THRESHOLDS
    ]
    table = Table(f"AP by IoU threshold, {split} split", ("IoU threshold", *(KINDS[kind] for kind in curves)), rows)
    description = f"AP falls as the IoU threshold rises from 0.50 to 0.95: {said}."
    return Panel("ap-kinds", "AP by kind of image", description, draw, table, _SIZE)


def _beside_published(ours: list[float], split: str) -> Panel:
    systems = [system for system in published_systems() if system.kind == _COMPARED and system.ap]

    def draw(axes: Any) -> None:
        axes.plot(_places(), ours, label=f"this run, {split} split", color=SERIES[0], marker=_MARKS[0])
        for number, system in enumerate(systems, start=1):
            places = [int(threshold) / 100 for threshold in system.ap]
            axes.plot(
                places, list(system.ap.values()), label=f"{system.name} (published)", color=SERIES[number],
                linestyle="none", marker=_MARKS[number], markersize=8, markerfacecolor="none", markeredgewidth=2,
            )  # fmt: skip
        _frame(axes)

    said = "; ".join(
        f"{system.name} {', '.join(f'{value:.3f} at .{threshold}' for threshold, value in system.ap.items())}"
        for system in systems
    )
    description = f"This run: {ours[0]:.3f} at .50, {ours[4]:.3f} at .70, {ours[8]:.3f} at .90. Published: {said}."
    return Panel("ap-published", "AP on dark-field images, and published figures", description, draw, size=_SIZE)


def _places() -> list[float]:
    return [threshold / 100 for threshold in THRESHOLDS]


def _frame(axes: Any) -> None:
    axes.set(xlabel="IoU threshold", ylabel="AP, mean over images", ylim=(0, 1.02), xlim=(0.48, 0.97))
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.24), borderaxespad=0)  # below: no corner is free of curves
