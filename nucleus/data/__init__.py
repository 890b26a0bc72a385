"""From microscope images and masks to sharded, versioned datasets in a bucket, and from there to batches."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
