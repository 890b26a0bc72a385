"""Work on Ray: training runs, sweeps, prediction and evaluation on a cluster, submitted jobs, and shipped recipes.

It needs the extra `train` or `train-gpu`. Without it, the first use of a name of this package raises
`MissingPackageError`; its modules and recipes can be read all the same.
"""

from typing import Any

import lazy_loader

from nucleus.lazy import TRAINING, need

_exposed, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        need(*TRAINING)
    return _exposed(name)
