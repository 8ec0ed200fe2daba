"""Confidences and scores of logits in single precision, by exponentials in single precision.

A float32 logit z is known to ``|z| 2^-24``, which alone leaves a probability uncertain by that part
of itself. Exponentials in float64 resolve nothing more and take five times as long. What must not be
lost is how near to 1 a confidence is: the largest exponential of a row is therefore left out of the
sum, and of the rest r, a sum of positive numbers, follow

    confidence 1/(1 + r),    its distance to 1 r/(1 + r),    log-sum-exp max z + log(1 + r)

in float64. Their relative errors stay below ``2^-24 (16 + 2 max |z|)``, with logits beyond 100
counted as 100, however close to 1 a confidence lies: at ordinary logits 1e-6 of the confidence and
4e-6 of its distance to 1. Parts below 1e-38 of the largest count as nothing.

This is for rows of many classes; they are shifted by their largest logit only where that is needed to
stay inside the range of float32. With few classes there are more rows than float32 sums tell apart,
and confidences that tie by rounding cost more in what follows than the exponentials save.
"""

import math
from collections.abc import Callable

import numpy as np

from diffcal.calibration.metrics.exponentials import exponentials
from diffcal.calibration.metrics.row_values import RowValues, Table, Unreadable

__all__ = ["many_single"]

RANGE = 36.0
"""Logits within ±36 need no shift: their exponentials, those's squares and sums of millions of them
are ordinary float32 numbers."""

DEEPEST = np.float32(-87.3)
"""Below this, exponentials are no normal float32 numbers."""

SEGMENT = 4096
"""Entries that are added up in float32 before float64 takes over."""


def many_single(
    read: Callable[[slice], Table], y: Table, spare: Table, with_scores: bool
) -> RowValues:
    """Values of ``len(y)`` rows of many classes, which ``read`` gives block by block as float32.

    Args:
        spare: float32, ``[rows of a block, k]``; overwritten.

    Raises:
        Unreadable: NaN or infinity.
    """
    first = read(slice(0, min(len(spare), len(y))))
    values = None
    if first.max() <= RANGE and first.min() >= -RANGE:  # nothing is known of the other rows yet
        values = _many_single(read, y, spare, with_scores, shift=False)
    if values is None:
        values = _many_single(read, y, spare, with_scores, shift=True)
    assert values is not None
    return values


def _many_single(
    read: Callable[[slice], Table], y: Table, spare: Table, with_scores: bool, *, shift: bool
) -> RowValues | None:
    """None where a row that was not shifted needed it."""
    n, (size, k) = len(y), spare.shape
    flat, starts, each = spare.reshape(-1), np.arange(0, size * k, k), np.arange(size)
    index, most, rest = np.empty(n, dtype=np.int64), np.empty(n), np.empty(n)
    top, gap, squares = (np.empty(n if with_scores else 0) for _ in range(3))
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        block = read(rows)
        count = len(block)
        e = spare[:count]
        if not shift:  # before the other passes: it computes while the block comes from memory
            exponentials(block, e)
        chosen = block.argmax(axis=1, out=index[rows])
        low = np.minimum.reduce(block, axis=None)
        if shift := shift or not low >= -RANGE:  # the next blocks will need it too
            largest = block[each[:count], chosen]
            _require_finite(low, largest.max())  # NaN is both the least and the largest
            np.subtract(block, largest[:, None], out=e)
            _falling_exponentials(e, low - largest.max())
        places = chosen + starts[:count]
        most[rows] = flat[places]
        flat[places] = 0
        rest[rows] = _row_sums(e)
        if with_scores:
            top[rows] = block[each[:count], chosen]
            gap[rows] = block[each[:count], y[rows]]
            squares[rows] = _row_sums(e, squared=True)
    if not most.max() <= math.exp(RANGE):
        return None
    rest /= most
    if not with_scores:
        return RowValues(index, 1 / (1 + rest), index == y)
    squares /= most
    squares /= most
    return _scored(index, y, top, np.subtract(top, gap, out=gap), rest, squares)


def _require_finite(low: np.floating, high: np.floating) -> None:
    if not (np.isfinite(low) and np.isfinite(high)):
        raise Unreadable


def _falling_exponentials(e: Table, lowest: np.floating) -> None:
    """Of numbers from ``lowest`` to 0, in place; what is not a normal float32 becomes 0."""
    if lowest >= DEEPEST:
        exponentials(e, e)
        return
    deep = e < DEEPEST
    np.maximum(e, DEEPEST, out=e)  # exponentials may take a hundred times as long below
    exponentials(e, e)
    np.copyto(e, 0, where=deep)


def _row_sums(e: Table, squared: bool = False) -> Table:
    """The same for equal rows wherever they lie, which the product with a vector would not promise."""
    k = e.shape[1]
    total = _short_row_sums(e[:, :SEGMENT], squared).astype(np.float64)
    for i in range(SEGMENT, k, SEGMENT):
        total += _short_row_sums(e[:, i : i + SEGMENT], squared)
    return total


def _short_row_sums(e: Table, squared: bool) -> Table:
    if squared:  # a scalar product per row
        return np.matmul(e[:, None, :], e[:, :, None])[:, 0, 0]
    return np.einsum("ij->i", e)


def _scored(
    index: Table, y: Table, top: Table, gap: Table, rest: Table, squares: Table
) -> RowValues:
    """Values from float64 vectors.

    Args:
        top: Largest logit.
        gap: How far below it the label's lies.
        rest: Sum of the other exponentials over the largest; ``squares`` that of their squares.
    """
    right = index == y
    log_norm, norm = np.log1p(rest), 1 + rest
    label = np.exp(-gap)
    missed = np.where(right, rest, norm - label)
    others = np.where(right, squares, np.maximum(squares - label**2, 0) + 1)
    brier = (missed**2 + others) / norm / norm
    return RowValues(index, 1 / norm, right, log_norm + gap, brier, log_norm + top)
