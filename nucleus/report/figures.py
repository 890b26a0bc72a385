"""Figures of the report: curves by epoch, the dataset, AP by IoU threshold, and time by stage."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nucleus.config.names import Kind
from nucleus.data.dataset import DatasetManifest
from nucleus.data.samples import SPLITS
from nucleus.metrics import nuclei as matching
from nucleus.metrics.scores import Scores
from nucleus.report.drawing import GRID, SERIES, TEXT, Panel, Table, thinned
from nucleus.report.tables import published_systems
from nucleus.runs.record import Stage
from nucleus.text import KINDS, MISSING, SPLIT_NAMES, count, percent, plural, score_text, short, time_text

__all__ = [
    "THRESHOLDS",
    "curve_panels",
    "dataset_panels",
    "history_table",
    "precision_panels",
    "timing_panel",
]

History = Sequence[Mapping[str, float]]

THRESHOLDS = tuple(round(100 * threshold) for threshold in matching.THRESHOLDS)
"""IoU thresholds, in hundredths."""
_COMPARED = "dark-field"
"""Kind of image on which published scores are compared."""
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKS = ("o", "s", "^", "D", "v", "P")
_MOST_MARKED = 40
"""Lines with more points have no markers."""
_BINS = (0, 1, 11, 31, 101)
"""Smallest number of nuclei in an image of each bin."""
_HATCHES = {Kind.DARK_FIELD: "", Kind.BRIGHT_FIELD: "///", Kind.STAIN: "..."}
_SIZE = (5.6, 4.9)
"""Size of the AP figures with their legends, in inches of 72 px."""


@dataclass(frozen=True)
class _Line:
    """A line of a figure: its key in the history and its name in the legend."""

    key: str
    name: str


@dataclass(frozen=True)
class _Curve:
    """A figure: key, title, lines, number format, unit, and whether the y-axis starts at 0."""

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


def curve_panels(history: History, best_epoch: int) -> list[Panel]:
    """Return a figure for each metric in the history.

    Args:
        history: Metrics of each epoch; `epoch` counts from 1.
        best_epoch: Epoch whose weights were kept, counted from 1.
    """
    panels = []
    epochs = sorted(entry["epoch"] for entry in history if "epoch" in entry)
    for curve in _CURVES:
        lines = [(line, points) for line in curve.lines if (points := _points(history, line.key))]
        if len(lines) == 2 and lines[0][1] == lines[1][1]:  # only one worker
            lines = lines[:1]
        if lines:
            panels.append(_panel(curve, lines, best_epoch, (epochs[0], epochs[-1])))
    return panels


def history_table(history: History) -> Table:
    """Return the numbers of all curves by epoch; for a long run, of evenly spaced epochs."""
    lines = [
        (f"{curve.title}: {line.name}" if len(curve.lines) > 1 else curve.title, line.key, curve.written)
        for curve in _CURVES
        for line in curve.lines
        if any(line.key in entry for entry in history)
    ]
    rows = [
        (
            count(entry["epoch"]),
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
    """Return epochs with their values."""
    return [(entry["epoch"], entry[key]) for entry in history if key in entry and "epoch" in entry]


def _panel(
    curve: _Curve, lines: list[tuple[_Line, list[tuple[float, float]]]], best_epoch: int, epochs: tuple[float, float]
) -> Panel:
    room = max(0.5, 0.04 * (epochs[1] - epochs[0]))

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
        axes.axvline(best_epoch, color=TEXT, linewidth=1, linestyle=(0, (1, 3)), label="best weights")
        axes.set_xlabel("epoch")
        axes.set_ylabel(curve.unit)
        axes.set_xlim(epochs[0] - room, epochs[-1] + room)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.5g}")
        if curve.from_zero:
            axes.set_ylim(bottom=0)
        _legend_below(axes, columns=3)

    said = [
        f"{line.name} from {curve.written(points[0][1])} at epoch {count(points[0][0])} "
        f"to {curve.written(points[-1][1])} at epoch {count(points[-1][0])}"
        for line, points in lines
    ]
    description = f"{curve.title} by epoch: {'; '.join(said)}. The best weights are those of epoch {best_epoch}."
    return Panel(f"curve-{curve.key}", curve.title, description, draw)


def dataset_panels(dataset: DatasetManifest) -> list[Panel]:
    """Return three figures: images by split and kind, by number of nuclei, and by size."""
    return [_images(dataset), _nuclei(dataset), _sizes(dataset)]


def _images(dataset: DatasetManifest) -> Panel:
    by_split = [dataset.split_samples(split).kinds for split in SPLITS]
    counts = {kind: [kinds[kind] for kinds in by_split] for kind in Kind}
    names = [SPLIT_NAMES[split] for split in SPLITS]

    def draw(axes: Any) -> None:
        _stack(axes, names, counts)
        axes.set_ylabel("images")

    totals = [sum(counts[kind][i] for kind in Kind) for i in range(len(SPLITS))]
    said = ", ".join(f"{name} {count(total)}" for name, total in zip(names, totals, strict=True))
    rows = [(name, *(count(counts[kind][i]) for kind in Kind), count(totals[i])) for i, name in enumerate(names)]
    table = Table("Images by split and kind", ("split", *(KINDS[kind] for kind in Kind), "all"), rows)
    return Panel("data-images", "Images by split and kind", f"Images by split: {said}.", draw, table, (4.2, 2.7))


def _nuclei(dataset: DatasetManifest) -> Panel:
    names = [_bin_name(i) for i in range(len(_BINS))]
    counts = {kind: [0] * len(_BINS) for kind in Kind}
    numbers = dataset.samples.column("nuclei").tolist()
    for (kind, number), images in Counter(zip(dataset.samples.texts("kind"), numbers, strict=True)).items():
        counts[Kind(kind)][_bin_of(number)] += images

    def draw(axes: Any) -> None:
        _stack(axes, names, counts)
        axes.set(xlabel="nuclei per image", ylabel="images")

    nuclei = sorted(numbers) or [0]
    description = (
        f"Nuclei per image: from {count(nuclei[0])} to {count(nuclei[-1])}, median {count(nuclei[len(nuclei) // 2])}."
    )
    rows = [(name, *(count(counts[kind][i]) for kind in Kind)) for i, name in enumerate(names)]
    table = Table("Images by number of nuclei", ("nuclei", *(KINDS[kind] for kind in Kind)), rows)
    return Panel("data-nuclei", "Nuclei per image", description, draw, table, (4.2, 2.7))


def _sizes(dataset: DatasetManifest) -> Panel:
    sides = (dataset.samples.column(name).tolist() for name in ("width", "height"))
    sizes = Counter(zip(*sides, strict=True))

    def draw(axes: Any) -> None:
        for (width, height), number in sizes.items():
            axes.plot(width, height, "o", color=SERIES[0], markersize=4 + 2 * number**0.4, markerfacecolor="none",
                      markeredgewidth=1.5)  # fmt: skip
        axes.set(xlabel="width, px", ylabel="height, px")
        axes.set_xlim(0, 1.12 * max((width for width, _ in sizes), default=1))
        axes.set_ylim(0, 1.15 * max((height for _, height in sizes), default=1))

    ordered = sizes.most_common()
    common = "; ".join(f"{plural(number, 'image')} of {w} × {h} px" for (w, h), number in ordered[:3])
    rows = [(f"{width} × {height}", count(number)) for (width, height), number in ordered]
    table = Table("Images by size, width × height in px", ("size", "images"), thinned(rows, 60))
    description = f"{plural(len(sizes), 'size')}; larger circles stand for more images. Most common: {common}."
    return Panel("data-sizes", "Sizes of images", description, draw, table, (4.2, 2.7))


def _stack(axes: Any, names: list[str], counts: dict[Kind, list[int]]) -> None:
    """Draw stacked bars; kinds differ in colour and hatching."""
    below = [0] * len(names)
    for number, (kind, values) in enumerate(counts.items()):
        if any(values):
            axes.bar(names, values, bottom=below, label=KINDS[kind], facecolor=SERIES[number], edgecolor="#ffffff",
                     hatch=_HATCHES[kind], width=0.7)  # fmt: skip
        below = [low + value for low, value in zip(below, values, strict=True)]
    axes.set_ylim(0, 1.7 * max([*below, 1]))
    for place, total in enumerate(below):
        axes.annotate(count(total), (place, total), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=10)
    axes.grid(visible=False, axis="x")
    axes.grid(visible=True, axis="y", color=GRID)
    axes.tick_params(axis="x", labelsize=10)
    if any(below):
        axes.legend(loc="upper right", borderaxespad=0)


def _bin_of(nuclei: int) -> int:
    return max(i for i, fewest in enumerate(_BINS) if nuclei >= fewest)


def _bin_name(place: int) -> str:
    if place == len(_BINS) - 1:
        return f"{_BINS[place]}+"
    last = _BINS[place + 1] - 1
    return f"{last}" if last == _BINS[place] else f"{_BINS[place]}–{last}"


def precision_panels(by_kind: Mapping[str, Scores], split: str, *, published: bool) -> list[Panel]:
    """Return figures of AP by kind of image and of AP beside published scores; none without AP.

    Args:
        by_kind: Scores of a split by kind of image.
        split: Name of the split.
        published: Whether the published scores are of the same collection of images.
    """
    known = {
        kind: [value for threshold in THRESHOLDS if (value := scores.get(f"ap_{threshold}")) is not None]
        for kind, scores in by_kind.items()
        if kind in KINDS
    }
    curves = {kind: values for kind, values in known.items() if len(values) == len(THRESHOLDS)}
    panels = []
    if curves:
        panels.append(_by_kind(curves, by_kind, split))
    if published and _COMPARED in curves:
        panels.append(_beside_published(curves[_COMPARED], split))
    return panels


def _by_kind(curves: dict[str, list[float]], by_kind: Mapping[str, Scores], split: str) -> Panel:
    def draw(axes: Any) -> None:
        for number, (kind, values) in enumerate(curves.items()):
            label = f"{KINDS[kind]}, {count(by_kind[kind].get('images') or 0)}"
            axes.plot(
                _places(), values, label=label, color=SERIES[number], linestyle=_DASHES[number], marker=_MARKS[number]
            )
        _frame(axes)

    said = "; ".join(
        f"{KINDS[kind]} {values[0]:.3f} at .50, {values[4]:.3f} at .70, {values[8]:.3f} at .90"
        for kind, values in curves.items()
    )
    rows = [
        (f"{threshold / 100:.2f}", *(score_text(by_kind[kind][f"ap_{threshold}"], digits=3) for kind in curves))
        for threshold in THRESHOLDS
    ]
    table = Table(f"AP by IoU threshold, {split} split", ("IoU threshold", *(KINDS[kind] for kind in curves)), rows)
    description = f"AP falls as the IoU threshold rises from 0.50 to 0.95: {said}."
    return Panel("ap-kinds", "AP by kind of image", description, draw, table, _SIZE)


def _beside_published(ours: list[float], split: str) -> Panel:
    systems = [system for system in published_systems() if system.kind == _COMPARED and system.ap][: len(SERIES) - 1]

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
    return Panel("ap-published", "AP on dark-field images, and published scores", description, draw, size=_SIZE)


def _legend_below(axes: Any, columns: int) -> None:
    """Draw the legend below the axes and their label: inside, it could cover a curve."""
    axes.get_figure().legend(loc="outside lower left", ncols=columns, columnspacing=1)


def _places() -> list[float]:
    return [threshold / 100 for threshold in THRESHOLDS]


def _frame(axes: Any) -> None:
    axes.set(xlabel="IoU threshold", ylabel="AP, mean over images", ylim=(0, 1.02), xlim=(0.48, 0.97))
    _legend_below(axes, columns=1)


def _validation_row(history: History) -> list[tuple[str, str, str]]:
    """Return the row of a validation: its mean duration, and that as a share of the steps of an epoch."""
    validations = [entry["validation_seconds"] for entry in history if "validation_seconds" in entry]
    epochs = [entry["seconds"] for entry in history if "seconds" in entry]
    if not (validations and epochs):
        return []
    mean = sum(validations) / len(validations)
    share = percent(mean, sum(epochs) / len(epochs))
    return [(f"one validation, mean of {len(validations)}", time_text(mean), f"{share} of the steps of an epoch")]


def timing_panel(stages: Sequence[Stage], history: History = ()) -> Panel:
    """Return a bar chart of the time of each stage, in order; its table says what a validation cost."""
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
                time_text(value), (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10
            )

    total = sum(seconds)
    rows = [(stage.name, time_text(stage.seconds), percent(stage.seconds, total)) for stage in stages]
    rows.append(("all stages", time_text(total), percent(total, total)))
    rows.extend(_validation_row(history))
    longest = max(stages, key=lambda stage: stage.seconds, default=None)
    description = f"Time by stage, {time_text(total)} in all" + (
        f"; the longest is {longest.name} with {time_text(longest.seconds)}." if longest else "."
    )
    table = Table("Time by stage", ("stage", "time", "share"), rows)
    return Panel("timing", "Time by stage", description, draw, table, (6.2, 0.9 + 0.42 * max(len(stages), 1)))
