"""The check of W&B: where the metrics of a run would go."""

import os

from nucleus.config.recipe import TrackingOptions
from nucleus.doctor.apart import call_apart
from nucleus.doctor.findings import Finding, failed
from nucleus.errors import NucleusError, UsageError
from nucleus.tracking.weights_and_biases import check_tracking, tracking_mode

__all__ = ["check_wandb"]

_WANDB = "W&B"
_SECONDS = 20.0
_NOT_SENT = {
    "offline": "offline, as WANDB_MODE says; `wandb sync` sends runs later",
    "disabled": "disabled, as WANDB_MODE says",
}
_UNKNOWN = Finding(
    _WANDB,
    "warning",
    "offline, and no key is at hand; each run is kept on disk",
    "To see runs online: wandb login, and WANDB_MODE=online. WANDB_MODE=offline says that it is meant so.",
)


def check_wandb() -> Finding:
    """Say what becomes of a run's metrics by WANDB_MODE, for a recipe that says nothing of it."""
    chosen = os.environ.get("WANDB_MODE")
    try:
        mode = tracking_mode(TrackingOptions())
        if chosen in _NOT_SENT:
            return Finding(_WANDB, "ok", _NOT_SENT[chosen])
        call_apart(check_tracking, "online", who="W&B", seconds=_SECONDS)
    except UsageError as error:
        return failed(_WANDB, error) if chosen else _UNKNOWN
    except NucleusError as error:
        return failed(_WANDB, error)
    return Finding(_WANDB, "ok", f"{mode}; a key is at hand" + ("" if chosen else ": WANDB_MODE=online sends runs"))
