"""The diagram of the network: down through the encoder, up through the decoder, skips across."""

from typing import Any

from nucleus.report.drawing import PANEL, SERIES, TEXT, Panel
from nucleus.report.record import NetworkFacts
from nucleus.report.tables import Table
from nucleus.report.wording import count, plural, short

__all__ = ["network_panel"]

_BOX_WIDTH = 2.5
_BOX_HEIGHT = 0.62
_STEP = 0.55
"""By how much a level is set inwards from the one above it."""
_GAP = 1.4
"""Between the columns at the lowest level."""
_AROUND = "angle,angleA=0,angleB=90,rad=4"
"""A line that goes across, then up or down."""


def network_panel(network: NetworkFacts) -> Panel:
    """The figure of a U-Net."""
    lowest = len(network.skips)

    def draw(axes: Any) -> None:
        _Diagram(axes, lowest).draw(network)

    skips = ", ".join(f"{channels} channels at {_resolution(i)}" for i, channels in enumerate(network.skips, start=1))
    levels = ", ".join(
        f"{channels} channels at {_resolution(lowest - 1 - i)}" for i, channels in enumerate(network.decoder)
    )
    description = (
        f"A U-Net of {count(network.parameters)} parameters. The image goes down through the encoder "
        f"{network.encoder}: {skips}. From there up through the decoder, which joins what the encoder had at the same "
        f"resolution: {levels}. "
        f"Outputs for each pixel: {', '.join(network.outputs)}."
    )
    return Panel("diagram", "The network", description, draw, _table(network, lowest), (10.0, 5.0))


def _table(network: NetworkFacts, lowest: int) -> Table:
    rows = []
    for level in range(lowest + 1):
        encoder = count(network.skips[level - 1]) if level else "3 (the image)"
        place = lowest - 1 - level
        decoder = count(network.decoder[place]) if 0 <= place < len(network.decoder) else "–"
        rows.append((_resolution(level), encoder, decoder))
    return Table("Channels by resolution", ("resolution", "encoder", "decoder"), rows)


def _resolution(level: int) -> str:
    return "full resolution" if level <= 0 else f"1/{2**level}"


