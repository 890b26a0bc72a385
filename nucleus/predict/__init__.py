"""From images to labels, overlays and a table of nuclei."""
