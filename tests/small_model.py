"""Files of a small model: with content in their place, for the registry, or of a network that was not trained."""

from pathlib import Path

import numpy as np

from nucleus.data.synthetic import generated_image
from nucleus.lazy import keras
from nucleus.model.architecture import ModelConfig
from nucleus.model.unet import build_unet, calibrate_encoder
from nucleus.registry.manifest import EncoderWeightsOrigin, Origin

__all__ = ["MODEL_FILES", "origin", "write_model", "write_untrained"]

MODEL_FILES = ("card.md", "model.json", "model.weights.h5")


def origin(run: str = "r", score: float = 0.5) -> Origin:
    """The origin of a version made by a run, with a score on every split."""
    return Origin(
        run=run,
        recipe={"network": {"encoder": "mobilenet_v2"}},
        dataset="s3://b/datasets/d@0123456789ab",
        encoder_weights=EncoderWeightsOrigin(source="none", sha256=None),
        metrics={split: {"all": {"map": score}} for split in ("val", "test")},
        code_version="0",
        wandb_run=None,
    )


def write_model(folder: Path) -> Path:
    """Make a folder with a file of each name."""
    folder.mkdir()
    for name in MODEL_FILES:
        (folder / name).write_text(f"content of {name}")
    return folder


def write_untrained(folder: Path, config: ModelConfig) -> Path:
    """Make a folder with the files of a network that was not trained."""
    folder.mkdir()
    keras.utils.set_random_seed(0)
    network = build_unet(config)
    calibrate_encoder(network, np.stack([generated_image(seed, 64, 64)[0] for seed in range(4)]))
    network.save_weights(folder / "model.weights.h5")
    (folder / "model.json").write_text(config.model_dump_json())
    (folder / "card.md").write_text("A card.")
    return folder
