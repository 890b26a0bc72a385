"""Layers of an image besides what its model found: with changes, as saved, as another version finds it; comparison."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.metrics.nuclei import LabelPairs, matched_labels, pair_labels
from nucleus.page.corrections import Saved
from nucleus.page.editing import EditedImage, edited_nuclei, measure_labels
from nucleus.page.layers import FOUND, Changes, EditedLayer, Layer, NucleusShape, new_layer
from nucleus.page.page_images import PageImage
from nucleus.page.sessions import Workspace, write_found
from nucleus.predict.blocks import AssembledLabels
from nucleus.predict.model import Model

__all__ = ["compared_layers", "edited_layer", "revision_document", "saved_layer", "version_layer"]


def edited_layer(
    workspace: Workspace, image: PageImage, asked: EditedLayer, folder: Path, *, measured: bool = True
) -> tuple[AssembledLabels, list[dict[str, Any]]]:
    """Return labels and rows of a layer with changes, without nuclei that are hidden; new rows only if `measured`.

    Args:
        workspace: The workspace of the image.
        image: The image.
        asked: The layer and its changes.
        folder: Folder for a temporary file, if the image is large.
        measured: Whether nuclei that were drawn are measured.

    Raises:
        UsageError: The layer, or a nucleus that is removed, does not exist; or one that was drawn has no pixel.
    """
    layer, hidden = image.layer(asked.layer), set(asked.hidden)
    removed = {*asked.changes.removed, *hidden} - {shape.label for shape in asked.changes.shapes}
    if hidden:
        removed &= set(np.unique(layer.labels).tolist())
    shapes = tuple(shape for shape in asked.changes.shapes if shape.label not in hidden)

    def row_of(shape: NucleusShape) -> dict[str, Any]:
        return workspace.measure(image, shape) if measured else {"label": shape.label}

    return edited_nuclei(layer.labels, layer.rows, Changes(removed=tuple(removed), shapes=shapes), row_of, folder)


def saved_layer(workspace: Workspace, image: PageImage, saved: Saved) -> str:
    """Return the name of the layer of a saved revision, which is made if there is none yet."""
    name = f"saved-{saved.revision.labels_sha256[:20]}"
    if not image.layer_folder(name).is_dir():
        edited = workspace.opened(image).edited
        labels = saved.labels
        new_layer(image.layer_folder(name), edited.frame, labels, measure_labels(edited, labels))
    return name


def revision_document(saved: Saved | None, layer: str | None) -> dict[str, Any]:
    """Return what the page shows of a saved revision."""
    if saved is None:
        return {"saved": None}
    return {"saved": {**saved.revision.model_dump(), "tag": saved.tag, "layer": layer}}


def version_layer(workspace: Workspace, image: PageImage, model: Model) -> str:
    """Return the name of the layer that another version of a model finds, with the image's own options.

    Raises:
        ImageError: The image cannot be read.
        ModelError: The options do not fit the model.
    """
    name = f"by-{hashlib.sha256(str(model).encode()).hexdigest()[:20]}"
    if not image.layer_folder(name).is_dir():
        edited = _seen_by(workspace.opened(image).edited, image, model)
        write_found(edited, image.folder, image.layer_folder(name))
    return name


def _seen_by(edited: EditedImage, image: PageImage, model: Model) -> EditedImage:
    """Return an image with another model, which gets the options that the image was segmented with."""
    sized = image.options.sized(model)
    return EditedImage(sized, sized.scaled_image(edited.scaled.source))


def compared_layers(image: PageImage, after: str, corrected: str | None) -> dict[str, Any]:
    """Return how what another version finds differs from what the image's model found.

    Two nuclei are the same if their intersection over union is at least .5.

    Args:
        image: The image.
        after: Layer of the other version.
        corrected: Layer with what a person saved; None if nobody did.

    Returns:
        `before` and `after`, the numbers of nuclei; `same`; `gone` and `new`, the labels of those that only one of them
        has; and `corrected`: the number of nuclei that were saved, and how many of them each found; None without them.
    """
    found, new = image.layer(FOUND).labels, image.layer(after).labels
    pairs = pair_labels(found, new)
    ours, theirs = _labels(pairs.true_areas), _labels(pairs.predicted_areas)
    kept, _ = matched_labels(pairs)
    known, _ = matched_labels(
        LabelPairs(pairs.predicted_areas, pairs.true_areas, pairs.predicted, pairs.true, pairs.shared)
    )
    return {
        "before": len(ours),
        "after": len(theirs),
        "same": len(kept),
        "gone": np.setdiff1d(ours, kept).tolist(),
        "new": np.setdiff1d(theirs, known).tolist(),
        "corrected": _against(image.layer(corrected), found, new) if corrected else None,
    }


def _labels(areas: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.flatnonzero(areas)


def _against(corrected: Layer, *found: NDArray[np.int32]) -> dict[str, int]:
    """Return how many of the nuclei that a person saved were found before and after."""
    truth = corrected.labels
    before, after = (len(matched_labels(pair_labels(truth, labels))[0]) for labels in found)
    return {"nuclei": len(np.unique(truth[truth > 0])), "before": before, "after": after}
