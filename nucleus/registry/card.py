"""The model card: what a person should know before using a published model."""

from nucleus.metrics.headlines import HEADLINES
from nucleus.registry.manifest import Origin

__all__ = ["model_card"]


def model_card(name: str, origin: Origin) -> str:
    """The card as Markdown: how the model was made, and its metrics by split and kind of image."""
    weights = origin.encoder_weights
    start = "random weights" if weights.source == "none" else f"{weights.source} weights ({weights.sha256})"
    heads = origin.recipe["network"]["heads"]
    lines = [
        f"# {name}",
        "",
        f"Segments cell nuclei in microscope images (RGB, any size): U-Net with the heads `{heads}`, by which",
        "touching nuclei are separated.",
        "",
        f"- Training data: `{origin.dataset}`",
        f"- Encoder: {origin.recipe['network']['encoder']}, began with {start}",
        f"- Run: `{origin.run}`, code version {origin.code_version}",
        f"- Use: `nucleus predict IMAGES --model {name} --out DIR`",
        "",
        "Mean over images:",
        "",
        f"| split | kind | images | {' | '.join(title for _, title in HEADLINES)} |",
        f"|---|---|---|{'---|' * len(HEADLINES)}",
    ]
    for split, by_kind in origin.metrics.items():
        for kind, scores in by_kind.items():
            values = " | ".join(f"{scores[key]:.3f}" for key, _ in HEADLINES)
            lines.append(f"| {split} | {kind} | {scores['images']:.0f} | {values} |")
    return "\n".join(lines) + "\n"
