"""How a run happens on Ray: the driver, the loop on each worker, and the recipes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
