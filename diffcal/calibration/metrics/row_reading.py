"""The first reading of a classifier's outputs with hard labels on the CPU, fast.

Of every row come the predicted class, the confidence, whether it was right, the log score and the
Brier score. Most of the time goes into one exponential per logit; :mod:`row_exponentials` takes those
of many float32 logits per row in single precision. Rows are read in blocks that stay in the cache, by
as many workers as torch has threads: NumPy and torch let go of the interpreter while they compute. No
block depends on the number of workers, so that no result does, to the last bit. Few classes run along
the first axis of a block, so that every operation is a long one; what is done to single numbers per
row of many classes is done to thousands of rows at once.

Logits are shifted by the largest of their row before anything else: rows that differ by a shift then
have equal confidences to the last bit, and binned and ranking measures see their ties. Only float32
logits of many classes are not.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from diffcal.calibration.metrics.exponentials import exponentials
from diffcal.calibration.metrics.row_exponentials import many_single
from diffcal.calibration.metrics.row_values import RowValues, Table, Unreadable, first_largest
from diffcal.core.devices import one_thread
from diffcal.core.workers import share_out

__all__ = ["RowValues", "Unreadable", "read_rows"]

BLOCK_ELEMENTS = 1 << 16
"""Entries of a float64 block: 512 KiB, half of a usual second-level cache."""

FEW_ELEMENTS = 3 << 15
"""The same for few classes, whose blocks take more calls, and for probabilities that are only compared
and need no second block: fewer calls leave the other threads alone."""

MANY_ELEMENTS = 1 << 21
"""Entries of the rows of many classes whose numbers are finished together."""

WORKER_ELEMENTS = 1 << 19
"""Entries that pay for a thread."""

FEW_CLASSES = 64
"""Below this, classes run along the first axis of a block."""


def read_rows(
    scores: Tensor,
    labels: Tensor,
    *,
    logits: bool,
    with_scores: bool,
    eps: float,
    sum_tolerance: float,
    take: Callable[[slice, RowValues], None],
) -> None:
    """Give the values of every row to ``take``, block by block in no particular order.

    Args:
        scores: ``[n, k]`` logits, or probabilities that sum to 1 within ``sum_tolerance``.
        labels: ``[n]`` within 0..k-1.
        with_scores: Whether log scores, Brier scores and normalisers are wanted too.
        eps: Probabilities below this count as this in the log score; only for probabilities.
        take: Called with the rows of a block and their values, from several threads at once but
            never twice for the same rows.

    Raises:
        Unreadable: a block holds NaN, infinity, negative probabilities, or sums close to or beyond
            the tolerance.
    """
    n, k = scores.shape
    y = labels.numpy()
    few = k < FEW_CLASSES
    single = scores.dtype != torch.float64 and not few
    together = single if logits else not (few or with_scores)
    elements = FEW_ELEMENTS if few or (together and not logits) else BLOCK_ELEMENTS
    block_size = max(1, elements * (2 if single else 1) // k)
    size = max(block_size, MANY_ELEMENTS // k) if together else block_size

    block_of = _block_reader(scores)

    def values_of(rows: slice, spare: Table) -> RowValues:
        def within(part: slice) -> Table:
            return block_of(slice(rows.start + part.start, rows.start + part.stop))

        if logits and single:
            return many_single(within, y[rows], spare, with_scores)
        if logits:
            return _of_logits(block_of(rows), y[rows], spare.reshape(-1), with_scores)
        if together:
            return _of_many_probs(within, y[rows], block_size, sum_tolerance)
        return _of_probs(
            block_of(rows), y[rows], spare.reshape(-1), with_scores, eps, sum_tolerance
        )

    def work(starts: Iterator[int]) -> None:
        spare = np.empty((block_size, k), dtype=np.float32 if logits and single else np.float64)
        with np.errstate(all="ignore"):
            for start in starts:
                rows = slice(start, min(start + size, n))
                take(rows, values_of(rows, spare))

    workers = min(torch.get_num_threads(), n * k // WORKER_ELEMENTS)
    with one_thread():  # of each worker
        share_out(range(0, n, size), workers, work)


def _block_reader(scores: Tensor) -> Callable[[slice], Table]:
    """Blocks of rows as NumPy takes them, those of half precision in float32."""
    if scores.dtype in (torch.float32, torch.float64):
        array = scores.numpy()
        return lambda rows: array[rows]
    if scores.dtype == torch.bfloat16:  # the upper half of float32's bits
        halves = scores.view(torch.int16).numpy()
        return lambda rows: np.left_shift(halves[rows], 16, dtype=np.int32).view(np.float32)
    return lambda rows: scores[rows].float().numpy()


def _of_logits(block: Table, y: Table, spare: Table, with_scores: bool) -> RowValues:
    e, axis, places = _laid_out(block, spare)
    flat = e.reshape(-1)
    low = block.min() if axis else e.min()
    predicted, top = _largest(block, e, axis, places)
    if not (np.isfinite(low) and np.isfinite(top.max())):  # NaN is both the least and the largest
        raise Unreadable
    e -= np.expand_dims(top, axis)
    z_y = flat[places(y)] if with_scores else None
    exponentials(e, e)
    norm = _sums(e, axis)
    right = predicted == y
    if z_y is None:
        return RowValues(predicted, 1 / norm, right)
    log_norm = np.log(norm)
    brier = _square_sums(e, axis)
    brier /= norm
    brier /= norm
    brier -= 2 * (np.exp(z_y) / norm)
    brier += 1
    np.maximum(brier, 0, out=brier)
    return RowValues(predicted, 1 / norm, right, log_norm - z_y, brier, log_norm + top)


def _of_many_probs(
    read: Callable[[slice], Table], y: Table, block_size: int, sum_tolerance: float
) -> RowValues:
    """Without scores, and without a copy: what is compared needs no more digits than are given."""
    n = len(y)
    predicted, top, sums = np.empty(n, dtype=np.int64), np.empty(n), np.empty(n)
    starts = np.arange(block_size)
    low = np.inf
    for start in range(0, n, block_size):
        rows = slice(start, min(start + block_size, n))
        p = read(rows)
        low = np.minimum(low, np.minimum.reduce(p, axis=None))  # keeps NaN
        chosen = p.argmax(axis=1, out=predicted[rows])
        top[rows] = p[starts[: len(p)], chosen]
        sums[rows] = np.einsum("ij->i", p)  # a product with ones would start threads of BLAS
    _require_distributions(low, sums, sum_tolerance)
    return RowValues(predicted, np.minimum(top, 1), predicted == y)


def _of_probs(
    block: Table, y: Table, spare: Table, with_scores: bool, eps: float, sum_tolerance: float
) -> RowValues:
    p, axis, places = _laid_out(block, spare)
    low = block.min() if axis else p.min()
    sums = _sums(p, axis)
    _require_distributions(low, sums, sum_tolerance)
    predicted, top = _largest(block, p, axis, places)
    confidence, right = np.minimum(top, 1), predicted == y
    if not with_scores:
        return RowValues(predicted, confidence, right)
    p_y = p.reshape(-1)[places(y)]
    brier = _square_sums(p, axis) - p_y**2 + (1 - p_y) ** 2
    log_score = -np.log(np.maximum(p_y, eps))  # infinite where an impossible class occurred
    return RowValues(predicted, confidence, right, log_score, brier, sums)


def _require_distributions(low: np.floating | float, sums: Table, sum_tolerance: float) -> None:
    # rounding of the sums does not matter well inside the tolerance
    if not (low >= 0 and np.abs(sums - 1).max() <= sum_tolerance / 2):
        raise Unreadable


def _laid_out(block: Table, spare: Table) -> tuple[Table, int, Callable[[Table], Table]]:
    """A float64 copy in ``spare``, its axis of the classes, and where the entry of a class lies."""
    m, k = block.shape
    if k < FEW_CLASSES:
        e = spare[: m * k].reshape(k, m)
        np.copyto(e, block.T)
        rows = np.arange(m)
        return e, 0, lambda classes: classes.astype(np.int64) * m + rows
    e = spare[: m * k].reshape(m, k)
    np.copyto(e, block)
    starts = np.arange(0, m * k, k)
    return e, 1, lambda classes: starts + classes


def _largest(
    block: Table, e: Table, axis: int, places: Callable[[Table], Table]
) -> tuple[Table, Table]:
    """Index of the first maximum of each row, and the maximum in float64."""
    if axis:
        index = block.argmax(axis=1)
        return index, e.reshape(-1)[places(index)]
    return first_largest(e)


def _sums(e: Table, axis: int) -> Table:
    return np.einsum("ij->i", e) if axis else e.sum(axis=0)


def _square_sums(e: Table, axis: int) -> Table:
    if axis:  # a scalar product per row
        return np.matmul(e[:, None, :], e[:, :, None])[:, 0, 0]
    return np.einsum("ij,ij->j", e, e)
