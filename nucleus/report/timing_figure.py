"""Where the time of a run went."""

from collections.abc import Sequence
from typing import Any

from nucleus.report.drawing import SERIES, Panel
from nucleus.report.record import Stage
from nucleus.report.tables import Table
from nucleus.report.wording import duration, short

__all__ = ["timing_panel"]


def timing_panel(stages: Sequence[Stage]) -> Panel:
    """Bars of the stages' times, in order."""
    names = [short(stage.name, 36) for stage in stages]
    seconds = [stage.seconds for stage in stages]

    def draw(axes: Any) -> None:
        places = range(len(stages))
        axes.barh(places, seconds, color=SERIES[0], height=0.6)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.22 * max([*seconds, 1e-9]))
        axes.set_xlabel("seconds")
        axes.grid(visible=False, axis="y")
        for place, value in enumerate(seconds):
            axes.annotate(
                duration(value), (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
            )

    total = sum(seconds)
    rows = [(stage.name, duration(stage.seconds), f"{stage.seconds / total:.1%}" if total else "–") for stage in stages]
    rows.append(("all stages", duration(total), "100.0%" if total else "–"))
    longest = max(stages, key=lambda stage: stage.seconds, default=None)
    description = f"Time by stage, {duration(total)} in all" + (
        f"; the longest is {longest.name} with {duration(longest.seconds)}." if longest else "."
    )
    table = Table("Time by stage", ("stage", "time", "part"), rows)
    return Panel("timing", "Time by stage", description, draw, table, (6.2, 0.9 + 0.42 * max(len(stages), 1)))
