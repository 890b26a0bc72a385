"""Files in place of a model's, and their origin: enough for the registry, which does not read them."""

from pathlib import Path

from nucleus.registry.manifest import EncoderWeightsOrigin, Origin

__all__ = ["MODEL_FILES", "origin", "write_model"]

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
