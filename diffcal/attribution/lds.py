"""The linear datamodeling score: do attributions predict the losses of retrained models?"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from diffcal.attribution.scores import ScoreBlock
from diffcal.core.tensors import require_finite
from diffcal.errors import ConfigError, DataError

__all__ = [
    "LDS",
    "Spread",
    "average_losses",
    "average_ranks",
    "centre_batches",
    "lds_difference",
    "lds_of_draws",
    "linear_datamodeling_score",
    "predictions_of",
    "resample_counts",
    "resampled_spearman",
    "spearman",
    "spread_of",
    "stream_predictions",
]

CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Spread:
    """Bootstrap spread of a mean: standard deviation and percentile interval."""

    sd: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class LDS:
    """Linear datamodeling score: Spearman correlation of each query, and their mean, in [-1, 1]."""

    per_query: Float64[Tensor, " q"]
    mean: float
    over_subsets: Spread
    """If other subsets had been drawn (the ± of the published tables is its ``sd``)."""
    over_queries: Spread
    """If other queries had been asked."""
    over_both: Spread
    """Both at once: the interval to report."""
    draws: Float64[Tensor, " r"] = field(repr=False)
    """The resampled means behind ``over_both``. Scores judged with one seed on the same table meet the
    same resamples: the spread of a difference is that of the differences of their draws
    (:func:`lds_difference`)."""
    subsets: int
    queries: int


def average_ranks(values: Float[Tensor, "*b m"]) -> Float64[Tensor, "*b m"]:
    """Ranks 1..m along the last axis; equal values share the mean of their ranks."""
    values = values.double().contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values, side="left")
    upto = torch.searchsorted(ordered, values, side="right")
    return (below + upto + 1).double() / 2


def spearman(x: Float[Tensor, "*b m"], y: Float[Tensor, "*b m"]) -> Float64[Tensor, "*b"]:
    """Rank correlation along the last axis; 0 where either side is constant."""
    a, b = (_standard(average_ranks(side)) for side in (x, y))
    return (a * b).sum(dim=-1)


def resampled_spearman(
    x: Float64[Tensor, "q s"], y: Float64[Tensor, "q s"], counts: Float64[Tensor, "r s"]
) -> Float64[Tensor, "r q"]:
    """Rank correlation of resamples in which entry j occurs ``counts[:, j]`` times; 0 if constant.

    The rank of an entry is the number of drawn entries below it and half of those equal to it, which
    for all resamples together is one matrix product. Nothing is sorted.
    """
    queries, size = x.shape
    draws = torch.empty(len(counts), queries, dtype=torch.float64)
    weights = counts.mT.contiguous()
    middle = counts.sum(dim=1) / 2
    chunk = max(1, CHUNK_ELEMENTS // (size * max(size, len(counts))))
    for start in range(0, queries, chunk):
        sides = []
        for values in (x[start : start + chunk], y[start : start + chunk]):
            column, row = values[:, :, None], values[:, None, :]
            below = (row < column).double() + (row == column).double() / 2
            sides.append(below @ weights - middle)
        a, b = sides
        scale = ((a * a * weights).sum(dim=1) * (b * b * weights).sum(dim=1)).sqrt()
        product = (a * b * weights).sum(dim=1)
        found = torch.where(scale > 0, product / torch.where(scale > 0, scale, 1.0), 0.0)
        draws[:, start : start + chunk] = found.mT
    return draws


def resample_counts(
    size: int, n_resamples: int, generator: torch.Generator
) -> Float64[Tensor, "r s"]:
    """How often each of ``size`` entries occurs in each of ``n_resamples`` bootstrap resamples."""
    rows = torch.randint(size, (n_resamples, size), generator=generator)
    counts = torch.zeros(n_resamples, size, dtype=torch.float64)
    return counts.scatter_add_(1, rows, torch.ones_like(counts))


def _standard(ranks: Tensor) -> Tensor:
    centred = ranks - ranks.mean(dim=-1, keepdim=True)
    length = centred.norm(dim=-1, keepdim=True)
    return centred / torch.where(length > 0, length, 1.0)


def predictions_of(
    scores: Float[Tensor, "q n"], masks: Bool[Tensor, "s n"]
) -> Float64[Tensor, "s q"]:
    """Predicted loss of each subset's model: minus the sum of the scores of its examples."""
    return stream_predictions([ScoreBlock(0, scores)], masks)


def stream_predictions(
    blocks: Iterable[ScoreBlock], masks: Bool[Tensor, "s n"]
) -> Float64[Tensor, "s q"]:
    """:func:`predictions_of` of scores that are never held as a whole.

    Raises:
        DataError: the blocks do not cover the masks' examples exactly once, in order.
        NumericalError: NaN or infinite scores.
    """
    total, stop = None, 0
    for start, values in blocks:
        if start != stop or start + values.shape[1] > masks.shape[1]:
            raise DataError(
                f"scores of training rows {start}..{start + values.shape[1]} do not continue at "
                f"{stop} of the masks' {masks.shape[1]} examples"
            )
        stop = start + values.shape[1]
        inside = masks[:, start:stop].double()
        part = inside @ require_finite(values, "scores").double().cpu().mT
        total = part if total is None else total + part
    if total is None or stop != masks.shape[1]:
        raise DataError(f"scores cover {stop} of the masks' {masks.shape[1]} training examples")
    return -total


