"""The model in a run's last checkpoint, as it is published."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nucleus.training.reporter import Finished

__all__ = ["FINAL_FOLDER", "save_model"]

FINAL_FOLDER = "model"
"""Folder of the last checkpoint that holds the model's files."""

_PREVIEW_SIDE = 256


def save_model(folder: Path, finished: "Finished") -> None:
    """Write the model's files into a new folder."""
    from nucleus.data.images import encode_png
    from nucleus.model.files import CONFIG_FILE, WEIGHTS_FILE

    folder.mkdir()
    finished.model.save_weights(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(finished.config.model_dump_json(indent=1))
    (folder / "metrics.json").write_text(
        json.dumps({"metrics": finished.metrics, "history": finished.progress.history}, indent=1)
    )
    (folder / "preview.png").write_bytes(encode_png(_preview(finished)))


def _preview(finished: "Finished") -> Any:
    """Image, truth and prediction side by side for a few images of the test split."""
    from nucleus.model.heads import maps_of
    from nucleus.model.instances import label_nuclei
    from nucleus.model.tiling import TiledNetwork
    from nucleus.predict.overlay import CYAN, contact_sheet, draw_outlines

    config = finished.config
    network = TiledNetwork(finished.model, config)
    rows = []
    for example in finished.examples:
        labels = label_nuclei(maps_of(network(example.image), config.heads), config.instances)
        rows.append(
            [
                example.image,
                draw_outlines(example.image, example.labels, CYAN),
                draw_outlines(example.image, labels),
            ]
        )
    return contact_sheet(rows, _PREVIEW_SIDE)
