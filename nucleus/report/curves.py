"""The curves of a run: each metric over the epochs, on the training and on the validation split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nucleus.report.drawing import SERIES, TEXT, Panel
from nucleus.report.tables import Table, thinned
from nucleus.report.wording import MISSING, count

__all__ = ["curve_panels", "history_table"]

History = Sequence[Mapping[str, float]]

_MOST_MARKED = 40
"""Longer lines have no mark on each point."""


@dataclass(frozen=True)
class _Line:
    """A line of a figure: the key in the history, and its name."""

    key: str
    name: str


@dataclass(frozen=True)
class _Curve:
    """A figure: what it is called, its lines, how its values are written, and whether the axis begins at 0."""

    key: str
    title: str
    lines: tuple[_Line, ...]
    written: Callable[[float], str] = "{:.3f}".format
    unit: str = ""
    from_zero: bool = False


def _of_both(key: str) -> tuple[_Line, _Line]:
    return _Line(key, "training"), _Line(f"val_{key}", "validation")


_CURVES = (
    _Curve("loss", "Loss", _of_both("loss")),
    _Curve("iou", "IoU of the mask", _of_both("iou")),
    _Curve("dice", "Dice of the mask", _of_both("dice")),
    _Curve("accuracy", "Accuracy of the mask's pixels", _of_both("accuracy")),
    _Curve(
        "ap",
        "AP of nuclei, validation",
        (_Line("val_ap_50", "AP.5"), _Line("val_map", "mAP"), _Line("val_ap_70", "AP.7"), _Line("val_ap_90", "AP.9")),
    ),
    _Curve("rate", "Learning rate", (_Line("learning_rate", "learning rate"),), written="{:.2g}".format),
    _Curve(
        "speed",
        "Speed of training",
        (
            _Line("images_per_second", "all workers"),
            _Line("images_per_second_per_worker", "one worker"),
        ),
        written="{:.1f}".format,
        unit="images/s",
        from_zero=True,
    ),
)
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKS = ("o", "s", "^", "D")


def curve_panels(history: History, best_epoch: int) -> list[Panel]:
    """A figure for each metric that the history has.

    Args:
        history: The metrics of each epoch; `epoch` counts from 0.
        best_epoch: The one (from 0) whose weights were kept.
    """
    panels = []
    for curve in _CURVES:
        lines = [(line, points) for line in curve.lines if (points := _points(history, line.key))]
        if len(lines) == 2 and lines[0][1] == lines[1][1]:  # one worker is all workers
            lines = lines[:1]
        if lines:
            panels.append(_panel(curve, lines, best_epoch))
    return panels


def history_table(history: History) -> Table:
    """The numbers of all curves, epoch by epoch; of long runs some epochs, evenly spread."""
    lines = [
        (f"{curve.title}: {line.name}" if len(curve.lines) > 1 else curve.title, line.key, curve.written)
        for curve in _CURVES
        for line in curve.lines
        if any(line.key in entry for entry in history)
    ]
    rows = [
        (
            count(entry["epoch"] + 1),
            *(written(entry[key]) if key in entry else MISSING for _, key, written in lines),
        )
        for entry in history
        if "epoch" in entry
    ]
    shown = thinned(rows)
    caption = "Metrics by epoch" + (
        f" ({count(len(shown))} of {count(len(rows))} epochs)" if len(shown) < len(rows) else ""
    )
    return Table(caption, ("epoch", *(title for title, _, _ in lines)), shown)


def _points(history: History, key: str) -> list[tuple[float, float]]:
    """Epochs, counted from 1, and values."""
    return [(entry["epoch"] + 1, entry[key]) for entry in history if key in entry and "epoch" in entry]


def _panel(curve: _Curve, lines: list[tuple[_Line, list[tuple[float, float]]]], best_epoch: int) -> Panel:
    def draw(axes: Any) -> None:
        for line, points in lines:
            style = curve.lines.index(line)
            axes.plot(
                *zip(*points, strict=True),
                label=line.name,
                color=SERIES[style],
                linestyle=_DASHES[style],
                marker=_MARKS[style] if len(points) <= _MOST_MARKED else None,
            )
        axes.axvline(best_epoch + 1, color=TEXT, linewidth=1, linestyle=(0, (1, 3)), label="best weights")
        axes.set_xlabel("epoch")
        axes.set_ylabel(curve.unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.5g}")
        if curve.from_zero:
            axes.set_ylim(bottom=0)
        # Below: a curve may go anywhere inside.
        axes.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.2), ncols=3, columnspacing=1)

    said = [
        f"{line.name} from {curve.written(points[0][1])} at epoch {count(points[0][0])} "
        f"to {curve.written(points[-1][1])} at epoch {count(points[-1][0])}"
        for line, points in lines
    ]
    description = f"{curve.title} by epoch: {'; '.join(said)}. The best weights are those of epoch {best_epoch + 1}."
    return Panel(f"curve-{curve.key}", curve.title, description, draw)
