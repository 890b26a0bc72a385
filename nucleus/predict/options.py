"""How images are segmented, as opposed to with what model."""

from dataclasses import dataclass

__all__ = ["PredictionOptions"]

_BLOCK_SIDE = 2048


@dataclass(frozen=True)
class PredictionOptions:
    """How images are segmented.

    Attributes:
        diameter: Typical diameter of the nuclei in the images, px; they are rescaled to what the model was trained on.
        pixel_size: Side of the images' pixels, micrometres, instead of what their files say. Where the model knows that
            of its training images and no diameter is given, images are rescaled by it, or by what their file says.
        turns: Whether to average over the eight flips and quarter turns; eight times the work.
        block_side: Side of the blocks in which large images are labelled, px.
    """

    diameter: float | None = None
    pixel_size: float | None = None
    turns: bool = False
    block_side: int = _BLOCK_SIDE
