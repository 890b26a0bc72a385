"""Which of the many metrics people read first, and what they are called."""

__all__ = ["HEADLINES"]

HEADLINES = (
    ("ap_50", "AP.5"),
    ("ap_70", "AP.7"),
    ("ap_90", "AP.9"),
    ("map", "mAP"),
    ("iou", "IoU"),
    ("dice", "Dice"),
    ("accuracy", "accuracy"),
)
"""Keys of the scores, and their titles; means over images."""
