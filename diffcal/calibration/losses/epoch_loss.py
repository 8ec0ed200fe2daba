"""The interface of losses that learn something from epoch to epoch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from diffcal.calibration.losses.contract import RowLoss

__all__ = ["EpochEnd", "EpochLoss"]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class EpochEnd:
    """What a trainer tells a loss after an epoch."""

    progress: float
    """Share of the run that is done, in (0, 1]."""
    logits: Float[Tensor, "v k"] | None = None
    """Of the validation examples, if the loss :attr:`EpochLoss.needs_validation`."""
    labels: Int[Tensor, " v"] | None = None
    total: Callable[[Tensor], Tensor] = _itself
    """Sum of a tensor over the processes of the run."""


class EpochLoss(RowLoss):
    """A loss with state: buffers in its ``state_dict``, which a trainer saves with the run's state.

    A trainer calls ``begin`` once before the first step, the loss with the indices of the batch's
    examples as a third argument if :attr:`needs_examples`, and ``end_epoch`` after each epoch, on
    every process. State changes only there, and in ``forward`` while the module is in training mode.
    """

    needs_examples: ClassVar[bool] = False
    """Called as ``loss(logits, targets, examples)``, examples the int64 rows of the training set."""
    needs_validation: ClassVar[bool] = False
    """``end_epoch`` reads the logits and labels of validation examples."""

    def begin(self, num_examples: int) -> None:
        """Make room for a training set of ``num_examples``; its earlier state is lost."""

    def end_epoch(self, end: EpochEnd) -> None:
        """Take what an epoch taught."""
