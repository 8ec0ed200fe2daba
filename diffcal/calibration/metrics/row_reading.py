"""The first reading of a classifier's outputs with hard labels on the CPU, fast.

Of every row come the predicted class, the confidence, whether it was right, the log score and the
Brier score. The time goes into one exponential in float64 per logit, which NumPy takes more than
twice as fast as torch, so that everything here is NumPy. Rows are read in blocks that stay in the
cache, by as many workers as torch has threads: NumPy lets go of the interpreter while it computes.
Few classes run along the first axis of a block, so that every operation is a long one.

Logits are shifted by the largest of their row before anything else: rows that differ by a shift then
have equal confidences to the last bit, and binned and ranking measures see their ties.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["RowValues", "Unreadable", "read_rows"]

BLOCK_ELEMENTS = 1 << 16
"""Entries of a float64 block: 512 KiB, half of a usual second-level cache."""

FEW_CLASSES = 64
"""Below this, classes run along the first axis of a block."""

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
    has_numpy = scores.dtype in (torch.float32, torch.float64)
    y = labels.numpy()
    size = max(1, BLOCK_ELEMENTS // k)
    starts = range(0, n, size)
    workers = max(1, min(torch.get_num_threads(), len(starts)))
    cuts = [len(starts) * i // workers for i in range(workers + 1)]
    shares = [starts[cuts[i] : cuts[i + 1]] for i in range(workers)]

    def work(share: range) -> None:
        spare = np.empty(size * k)
        for start in share:
            rows = slice(start, min(start + size, n))
            part = scores[rows]
            block = part.numpy() if has_numpy else part.float().numpy()
            with np.errstate(all="ignore"):
                if logits:
                    values = _of_logits(block, y[rows], spare, with_scores)
                else:
                    values = _of_probs(block, y[rows], spare, with_scores, eps, sum_tolerance)
            take(rows, values)

    if workers == 1:
        work(shares[0])
        return
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work, share) for share in shares]:
            done.result()


def _of_logits(block: Table, y: Table, spare: Table, with_scores: bool) -> RowValues:
    e, axis, places = _laid_out(block, spare)
    flat = e.reshape(-1)
    low = block.min() if axis else e.min()
    predicted, top = _largest(block, e, axis, places)
    if not (np.isfinite(low) and np.isfinite(top.max())):  # NaN is both the least and the largest
        raise Unreadable
    e -= np.expand_dims(top, axis)
    z_y = flat[places(y)] if with_scores else None
    np.exp(e, out=e)
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


def _of_probs(
    block: Table, y: Table, spare: Table, with_scores: bool, eps: float, sum_tolerance: float
) -> RowValues:
    few = block.shape[1] < FEW_CLASSES
    copied = few or with_scores
    p, axis, places = _laid_out(block, spare) if copied else (block, 1, _by_row(block))
    low = block.min() if axis else p.min()
    # the precision of the input tells well enough whether a sum lies well inside the tolerance
    sums = _sums(p, axis)
    if not (low >= 0 and np.abs(sums - 1).max() <= sum_tolerance / 2):
        raise Unreadable
    predicted, top = _largest(block, p, axis, places)
    confidence, right = np.minimum(top, 1), predicted == y
    if not with_scores:
        return RowValues(predicted, confidence, right)
    p_y = _taken(p, places(y))
    brier = _square_sums(p, axis) - p_y**2 + (1 - p_y) ** 2
    log_score = -np.log(np.maximum(p_y, eps))  # infinite where an impossible class occurred
    return RowValues(predicted, confidence, right, log_score, brier, sums)


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
    return e, 1, _by_row(block)


def _by_row(block: Table) -> Callable[[Table], Table]:
    m, k = block.shape
    starts = np.arange(0, m * k, k)
    return lambda classes: starts + classes


def _largest(
    block: Table, e: Table, axis: int, places: Callable[[Table], Table]
) -> tuple[Table, Table]:
    """Index of the first maximum of each row, and the maximum in float64."""
    if axis:
        index = block.argmax(axis=1)
        return index, _taken(e, places(index))
    top = e.max(axis=0)
    # argmax is slow on this axis; small integers step back through the classes at the maximum
    at = (e == top).view(np.int8)
    index = np.full(e.shape[1], len(e) - 1, dtype=np.int8)
    step = np.empty_like(index)
    for k in range(len(e) - 2, -1, -1):
        np.subtract(np.int8(k), index, out=step)
        step *= at[k]
        index += step
    return index, top


def _taken(e: Table, places: Table) -> Table:
    flat = e.reshape(-1) if e.flags.c_contiguous else e.flat
    return flat[places].astype(np.float64)


def _sums(e: Table, axis: int) -> Table:
    return np.einsum("ij->i", e) if axis else e.sum(axis=0)


def _square_sums(e: Table, axis: int) -> Table:
    if axis:  # a scalar product per row
        return np.matmul(e[:, None, :], e[:, :, None])[:, 0, 0]
    return np.einsum("ij,ij->j", e, e)
