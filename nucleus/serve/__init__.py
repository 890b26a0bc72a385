"""The service: segmentation by HTTP with the numbers of `nucleus predict`, and limits on what a request may cost."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