def linear_datamodeling_score(
    predictions: Float[Tensor, "s q"],
    losses: Float[Tensor, "_ _"],
    *,
    n_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> LDS:
    """Mean over queries of the Spearman correlation between predicted and true subset losses.

    Args:
        predictions: From :func:`predictions_of` or :func:`stream_predictions`.
        losses: Of every subset's model on every query, averaged over training seeds and noise.
        n_resamples: Bootstrap resamples; ranks are formed anew in each.

    Raises:
        DataError: fewer than two subsets, or different shapes.
        NumericalError: NaN or infinite values.

    Source: Park et al. 2023 (arXiv:2303.14186), definition 2.4; D-TRAK (arXiv:2311.00500) for
    diffusion losses.
    """
    if predictions.shape != losses.shape or len(losses) < 2 or losses.shape[1] < 1:
        raise DataError(
            f"predictions {list(predictions.shape)} and losses {list(losses.shape)} must both be "
            "[subsets, queries] with at least two subsets"
        )
    if not 0 < level < 1 or n_resamples < 2:
        raise ConfigError(f"need 0 < level < 1 and at least 2 resamples: {level}, {n_resamples}")
    predicted = require_finite(predictions, "predictions").double().cpu().mT.contiguous()
    actual = require_finite(losses, "losses").double().cpu().mT.contiguous()
    queries, subsets = predicted.shape
    per_query = spearman(predicted, actual)
    generator = torch.Generator().manual_seed(seed)
    counts = resample_counts(subsets, n_resamples, generator)
    columns = torch.randint(queries, (n_resamples, queries), generator=generator)
    draws = resampled_spearman(predicted, actual, counts)
    return lds_of_draws(per_query, draws, columns, level, subsets)


def lds_of_draws(
    per_query: Float64[Tensor, " q"],
    draws: Float64[Tensor, "r q"],
    columns: Int64[Tensor, "r q"],
    level: float,
    subsets: int,
) -> LDS:
    """The score and its spreads from the correlations of every resample.

    Args:
        per_query: On the subsets as they are.
        draws: On resampled subsets.
        columns: The queries of each resample.
        level: Of the intervals.
        subsets: How many there are.
    """
    both = draws.gather(1, columns).mean(dim=1)
    return LDS(
        per_query=per_query,
        mean=float(per_query.mean()),
        over_subsets=spread_of(draws.mean(dim=1), level),
        over_queries=spread_of(per_query[columns].mean(dim=1), level),
        over_both=spread_of(both, level),
        draws=both,
        subsets=subsets,
        queries=len(per_query),
    )


def lds_difference(first: LDS, second: LDS, level: float = 0.95) -> tuple[float, Spread]:
    """``first - second`` and its spread over subsets and queries, resample by resample.

    Both must have been judged on the same losses with the same seed and number of resamples. What
    makes a draw of subsets or queries easy is common to both and cancels, so that the interval is far
    narrower than the two overlapping ones suggest.

    Raises:
        DataError: they were not.
    """
    same = (first.subsets, first.queries, len(first.draws))
    if same != (second.subsets, second.queries, len(second.draws)):
        raise DataError(
            "two scores can be compared on the same subsets, queries and resamples only"
        )
    return first.mean - second.mean, spread_of(first.draws - second.draws, level)


def average_losses(losses: Float[Tensor, "s seeds noises q"]) -> Float64[Tensor, "s q"]:
    """Plain mean over training seeds and noise draws."""
    return losses.double().mean(dim=(1, 2))


def centre_batches(
    losses: Float[Tensor, "s q"], batches: Shaped[Tensor, " _"]
) -> Float64[Tensor, "s q"]:
    """Losses minus the query's mean within each batch of subsets.

    Subsets that were trained at different times or on other machines must not be pooled without it:
    a common shift between batches swamps the differences that attribution predicts.

    Raises:
        DataError: one batch number for each subset is needed.
    """
    if len(batches) != len(losses):
        raise DataError(f"{len(batches)} batch numbers for {len(losses)} subsets")
    centred = losses.double().clone()
    for batch in batches.unique():
        rows = batches == batch
        centred[rows] -= centred[rows].mean(dim=0)
    return centred


def require_table(masks: Tensor, losses: Tensor) -> Float64[Tensor, "s q"]:
    """``losses`` in float64 if they have one row for each mask.

    Raises:
        DataError: they do not.
    """
    if len(masks) != len(losses):
        raise DataError(f"{len(losses)} rows of losses for {len(masks)} subsets")
    return require_finite(losses, "losses").double().cpu()


def spread_of(draws: Float[Tensor, " r"], level: float = 0.95) -> Spread:
    """Standard deviation and percentile interval of bootstrap draws."""
    tail = (1 - level) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    sd = float(draws.std())
    return Spread(sd if math.isfinite(sd) else 0.0, low, high, level)
