"""Scores of a few candidates per query, with the kernel of the whole training set."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffcal.attribution.kernel import Kernel
from diffcal.attribution.rows import BLOCK_ROWS, Rows, TensorRows, as_rows
from diffcal.attribution.scores import kernel_scores
from diffcal.errors import DataError

__all__ = ["candidate_scores"]


def candidate_scores(
    kernel: Kernel,
    queries: Float[Tensor, "q k"],
    rows: Rows | Tensor,
    candidates: Int64[Tensor, "q c"],
    damping: float,
    *,
    residual: Float[Tensor, " _"] | None = None,
    leverage: bool = False,
    readout: str = "square",
    block_rows: int = BLOCK_ROWS,
) -> Float[Tensor, "q c"]:
    """Score of each query with its own candidate rows, equal to the same entries of all scores.

    Only blocks that hold a candidate are rotated. The kernel stays that of all rows: fitted on the
    candidates alone, scores of different queries would come from different kernels, and an LDS
    measured inside the screened set is an easier task.

    Args:
        candidates: Training rows of each query, for example the best of a likeness
            (:func:`~.topk.top_scores`) or of the scores of a short sketch.

    Raises:
        DataError: a candidate is not a training row.
    """
    rows, candidates = as_rows(rows), candidates.cpu()
    if candidates.numel() and not 0 <= int(candidates.min()) <= int(candidates.max()) < len(rows):
        raise DataError(f"candidates must be training rows 0 to {len(rows) - 1}")
    if residual is not None and len(residual) != len(rows):
        raise DataError(f"{len(residual)} residuals for {len(rows)} training rows")
    out = torch.zeros(candidates.shape, dtype=torch.float32)
    start = 0
    for block in rows.blocks(block_rows):
        stop = start + len(block)
        inside = (candidates >= start) & (candidates < stop)
        asked = inside.any(dim=1)
        chosen = candidates[inside].unique()
        if len(chosen):
            scores = kernel_scores(
                kernel,
                queries[asked.to(queries.device)],
                TensorRows(block[chosen - start]),
                damping,
                residual=None if residual is None else residual[chosen],
                leverage=leverage,
                readout=readout,
                block_rows=block_rows,
            )
            query, place = inside.nonzero(as_tuple=True)
            row = torch.searchsorted(chosen, candidates[inside])
            out[query, place] = scores[(asked.cumsum(0) - 1)[query], row]
        start = stop
    return out
