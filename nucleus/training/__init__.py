"""Training on one worker: loop, steps, checkpoints and callbacks. The package `job` starts the workers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
