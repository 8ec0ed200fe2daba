"""Weights over classes or prompts: rows that are non-negative and sum to 1."""

from jaxtyping import Float
from torch import Tensor

from diffcal.errors import DataError

__all__ = ["check_distributions"]

_SUM_TOLERANCE = 1e-4  # rows may be off by float32 rounding of many classes


def check_distributions(weights: Float[Tensor, "b k"]) -> None:
    """Refuse rows that are no distributions.

    Raises:
        DataError: a row with negative or non-finite entries or a sum that is not 1; names the row.
    """
    off = (weights.double().sum(dim=1) - 1).abs() > _SUM_TOLERANCE
    bad = off | (weights < 0).any(dim=1) | ~weights.isfinite().all(dim=1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"row {row} of the weights must be non-negative and sum to 1, got "
            f"{[round(v, 4) for v in weights[row].tolist()[:12]]} (sum "
            f"{float(weights[row].sum()):.4g})"
        )
