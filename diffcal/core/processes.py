"""The processes of a launch, and how long they wait for each other."""

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = ["process_state"]

PATIENCE = timedelta(days=7)
"""Stages end in a barrier where fast processes wait for slow ones, or for the first to fit something.
The backends' own limits (10 minutes for NCCL, 30 for gloo) would end long runs there."""


def process_state(device: str = "auto") -> "PartialState":
    """accelerate's state of this launch; a single process without one is the same thing.

    Args:
        device: ``cpu`` keeps all processes off the accelerators that there may be.
    """
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu", timeout=PATIENCE)
