"""The model that a command names."""

from pathlib import Path

__all__ = ["is_pulled", "model_folder"]


def is_pulled(model: str) -> bool:
    """Whether a model is named by the folder that it was pulled to."""
    return (Path(model) / "manifest.json").is_file()


def model_folder(model: str) -> Path:
    """Folder of the model NAME[@REF], pulled into the cache; or `model` itself if it is a pulled folder.

    A download is shown.
    """
    from nucleus.cli.progress import show_progress
    from nucleus.config.names import parse_reference
    from nucleus.registry.versions import pull_cached
    from nucleus.storage.bucket import Bucket
    from nucleus.storage.uri import bucket_from_environment

    if is_pulled(model):
        return Path(model)
    reference = parse_reference(model, "model")
    bucket = Bucket(bucket_from_environment())
    bucket.check("models/")
    with show_progress(f"download {model}", "bytes") as advance:
        return pull_cached(bucket, reference, advance)
