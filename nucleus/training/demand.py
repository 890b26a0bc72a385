"""What a run can be asked between two steps."""

from enum import Enum

__all__ = ["Demand"]


class Demand(Enum):
    """What a run is asked to do between two steps: to save a checkpoint for the reason given, or nothing."""

    GO_ON = "nothing"
    SAVE = "as it is time"
    SAVE_FROM_LOSS = "as a machine will be lost"
    STOP = "as it was asked to stop"
