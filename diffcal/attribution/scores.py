"""Kernel scores of queries against training rows, streamed, for many dampings at once."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.kernel import Kernel
from diffcal.attribution.readouts import read_out
from diffcal.attribution.rows import BLOCK_ROWS, Rows, as_rows
from diffcal.core.tensors import require_finite
from diffcal.errors import ConfigError, DataError, NumericalError

__all__ = [
    "ScoreBlock",
    "ScoreNorm",
    "average_blocks",
    "collect",
    "kernel_scores",
    "leverage_scores",
    "score_blocks",
    "score_path",
]

logger = logging.getLogger(__name__)

ScoreNorm = Literal["none", "relative", "renormalised"]
LEVERAGE_LIMIT = 1 - 1e-7
"""Above this, 1 - h is rounding."""


class ScoreBlock(NamedTuple):
    """Scores of all queries against training rows ``start, start + 1, ...``: ``[q, b]``."""

    start: int
    values: Tensor


def score_path(
    kernel: Kernel,
    queries: Float[Tensor, "q k"],
    rows: Rows | Tensor,
    dampings: Sequence[float],
    *,
    residual: Float[Tensor, " n"] | None = None,
    leverage: bool = False,
    norm: ScoreNorm = "none",
    readout: str = "square",
    dtype: torch.dtype = torch.float32,
    block_rows: int = BLOCK_ROWS,
) -> Iterator[tuple[int, Float[Tensor, "l q b"]]]:
    """Scores at every damping, block by block of training rows, from one factorisation.

    ``readout( ψᵀ (K + λI)⁻¹ φ · r / (1 - h) / norm )`` with the training residual r and the training
    leverage h. Rotations run in the precision of the kernel, the last product in ``dtype``. Memory:
    one block of rows and its scores.

    Args:
        kernel: Fitted on ``rows``.
        queries: Features ψ of the queries.
        rows: Features φ of the training examples.
        dampings: Absolute λ; ``kernel.damping(rho)`` gives relative ones.
        residual: Weight of each training example (:func:`~.residuals.residual_weights`).
        leverage: Divide by 1 - h: the effect of leaving the example out altogether.
        norm: ``relative`` divides by ``‖(K + λI)⁻¹ φ‖`` (relative influence, Barshan et al. 2020),
            ``renormalised`` by ``‖φ‖`` (Hammoudeh and Lowd 2022).
        readout: ``signed``, ``square``, ``signed_square`` or ``abs``.

    Yields:
        Index of the block's first row, and scores ``[dampings, queries, rows]``.

    Raises:
        NumericalError: NaN in the queries, a leverage of 1 within rounding, or scores beyond ``dtype``.
        DataError: sizes do not match, or rows that the kernel does not know.

    Source: DAS (arXiv:2410.18639), equation 16 as known from secondary sources; the square is left
    out by ``signed`` (TRAK, arXiv:2303.14186; D-TRAK, arXiv:2311.00500). The published code divides
    the inverse by the mean of its absolute entries; that only makes dampings incomparable.
    """
    rows = as_rows(rows)
    if residual is not None and len(residual) != len(rows):
        raise DataError(f"{len(residual)} residuals for {len(rows)} training rows")
    if not dampings:
        raise ConfigError("give at least one damping")
    if norm not in ("none", "relative", "renormalised"):
        raise ConfigError(f"unknown norm '{norm}': use none, relative or renormalised")
    read_out(torch.zeros(1), readout)
    if min(dampings) < kernel.resolution:
        logger.warning(
            "damping %g is below %g, what the %s kernel resolves: raise it or fit in float64",
            min(dampings),
            kernel.resolution,
            str(kernel.eigenvalues.dtype).removeprefix("torch."),
        )
    query = kernel.rotate(require_finite(queries.detach(), "query features"))
    start = 0
    for block in rows.blocks(block_rows):
        stop = start + len(block)
        block = block.to(kernel.device)
        coordinates = kernel.rotate(block)
        kernel.require_fitted(block, coordinates)
        factor = _row_factors(kernel, block, coordinates, dampings, leverage, norm, start)
        if residual is not None:
            factor = factor * residual[start:stop].to(factor)
        columns = coordinates.to(dtype).mT
        values = torch.empty(
            len(dampings), len(query), len(block), dtype=dtype, device=kernel.device
        )
        for index, damping in enumerate(dampings):
            # Applying the inverse to the few queries leaves one product for each damping.
            torch.mm(kernel.inverse(query, damping).to(dtype), columns, out=values[index])
        values *= factor[:, None, :].to(dtype)
        yield start, require_finite(read_out(values, readout), "scores")
        start = stop
    if start != len(rows):
        raise DataError(f"expected {len(rows)} training rows, read {start}")


def score_blocks(
    kernel: Kernel,
    queries: Float[Tensor, "q k"],
    rows: Rows | Tensor,
    damping: float,
    *,
    residual: Float[Tensor, " n"] | None = None,
    leverage: bool = False,
    norm: ScoreNorm = "none",
    readout: str = "square",
    dtype: torch.dtype = torch.float32,
    block_rows: int = BLOCK_ROWS,
) -> Iterator[ScoreBlock]:
    """:func:`score_path` for a single damping."""
    path = score_path(
        kernel,
        queries,
        rows,
        [damping],
        residual=residual,
        leverage=leverage,
        norm=norm,
        readout=readout,
        dtype=dtype,
        block_rows=block_rows,
    )
    for start, values in path:
        yield ScoreBlock(start, values[0])


def kernel_scores(
    kernel: Kernel,
    queries: Float[Tensor, "q k"],
    rows: Rows | Tensor,
    damping: float,
    *,
    residual: Float[Tensor, " n"] | None = None,
    leverage: bool = False,
    norm: ScoreNorm = "none",
    readout: str = "square",
    dtype: torch.dtype = torch.float32,
    block_rows: int = BLOCK_ROWS,
) -> Float[Tensor, "q n"]:
    """:func:`score_blocks` as one matrix on the CPU."""
    blocks = score_blocks(
        kernel,
        queries,
        rows,
        damping,
        residual=residual,
        leverage=leverage,
        norm=norm,
        readout=readout,
        dtype=dtype,
        block_rows=block_rows,
    )
    return collect(blocks)


def leverage_scores(
    kernel: Kernel,
    rows: Rows | Tensor,
    dampings: Sequence[float],
    *,
    block_rows: int = BLOCK_ROWS,
) -> Float[Tensor, "l n"]:
    """Exact leverage of every training row at every damping, in the kernel's precision."""
    parts = []
    for block in as_rows(rows).blocks(block_rows):
        coordinates = kernel.rotate(block)
        kernel.require_fitted(block, coordinates)
        parts.append(kernel.leverages(coordinates, dampings).cpu())
    return torch.cat(parts, dim=1)


