"""The page in the browser: images that are dropped on it, their nuclei, and corrections of them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
