"""Training runs in the bucket: what each is to do, what it left, and how runs compare."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
