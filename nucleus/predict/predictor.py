"""A pulled model, ready to segment images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import RgbImage
from nucleus.errors import IntegrityError
from nucleus.model.files import load_model
from nucleus.model.tiling import TiledNetwork
from nucleus.predict.instances import label_nuclei
from nucleus.registry.manifest import MANIFEST_FILE, ModelManifest, read_model_manifest
from nucleus.registry.versions import is_whole

__all__ = ["Prediction", "Predictor", "read_pulled"]


@dataclass(frozen=True)
class Prediction:
    """What a model makes of an image.

    Attributes:
        probabilities: H x W x 3, float32: background, body, border.
        labels: H x W, int32: 0 background, 1..K nuclei.
    """

    probabilities: NDArray[np.float32]
    labels: NDArray[np.int32]


class Predictor:
    """A network with its settings.

    Args:
        folder: A folder that `nucleus models pull` made.

    Raises:
        IntegrityError: A file of the folder does not have its sum.
        ModelError: This version cannot rebuild the network.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = read_pulled(folder)
        model, self.config = load_model(folder)
        self._network = TiledNetwork(model, self.config.tile, self.config.overlap)

    def __call__(self, image: RgbImage) -> Prediction:
        """Segment an image, H x W x 3, RGB of 8 bits, of any size."""
        probabilities = self._network(image)
        return Prediction(probabilities, label_nuclei(probabilities, self.config.instances))


def read_pulled(folder: Path) -> ModelManifest:
    """The manifest of a pulled model whose files all have their sums."""
    try:
        manifest = read_model_manifest((folder / MANIFEST_FILE).read_bytes(), str(folder / MANIFEST_FILE))
    except OSError as error:
        raise IntegrityError(
            f"Expected a pulled model in {folder}; it has no {MANIFEST_FILE}. Run: nucleus models pull NAME {folder}"
        ) from error
    if not is_whole(folder, manifest):
        raise IntegrityError(
            f"Expected the files in {folder} to have the sums of their manifest; some do not. "
            f"Remove the folder and run: nucleus models pull {manifest.model}@{manifest.version} {folder}"
        )
    return manifest
