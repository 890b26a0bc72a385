"""Work on Ray: training runs, sweeps, prediction and evaluation on a cluster, submitted jobs, and shipped recipes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
