"""Tables and figures: rows of text, matplotlib figures as SVG in the colours of the report, and the curves of runs."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, TypeVar
from xml.etree import ElementTree

import numpy as np

from nucleus.lazy import need
from nucleus.runs.comparison import ComparedRun
from nucleus.surroundings import provide_folders
from nucleus.text import plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GRID", "SERIES", "TEXT", "Panel", "Table", "draw_curves", "encode_figure", "svg_of", "thinned"]

Item = TypeVar("Item")

_MOST_ROWS = 200
TEXT = "#1b1f24"
GRID = "#d0d7de"
SERIES = ("#0060a8", "#c04a00", "#007a55", "#a03a78", "#8a6200", "#4a4a9c")
"""Okabe and Ito's hues (https://jfly.uni-koeln.de/color/), darkened to a contrast of at least 4.5:1 on white. Lines
also differ in dashes and markers."""

# The CSS variable of each colour; `page.css` defines them for light and for dark.
_VARIABLES = {
    TEXT: "currentColor",
    GRID: "var(--grid)",
    "#ffffff": "var(--ground)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)},
}
_NAMESPACE = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_STYLE: dict[str, Any] = {
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "font.size": 11.5,
    "font.family": ["DejaVu Sans"],
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.handlelength": 2.2,
    "legend.handletextpad": 0.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "patch.linewidth": 1,
    "svg.fonttype": "none",
    "svg.hashsalt": "nucleus",
    "text.color": TEXT,
    "text.parse_math": False,  # a $ in a name is not mathematics
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}

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


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        caption: Title of the table.
        columns: Titles of the columns.
        rows: Cells as text.
        words: Indices of the columns after the first that hold text; the others hold numbers.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = field(default_factory=frozenset)


def thinned(items: Sequence[Item], most: int = _MOST_ROWS) -> list[Item]:
    """Return at most `most` of the items, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


@dataclass(frozen=True)
class Panel:
    """A figure with a text description for screen readers.

    Attributes:
        key: Prefix of the ids in the figure, unique on the page.
        title: A few words.
        description: What the figure shows, with its most important numbers.
        draw: Function that draws the figure on matplotlib axes.
        table: Numbers of the figure, if it has any.
        size: Width and height in inches of 72 px.
    """

    key: str
    title: str
    description: str
    draw: Callable[[Any], None]
    table: Table | None = None
    size: tuple[float, float] = (4.2, 2.9)


def svg_of(panel: Panel) -> str:
    """Return the panel as an `svg` element for the page.

    The element has no inline styles, which the Content-Security-Policy of the page forbids. Its ids begin with the key
    of the panel, its text is in the font of the page, and its colours are the CSS variables of the page.
    """
    provide_folders()  # Matplotlib writes to the home folder
    need("matplotlib")
    from matplotlib.figure import Figure  # noqa: PLC0415

    written = io.StringIO()
    with _style():
        figure = Figure(figsize=panel.size, layout="constrained")
        panel.draw(figure.subplots())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    drawn = ElementTree.fromstring(written.getvalue())  # noqa: S314 # nosec B314 - written by matplotlib
    for parent in drawn.iter():
        for child in list(parent):
            if child.tag in {f"{{{_NAMESPACE}}}style", f"{{{_NAMESPACE}}}metadata"}:
                parent.remove(child)
    _keep_ids(drawn)
    for element in drawn.iter():
        _adapt(element, panel.key)
    for name in ("width", "height", "version"):
        drawn.attrib.pop(name, None)
    _describe(drawn, panel)
    ElementTree.register_namespace("", _NAMESPACE)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(drawn, encoding="unicode")


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context  # noqa: PLC0415

    with rc_context(_STYLE):
        yield


def _keep_ids(drawn: Any) -> None:
    """Keep each id that is referenced, once: matplotlib defines a marker for a line and again for its legend."""
    texts = [value for element in drawn.iter() for name, value in element.attrib.items() if name != "id"]
    wanted = {match for text in texts for match in _REFERENCE.findall(text)}
    wanted |= {element.get(_LINK)[1:] for element in drawn.iter() if _LINK in element.attrib}
    for element in drawn.iter():
        name = element.attrib.pop("id", None)
        if name in wanted:
            wanted.remove(name)
            element.set("id", name)


def _adapt(element: Any, key: str) -> None:
    """Turn an element's `style` into attributes and its colours into CSS variables; prefix its ids with the key."""
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name and name != "font-family":
            element.set(name, value)
    for name in ("fill", "stroke"):
        colour = element.get(name)
        if colour is not None:
            element.set(name, _VARIABLES.get(colour, colour))
    if element.tag == f"{{{_NAMESPACE}}}text" and element.get("fill") is None:
        element.set("fill", "currentColor")
    if "id" in element.attrib:
        element.set("id", f"{key}-{element.get('id')}")
    if _LINK in element.attrib:
        element.set(_LINK, f"#{key}-{element.get(_LINK)[1:]}")
    for name, value in element.attrib.items():
        element.set(name, _REFERENCE.sub(rf"url(#{key}-\1)", value))


def _describe(drawn: Any, panel: Panel) -> None:
    """Add a title and a description as the first elements of the picture."""
    parts = []
    for place, (tag, text) in enumerate((("title", panel.title), ("desc", panel.description))):
        part = ElementTree.Element(f"{{{_NAMESPACE}}}{tag}", {"id": f"{panel.key}-{tag}"})
        part.text = plain(text)
        drawn.insert(place, part)
        parts.append(part.get("id"))
    drawn.set("role", "img")
    drawn.set("aria-labelledby", str(parts[0]))
    drawn.set("aria-describedby", str(parts[1]))


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
