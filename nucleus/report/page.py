"""A page about a trained model: its curves, its metrics and its pictures, in one file that needs no network."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from nucleus.metrics.headlines import HEADLINES
from nucleus.registry.manifest import ModelManifest
from nucleus.storage.files import write_atomic

__all__ = ["write_report"]

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; border-bottom: 1px solid #8888; text-align: right; }
th:first-child, td:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
img { max-width: 100%; height: auto; background: white; }
"""
_CURVES = {
    "mAP": "val_map",
    "AP.5": "val_ap_50",
    "IoU": "val_iou",
    "Dice": "val_dice",
    "pixel accuracy": "val_accuracy",
}


def write_report(path: Path, manifest: ModelManifest, folder: Path, stages: Sequence[tuple[str, float]]) -> None:
    """Write the report of a pulled model.

    Args:
        path: The HTML file.
        manifest: Of the model.
        folder: The pulled model, with `metrics.json` and `preview.png`.
        stages: Name and seconds of each stage of the work.
    """
    origin = manifest.origin
    history = json.loads((folder / "metrics.json").read_text())["history"]
    rows = [
        (
            split,
            kind,
            f"{scores['images']:.0f}",
            *(f"{scores[name]:.4f}" for name, _ in HEADLINES),
        )
        for split, kinds in origin.metrics.items()
        for kind, scores in kinds.items()
    ]
    weights = origin.encoder_weights.source
    warning = "<p><strong>Trained without pretrained encoder weights.</strong></p>" if weights == "none" else ""
    title = html.escape(f"{manifest.model}, version {manifest.version}")
    body = f"""<h1>{title}</h1>
<p>Run {html.escape(origin.run)} on {html.escape(origin.dataset)}; encoder weights: {html.escape(weights)}.</p>{warning}
<h2>Metrics, mean over images</h2>{_table(("split", "kind", "images", *(title for _, title in HEADLINES)), rows)}
<h2>Training</h2>{_picture(_curves(history), "Curves of the loss and of the validation metrics over the epochs")}
<h2>Images that the model has never seen</h2>
<p>Left the image, in the middle the truth, on the right the prediction.</p>
{_picture((folder / "preview.png").read_bytes(), "Test images with true and predicted outlines of nuclei")}
<h2>Time</h2>{_table(("stage", "seconds"), [(name, f"{seconds:.1f}") for name, seconds in stages])}"""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )
    write_atomic(path, page)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _picture(png: bytes, description: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{html.escape(description)}">'


def _curves(history: list[dict[str, float]]) -> bytes:
    """Loss on the left, validation metrics on the right, as PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    validated = [entry for entry in history if "val_loss" in entry]
    epochs = [entry["epoch"] + 1 for entry in validated]
    left.plot([entry["epoch"] + 1 for entry in history], [entry["loss"] for entry in history], label="training")
    left.plot(epochs, [entry["val_loss"] for entry in validated], marker="o", label="validation")
    left.set(xlabel="epoch", ylabel="loss")
    for name, key in _CURVES.items():
        right.plot(epochs, [entry[key] for entry in validated], marker="o", label=name)
    right.set(xlabel="epoch", ylabel="validation, mean over images")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
