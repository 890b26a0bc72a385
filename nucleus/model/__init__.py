"""The network: its configuration, targets and losses, files and export, tiles, and labels from its output."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
