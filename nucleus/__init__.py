"""Find cell nuclei in microscope images: data, network, registry and prediction.

What runs on Ray lives in the package `job`.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
