"""How good predictions are: pixels, nuclei, and sums over images and workers."""
