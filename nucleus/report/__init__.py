"""Report of a run: an HTML page with scores, figures, pictures and commands; and the figure that compares runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