def collect(blocks: Iterable[ScoreBlock]) -> Float[Tensor, "q n"]:
    """The whole score matrix on the CPU.

    Raises:
        DataError: no blocks, or they do not follow each other.
    """
    parts, stop = [], 0
    for start, values in blocks:
        if start != stop:
            raise DataError(f"score blocks must follow each other: row {start} after row {stop}")
        stop = start + values.shape[1]
        parts.append(values.cpu())
    if not parts:
        raise DataError("there are no scores")
    return torch.cat(parts, dim=1)


def average_blocks(models: Sequence[Iterable[ScoreBlock]]) -> Iterator[ScoreBlock]:
    """Mean over several models' scores of the same queries and training rows, streamed.

    What each model gives is averaged: with ``readout="square"`` the mean of squares, as released;
    average ``signed`` blocks and read out afterwards for the square of the mean (TRAK averages signed
    scores).

    Raises:
        DataError: the models' blocks do not match.
    """
    if not models:
        raise DataError("give the scores of at least one model")
    with ExitStack() as stack:
        streams = [iter(model) for model in models]
        for stream in streams:
            if hasattr(stream, "close"):
                stack.callback(stream.close)  # type: ignore[attr-defined]
        end = ScoreBlock(-1, torch.zeros(0))
        while True:
            parts = [next(stream, end) for stream in streams]
            if all(part is end for part in parts):
                return
            if len({(part.start, part.values.shape) for part in parts}) != 1:
                raise DataError("the models have scores of different queries or training rows")
            yield ScoreBlock(parts[0].start, torch.stack([p.values for p in parts]).mean(dim=0))


def _row_factors(
    kernel: Kernel,
    block: Tensor,
    coordinates: Tensor,
    dampings: Sequence[float],
    leverage: bool,
    norm: str,
    start: int,
) -> Tensor:
    """What multiplies each training row's score, ``[l, b]``."""
    factor = coordinates.new_ones(len(dampings), len(block))
    if leverage:
        h = kernel.leverages(coordinates, dampings)
        if bool((h > LEVERAGE_LIMIT).any()):
            which, row = (h > LEVERAGE_LIMIT).nonzero()[0].tolist()
            raise NumericalError(
                f"training row {start + row} has leverage {float(h[which, row]):.9f} at damping "
                f"{dampings[which]:g}: raise the damping or leave leverage off"
            )
        factor = factor / (1 - h)
    if norm == "relative":
        length = kernel.inverse_norms(coordinates, dampings)
    elif norm == "renormalised":
        length = block.to(coordinates).norm(dim=1).expand(len(dampings), -1)
    else:
        return factor
    # A zero feature has zero scores; leave them zero.
    return factor / torch.where(length > 0, length, 1.0)
