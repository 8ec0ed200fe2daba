"""From a signed score to what is ranked."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from diffcal.errors import ConfigError

__all__ = ["READOUTS", "Readout", "read_out"]

Readout = Literal["signed", "square", "signed_square", "abs"]

READOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "signed": lambda score: score,
    "square": lambda score: score.square(),
    "signed_square": lambda score: score * score.abs(),
    "abs": lambda score: score.abs(),
}
"""``square`` is DAS: how much an example matters, never whether it helps or hurts. ``signed`` is
TRAK and D-TRAK. ``signed_square`` keeps the direction and suppresses small scores."""


def read_out(score: Tensor, readout: str) -> Tensor:
    """``score`` through the named readout.

    Raises:
        ConfigError: unknown readout.
    """
    try:
        return READOUTS[readout](score)
    except KeyError:
        raise ConfigError(f"unknown readout '{readout}': use {', '.join(READOUTS)}") from None
