"""The colours of outlines."""

__all__ = ["MISTAKE_COLOURS"]

MISTAKE_COLOURS = {
    "found": (64, 255, 190),
    "missed": (255, 0, 0),
    "extra": (255, 255, 0),
    "merged": (255, 0, 190),
    "split": (0, 64, 255),
}
"""RGB by what became of a nucleus; see `nucleus.metrics.mistakes`.

Any two are at least 41 apart in CIELAB, also as people see them who confuse red with green or blue with yellow
(simulated after Machado et al. 2009, https://doi.org/10.1109/TVCG.2009.113).
"""
