"""What the first reading of some rows gives, and how it refuses them."""

from dataclasses import dataclass

import numpy as np

__all__ = ["RowValues", "Table", "Unreadable", "first_largest"]

Table = np.ndarray


@dataclass(frozen=True)
class RowValues:
    """What was read of some rows, vectors of one length."""

    predicted: Table
    """Lowest index among equal maxima."""
    confidence: Table
    right: Table
    log_score: Table | None = None
    brier: Table | None = None
    normaliser: Table | None = None
    """Of logits their log-sum-exp, of probabilities their sum. None where scores were not wanted."""


class Unreadable(ValueError):
    """Some row is not finite or not a distribution; the careful path finds out which."""


def first_largest(columns: Table) -> tuple[Table, Table]:
    """Of fewer than 128 classes along the first axis: index of the first maximum, and the maximum."""
    top = columns.max(axis=0)
    # argmax is slow on this axis; of the classes at the maximum, the first has the largest weight
    weight = (columns == top).view(np.int8)
    weight *= np.arange(len(columns), 0, -1, dtype=np.int8)[:, None]
    return len(columns) - weight.max(axis=0), top
