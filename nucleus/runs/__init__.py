"""Training runs in the bucket: their plans, states, records and reports, and comparison of runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
