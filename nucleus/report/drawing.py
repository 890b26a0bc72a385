"""Tables and figures of the report: rows of text, and matplotlib figures as SVG in the colours of the page."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from xml.etree import ElementTree

from nucleus.lazy import need
from nucleus.surroundings import provide_folders
from nucleus.text import plain

__all__ = ["GRID", "SERIES", "TEXT", "Panel", "Table", "svg_of", "thinned"]

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
    "font.size": 10,
    "font.family": ["DejaVu Sans"],
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.6,
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
        figure = Figure(figsize=panel.size, layout="tight")
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
