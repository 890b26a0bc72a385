"""Metrics of predictions: scores of pixels and nuclei, and their sums over images and workers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
