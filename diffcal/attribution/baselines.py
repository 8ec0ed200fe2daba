"""Attribution without a kernel: products and cosines of pixels, embeddings and gradients."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.rows import BLOCK_ROWS, Rows, as_rows
from diffcal.attribution.scores import ScoreBlock, average_blocks
from diffcal.core.tensors import require_finite
from diffcal.errors import ConfigError, DataError

__all__ = ["cosine_blocks", "dot_blocks", "gas_blocks", "gaussian_blocks", "tracin_blocks"]

Checkpoint = tuple[Tensor, Rows | Tensor]
"""Query features ``[q, k]`` and training rows of one checkpoint."""


def dot_blocks(
    queries: Float[Tensor, "q ..."], rows: Rows | Tensor, *, block_rows: int = BLOCK_ROWS
) -> Iterator[ScoreBlock]:
    """``<ψ, φ>``, block by block of training rows.

    Of images in [-1, 1] this is raw pixel similarity, of encoder embeddings (CLIP) encoder similarity,
    of gradients of the loss the gradient dot product. Images are flattened.

    Raises:
        DataError: queries and rows have different sizes.
        NumericalError: NaN or infinite features.
    """
    for start, query, block in _pairs(queries, rows, block_rows):
        yield ScoreBlock(start, query @ block.mT)


def cosine_blocks(
    queries: Float[Tensor, "q ..."], rows: Rows | Tensor, *, block_rows: int = BLOCK_ROWS
) -> Iterator[ScoreBlock]:
    """``<ψ, φ> / (‖ψ‖ ‖φ‖)``; 0 where either is zero."""
    for start, query, block in _pairs(queries, rows, block_rows):
        yield ScoreBlock(start, _unit(query) @ _unit(block).mT)


def gaussian_blocks(
    queries: Float[Tensor, "q ..."],
    rows: Rows | Tensor,
    bandwidth: float,
    *,
    block_rows: int = BLOCK_ROWS,
) -> Iterator[ScoreBlock]:
    """``exp(-‖ψ - φ‖² / (2 bandwidth²))``: likeness that only near neighbours have."""
    if not bandwidth > 0:
        raise ConfigError(f"bandwidth must be positive, got {bandwidth}")
    for start, query, block in _pairs(queries, rows, block_rows):
        squared = torch.cdist(query, block).square()
        yield ScoreBlock(start, torch.exp(-squared / (2 * bandwidth**2)))


def tracin_blocks(
    checkpoints: Sequence[Checkpoint], *, block_rows: int = BLOCK_ROWS
) -> Iterator[ScoreBlock]:
    """TracInCP: plain mean over checkpoints of the gradient dot product.

    Source: Pruthi et al. 2020 (arXiv:2002.08484), with equal weights in place of learning rates, as
    in D-TRAK's comparison (checkpoints at 25, 50, 75 and 100 % of training).
    """
    return average_blocks([dot_blocks(q, rows, block_rows=block_rows) for q, rows in checkpoints])


def gas_blocks(
    checkpoints: Sequence[Checkpoint], *, block_rows: int = BLOCK_ROWS
) -> Iterator[ScoreBlock]:
    """GAS: mean over checkpoints of the gradient cosine (Hammoudeh and Lowd 2022, arXiv:2201.10055)."""
    return average_blocks(
        [cosine_blocks(q, rows, block_rows=block_rows) for q, rows in checkpoints]
    )


def _pairs(
    queries: Tensor, rows: Rows | Tensor, block_rows: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Start, queries and training rows of each block, in float32 or better."""
    rows = as_rows(rows)
    query = require_finite(queries, "query features").flatten(1)
    if query.shape[1] != rows.dim:
        raise DataError(f"queries have {query.shape[1]} entries, training rows {rows.dim}")
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    start = 0
    for block in rows.blocks(block_rows):
        yield start, query, require_finite(block, "training features").to(query)
        start += len(block)


def _unit(rows: Tensor) -> Tensor:
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, 1.0)
