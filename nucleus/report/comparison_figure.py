"""Comparison figure: the training curves of several runs on one slide."""

import io
from collections.abc import Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from nucleus.lazy import need
from nucleus.runs.comparison import ComparedRun
from nucleus.surroundings import provide_folders
from nucleus.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_curves", "encode_figure"]

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), which colour-blind people can tell apart, without the
# yellow, which is invisible on white. Markers and dashes also distinguish the runs: without colour, and when there are
# more runs than colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
_DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)))
_SIZE, _DPI = (16.0, 9.0), 120
"""Inches and dots per inch: 1920 x 1080 pixels."""
_PANELS = (
    ("loss", "val_loss", "loss"),
    (None, "val_iou", "IoU of the mask"),
    (None, "val_dice", "Dice of the mask"),
    (None, "val_map", "mAP of nuclei"),
    ("learning_rate", None, "learning rate"),
)
"""Metric drawn as a thin line (every epoch), metric drawn as a bold line (validated epochs), and title."""
_LONGEST_NAME = 30
_ENLARGED = 5.0
"""Limit of a panel's height, as a multiple of the range of values in the second half of each run."""
_FEW = 4
"""Up to this many runs, lines and legend are drawn larger."""


def draw_curves(runs: Sequence[ComparedRun]) -> "Figure":
    """Draw loss, validation IoU, Dice and mAP, and learning rate by epoch; return the figure.

    The training loss is thin, the validation loss bold. Epochs count from 1. If the values of the first epochs are far
    from the later ones, the axis is cut to keep the later differences visible. The legend marks runs without a history.
    """
    provide_folders()  # Matplotlib writes to the home folder
    need("matplotlib")
    from matplotlib.figure import Figure  # noqa: PLC0415  matplotlib is slow to import

    figure = Figure(figsize=_SIZE, layout="constrained")
    styles = _styles(len(runs))
    *panels, corner = figure.subplots(2, 3).flat
    for axes, (thin, bold, title) in zip(panels, _PANELS, strict=True):
        for run, style in zip(runs, styles, strict=True):
            if thin:
                _line(axes, run, thin, style, bold=bold is None)
            if bold:
                _line(axes, run, bold, style, bold=True)
        _finish(axes, title, max((len(run.history) for run in runs), default=0))
        if bold:
            _enlarge(axes)
    _legend(corner, runs, styles)
    return figure


def encode_figure(figure: "Figure") -> bytes:
    """Return a figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI)
    return picture.getvalue()


def _styles(count: int) -> list[dict[str, Any]]:
    width, marker_size = (2.6, 7) if count <= _FEW else (1.9, 6)
    colours = islice(cycle(_COLOURS), count)
    markers = islice(cycle(_MARKERS), count)
    return [
        {
            "color": colour,
            "marker": marker,
            "markersize": marker_size,
            "linewidth": width,
            "linestyle": _DASHES[place // len(_COLOURS) % len(_DASHES)],
        }
        for place, (colour, marker) in enumerate(zip(colours, markers, strict=True))
    ]


def _line(axes: "Axes", run: ComparedRun, metric: str, style: dict[str, Any], *, bold: bool) -> None:
    known = [entry for entry in run.history if metric in entry]
    if not known:
        return
    epochs = [entry["epoch"] for entry in known]
    look: dict[str, Any] = {**style, "markevery": max(1, len(known) // 10)}
    if not bold:
        look |= {"linewidth": 0.9, "marker": "." if len(known) == 1 else "", "alpha": 0.8}
    axes.plot(epochs, [entry[metric] for entry in known], label=run.name, gid=metric, **look)


def _finish(axes: "Axes", title: str, epochs: int) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axes.set_title(title, fontsize=18, loc="left")
    axes.set_xlabel("epoch", fontsize=15)
    axes.tick_params(labelsize=14)
    axes.set_xlim(0, 1.02 * max(1, epochs))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _enlarge(axes: "Axes") -> None:
    """Limit the y-axis to `_ENLARGED` times the range of values in the second half of each run."""
    values = [np.asarray(line.get_ydata(), float).tolist() for line in axes.get_lines()]
    later = [value for line in values for value in line[len(line) // 2 :]]
    if not later:
        return
    low, high = min(later), max(later)
    room = (_ENLARGED - 1) * (high - low)
    if room <= 0:
        return
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - room), min(top, high + room))


def _legend(axes: "Axes", runs: Sequence[ComparedRun], styles: Sequence[dict[str, Any]]) -> None:
    """Draw the legend, a line and a name per run, in a separate panel."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    axes.set_axis_off()
    lines = []
    for place, (run, style) in enumerate(zip(runs, styles, strict=True)):
        remark = "" if run.history else " (no history)"
        name = short(run.name, _LONGEST_NAME - len(remark))
        lines.append(Line2D([], [], label=f"{chr(ord('A') + place)}  {name}{remark}", **style))
    lines.append(Line2D([], [], linewidth=2.6, color="grey", label="bold: validation; learning rate"))
    lines.append(Line2D([], [], linewidth=0.9, color="grey", label="thin: training"))
    size = 15 if len(runs) <= _FEW else 13
    legend = axes.legend(handles=lines, loc="upper left", fontsize=size, frameon=False, borderaxespad=0, handlelength=3)
    legend.set_in_layout(False)  # long names must not shrink the curves
