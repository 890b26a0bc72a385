"""Curves of AP over nucleus diameter and over changes of the image, for docs/models.md.

`python -m tests.benchmarks.curves --data DATA --out DIR MODEL[,KEY=VALUE...] ...`: MODEL is a folder that
`nucleus models pull` made, KEY=VALUE an option of `PredictionOptions`, such as `diameter=20` or `turns=true`. DATA is a
dataset (NAME[@VERSION], with `--split`), or a folder or zip of images with masks. Writes curves.json, curves.md and
curves.png. `--with FILE.json` adds the lines of an earlier run on the same images, `--axes` chooses axes.
"""

import argparse
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nucleus.config.names import Kind
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import locate_dataset, open_dataset
from nucleus.data.images import LabelImage, kind_of
from nucleus.data.intake import read_items, read_source
from nucleus.data.reader import LabelledImage, images_of_split
from nucleus.data.shards import decode_record
from nucleus.errors import DataError, UsageError
from nucleus.metrics.nuclei import match_nuclei
from nucleus.predict.model import Model, PredictionOptions, load_model_folder
from nucleus.progress import no_progress
from nucleus.report.drawing import GRID, SERIES, TEXT, encode_figure
from nucleus.storage.files import temporary_folder, write_atomic
from tests.benchmarks.changes import AXES, DIAMETERS, busiest_crop, median_diameter, resampled

_SIDE = 512
"""Images are cropped to at most this side, px, where they have the most nuclei."""
_LARGEST = 1024
"""Side of the images that nuclei of any diameter are measured on, at most, px."""
_FEWEST = 3
"""Nuclei that an image needs to count."""
_DIAMETER = "diameter"
_TITLES = {_DIAMETER: "median diameter of the nuclei, px", **{name: axis.title for name, axis in AXES.items()}}
_DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P")

Scores = dict[str, float]
Example = tuple[Kind, Any, LabelImage]


@dataclass(frozen=True)
class Line:
    """A model with the options that it predicts with; both are its name."""

    name: str
    model: Model


def line_of(text: str) -> Line:
    """Load `MODEL[,KEY=VALUE...]`."""
    folder, *settings = text.split(",")
    options = options_of(settings)
    name = ", ".join([Path(folder).name, *settings])
    return Line(name, load_model_folder(Path(folder), PredictionOptions(**options)))


def options_of(settings: Iterable[str]) -> dict[str, Any]:
    """Parse options of `PredictionOptions`; a value is JSON, or else text."""
    known = [field.name for field in fields(PredictionOptions)]
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in known or not equals:
            raise UsageError(f"Expected KEY=VALUE with a key out of {', '.join(known)}; found {setting!r}.")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def read_images(data: str, split: str) -> list[LabelledImage]:
    """Read the images of a split of a dataset, or of a folder or zip."""
    if not Path(data).exists():
        dataset = open_dataset(locate_dataset(data))
        return list(images_of_split(dataset, split, ShardCache()))
    with temporary_folder("curves") as spool:
        found = read_source(Path(data), partial(read_items, spool), no_progress)
        decoded = [(image.title, decode_record(Path(image.record.file).read_bytes())) for image in found.images]
        return [LabelledImage(title, kind_of(image), image, labels) for title, (_, image, labels) in decoded]


def chosen(images: Sequence[LabelledImage], count: int, seed: int) -> list[LabelledImage]:
    """Choose images with enough nuclei: one of each kind in turn, in an order that the seed decides."""
    usable = sorted((image for image in images if image.labels.max() >= _FEWEST), key=lambda image: image.name)
    shuffled = [usable[i] for i in np.random.default_rng(seed).permutation(len(usable))]
    if not shuffled:
        raise DataError(f"Expected images with at least {_FEWEST} nuclei; found none among {len(images)}.")
    turns: dict[Kind, int] = {}
    ranked = []
    for place, image in enumerate(shuffled):
        turns[image.kind] = turns.get(image.kind, 0) + 1
        ranked.append((turns[image.kind], place))
    return [shuffled[place] for _, place in sorted(ranked)[:count]]


def with_diameter(image: LabelledImage, diameter: float) -> Example | None:
    """Resample the part of an image with the most nuclei; None if it then has too few."""
    factor = diameter / median_diameter(image.labels)
    rows, columns = busiest_crop(image.labels, max(1, int(_LARGEST / factor)))
    pixels, labels = resampled(image.image[rows, columns], image.labels[rows, columns], factor)
    return (image.kind, pixels, labels) if np.unique(labels[labels > 0]).size >= _FEWEST else None


def with_change(image: LabelledImage, axis: str, strength: float | None, seed: int) -> Example:
    """Change the part of an image with the most nuclei; without a strength, leave it as it is."""
    window = busiest_crop(image.labels, _SIDE)
    pixels, labels = np.ascontiguousarray(image.image[window]), np.ascontiguousarray(image.labels[window])
    if strength is None:
        return image.kind, pixels, labels
    return image.kind, AXES[axis].change(pixels, strength, zlib.crc32(f"{seed} {image.name}".encode())), labels