class _Diagram:
    """Draws onto matplotlib's axes; a unit of the height is a level, and 0 the full resolution."""

    def __init__(self, axes: Any, lowest: int) -> None:
        self.axes = axes
        self.lowest = lowest
        self.width = 2 * (_BOX_WIDTH + lowest * _STEP) + _GAP

    def draw(self, network: NetworkFacts) -> None:
        """Draw everything."""
        self.axes.set_axis_off()
        self.axes.set_xlim(-0.9, self.width + 0.9)
        self.axes.set_ylim(-self.lowest - 0.75, 1.35)
        self._box(self._left(0), 0, "image, 3 channels", SERIES[2])
        for level, channels in enumerate(network.skips, start=1):
            self._box(self._left(level), level, plural(channels, "channel"), SERIES[0])
            self._arrow((self._left(level - 1), level - 1), (self._left(level), level), SERIES[0])
        before = (self._left(self.lowest), self.lowest)
        for place, channels in enumerate(network.decoder):
            level = self.lowest - 1 - place
            centre = (self._right(level), level)
            self._box(*centre, plural(channels, "channel"), SERIES[1])
            self._arrow(before, centre, SERIES[1])
            if level >= 0:
                self._skip(level)
            before = centre
        self._words(network)

    def _words(self, network: NetworkFacts) -> None:
        for level in range(self.lowest + 1):
            text = "full" if level == 0 else f"1/{2**level}"
            self.axes.text(-0.85, -level, text, ha="left", va="center", fontsize=10)
        self.axes.text(-0.85, 0.62, "resolution", ha="left", va="center", fontsize=9)
        encoder = f"encoder: {short(network.encoder, 30)}"
        counts = f"{count(network.encoder_parameters)} parameters"
        self.axes.text(self._left(0), 0.95, encoder, ha="center", fontweight="bold", fontsize=11)
        self.axes.text(self._left(0), 0.55, counts, ha="center", fontsize=10)
        decoder = f"{count(network.parameters - network.encoder_parameters)} parameters"
        self.axes.text(self._right(0), 0.95, "decoder", ha="center", fontweight="bold", fontsize=11)
        self.axes.text(self._right(0), 0.55, decoder, ha="center", fontsize=10)
        middle = self.width / 2
        self.axes.text(
            middle, 0.95, f"{count(network.parameters)} parameters", ha="center", fontsize=13, fontweight="bold"
        )
        self.axes.text(
            middle, 0.55, f"{count(network.trained_parameters)} trained at the end", ha="center", fontsize=10
        )
        names = "\n".join(short(name, 20) for name in network.outputs)
        self._outputs()
        out = f"for each pixel:\n{names}"
        self.axes.text(self.width + 0.9, -1.1, out, ha="right", va="top", fontsize=10, linespacing=1.5)

    def _outputs(self) -> None:
        """From the last level to what comes out."""
        first, last = (self._right(0) + _BOX_WIDTH / 2, 0.0), (self.width + 0.55, -1.0)
        self._connect(first, last, SERIES[1], _AROUND, "solid", towards=(0, -1))

    def _left(self, level: int) -> float:
        if level == self.lowest:  # the bottom of the U
            return self.width / 2
        return _BOX_WIDTH / 2 + level * _STEP

    def _right(self, level: int) -> float:
        return self.width - self._left(level)

    def _box(self, x: float, level: float, text: str, colour: str) -> None:
        from matplotlib.patches import FancyBboxPatch  # noqa: PLC0415

        corner = (x - _BOX_WIDTH / 2, -level - _BOX_HEIGHT / 2)
        style = "round,pad=0,rounding_size=0.12"
        self.axes.add_patch(
            FancyBboxPatch(
                corner, _BOX_WIDTH, _BOX_HEIGHT, boxstyle=style, facecolor=PANEL, edgecolor=colour, linewidth=1.8
            )
        )
        self.axes.text(x, -level, text, ha="center", va="center", fontsize=10, color=TEXT)

    def _arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        """From one level to the next: from box to box, or around the corner to and from the bottom."""
        half, wide, down = _BOX_HEIGHT / 2, _BOX_WIDTH / 2, end[1] > start[1]
        if end[1] == self.lowest:
            first, last = (start[0], -start[1] - half), (end[0] - wide, -end[1])
            self._connect(first, last, colour, "angle,angleA=90,angleB=0,rad=4", "solid", towards=(1, 0))
        elif start[1] == self.lowest:
            first, last = (start[0] + wide, -start[1]), (end[0], -end[1] - half)
            self._connect(first, last, colour, _AROUND, "solid", towards=(0, 1))
        else:
            side = -half if down else half
            self._connect((start[0], -start[1] + side), (end[0], -end[1] - side), colour, "arc3", "solid")

    def _skip(self, level: int) -> None:
        first, last = self._left(level) + _BOX_WIDTH / 2, self._right(level) - _BOX_WIDTH / 2
        self._connect((first, -level), (last, -level), TEXT, "arc3", (0, (4, 3)))
        if level == 0:
            self.axes.text((first + last) / 2, 0.08, "3 × 3 convolution", ha="center", va="bottom", fontsize=9)
        elif level == 1:
            self.axes.text((first + last) / 2, -0.92, "skip: the same resolution", ha="center", va="bottom", fontsize=9)

    def _connect(
        self,
        first: tuple[float, float],
        last: tuple[float, float],
        colour: str,
        line: str,
        dash: Any,
        towards: tuple[float, float] | None = None,
    ) -> None:
        # A line that ends where the head begins, and a head: the dashes of one arrow would also break its head.
        shaft = {"arrowstyle": "-", "color": colour, "linewidth": 1.5, "linestyle": dash, "connectionstyle": line}
        self.axes.annotate("", xy=last, xytext=first, arrowprops={**shaft, "shrinkA": 0, "shrinkB": 4})
        direction = towards or (last[0] - first[0], last[1] - first[1])
        length = (direction[0] ** 2 + direction[1] ** 2) ** 0.5 or 1.0
        tail = (last[0] - 0.12 * direction[0] / length, last[1] - 0.12 * direction[1] / length)
        head = {"arrowstyle": "-|>", "facecolor": colour, "edgecolor": colour, "linewidth": 1}
        self.axes.annotate("", xy=last, xytext=tail, arrowprops={**head, "shrinkA": 0, "shrinkB": 0})