def examples(
    images: Sequence[LabelledImage], axes: Sequence[str], seed: int
) -> Iterator[tuple[str, Any, list[Example]]]:
    """Yield axis, strength (None: as they are) and the changed images."""
    for axis in axes:
        if axis == _DIAMETER:
            for diameter in DIAMETERS:
                found = (with_diameter(image, diameter) for image in images)
                yield axis, diameter, [item for item in found if item is not None]
            continue
        fitting = [image for image in images if image.kind in AXES[axis].kinds]
        for strength in (None, *AXES[axis].strengths):
            yield axis, strength, [with_change(image, axis, strength, seed) for image in fitting]


def scores_of(model: Model, items: Sequence[Example]) -> dict[str, Scores]:
    """AP at IoU .5 and mAP, means over all images and over those of each kind."""
    rows = [(kind, match_nuclei(truth, model.segment(pixels).labels)) for kind, pixels, truth in items]
    groups = {"all": rows, **{kind.value: [row for row in rows if row[0] == kind] for kind in Kind}}
    return {
        name: {
            "images": len(members),
            "ap_50": round(float(np.mean([found.ap[0] for _, found in members])), 4),
            "map": round(float(np.mean([found.mean_ap for _, found in members])), 4),
        }
        for name, members in groups.items()
        if members
    }


def curves(
    lines: Sequence[Line], images: Sequence[LabelledImage], axes: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Score every line at every point; a dictionary a point and line. Points without images are left out."""
    found = []
    for axis, strength, items in examples(images, axes, seed):
        for line in lines if items else ():
            found.append(
                {"line": line.name, "axis": axis, "strength": strength, "scores": scores_of(line.model, items)}
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def table(points: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a row a point, two columns a line."""
    lines = list(dict.fromkeys(point["line"] for point in points))
    head = ["change", "images", *(f"{line}: {score}" for line in lines for score in ("AP.5", "mAP"))]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for axis, strength in dict.fromkeys((point["axis"], point["strength"]) for point in points):
        here = {p["line"]: p["scores"]["all"] for p in points if (p["axis"], p["strength"]) == (axis, strength)}
        of_lines = [f"{here[line][key]:.3f}" if line in here else "" for line in lines for key in ("ap_50", "map")]
        named = "as they are" if strength is None else f"{strength:g}"
        rows.append([f"{_TITLES[axis]}: {named}", str(max(of["images"] for of in here.values())), *of_lines])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(points: Sequence[dict[str, Any]]) -> bytes:
    """A PNG with a panel for each axis: AP at IoU .5 as lines with marks, mAP thin and without."""
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(point["axis"] for point in points))
    lines = list(dict.fromkeys(point["line"] for point in points))
    across = min(3, len(axes))
    down = -(-len(axes) // across)
    figure = Figure(figsize=(4.6 * across, 3.1 * down + 0.5), layout="constrained")
    for panel, axis in zip(figure.subplots(down, across, squeeze=False).flat, axes, strict=False):
        _panel(panel, axis, [point for point in points if point["axis"] == axis], lines)
    for panel in list(figure.axes)[len(axes) :]:
        panel.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=across, frameon=False)
    return encode_figure(figure)


def _panel(panel: Any, axis: str, points: Sequence[dict[str, Any]], lines: Sequence[str]) -> None:
    strengths = list(dict.fromkeys(point["strength"] for point in points))
    places = strengths if axis == _DIAMETER else list(range(len(strengths)))
    for number, line in enumerate(lines):
        scores = {point["strength"]: point["scores"]["all"] for point in points if point["line"] == line}
        known = [(place, scores[s]) for place, s in zip(places, strengths, strict=True) if s in scores]
        look = {"color": SERIES[number % len(SERIES)], "linestyle": _DASHES[number % len(_DASHES)]}
        marker = _MARKERS[number % len(_MARKERS)]
        at = [place for place, _ in known]
        panel.plot(at, [of["ap_50"] for _, of in known], label=f"{line}: AP.5", marker=marker, markersize=5, **look)
        panel.plot(at, [of["map"] for _, of in known], label=f"{line}: mAP", linewidth=0.9, **look)
    if axis == _DIAMETER:
        panel.set_xscale("log")
        panel.minorticks_off()
    panel.set_xticks(
        places, ["as is" if s is None else f"{s:g}" for s in strengths], rotation=60 if axis == _DIAMETER else 0
    )
    panel.set_ylim(0, 1)
    panel.set_xlabel(_TITLES[axis], color=TEXT)
    panel.grid(color=GRID, linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL[,KEY=VALUE...]")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--axes", nargs="+", choices=[_DIAMETER, *AXES], default=[_DIAMETER, *AXES])
    parser.add_argument("--with", dest="earlier", type=Path, action="append", default=[], metavar="FILE.json")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    images = chosen(read_images(given.data, given.split), given.images, given.seed)
    facts = {"data": given.data, "split": given.split, "seed": given.seed, "images": [image.name for image in images]}
    points = [*_earlier(given.earlier, facts["images"])]
    points += curves([line_of(text) for text in given.models], images, given.axes, given.seed)
    write_atomic(given.out / "curves.json", json.dumps({**facts, "points": points}, indent=1) + "\n")
    write_atomic(given.out / "curves.md", table(points))
    write_atomic(given.out / "curves.png", draw(points))


def _earlier(files: Sequence[Path], images: Any) -> Iterator[dict[str, Any]]:
    for file in files:
        content = json.loads(file.read_text())
        if content["images"] != images:
            raise UsageError(f"Expected curves of the same images in {file}; found others. Use its --data and --seed.")
        yield from content["points"]


if __name__ == "__main__":
    main()
