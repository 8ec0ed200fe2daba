"""Shares of attribution for classes, sources or artists, as one would pay royalties."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from diffcal.attribution.lds import Spread, spread_of
from diffcal.attribution.scores import ScoreBlock
from diffcal.core.tensors import require_finite
from diffcal.errors import ConfigError, DataError

__all__ = ["GroupShares", "group_rows", "group_shares"]


@dataclass(frozen=True)
class GroupShares:
    """How much of each query's attribution goes to each group; columns are groups."""

    names: tuple[Hashable, ...]
    per_query: Float64[Tensor, "q g"]
    """Shares of each query, summing to 1."""
    mean: Float64[Tensor, " g"]
    """Shares over all queries by weight, summing to 1."""
    spread: tuple[Spread, ...]
    """If other queries had been generated."""
    data_share: Float64[Tensor, " g"]
    """Each group's share of the training set."""

    @property
    def lift(self) -> Float64[Tensor, " g"]:
        """Share divided by what the group's size alone would give: above 1 it is used more."""
        return self.mean / self.data_share

    def royalties(self, amount: float) -> dict[Hashable, float]:
        """``amount`` divided among the groups."""
        return {
            name: amount * share for name, share in zip(self.names, self.mean.tolist(), strict=True)
        }


def group_rows(labels: Sequence[Hashable]) -> tuple[tuple[Hashable, ...], Int64[Tensor, " n"]]:
    """Names of the groups in order of appearance, and the group of each training row."""
    number: dict[Hashable, int] = {}
    index = [number.setdefault(label, len(number)) for label in labels]
    return tuple(number), torch.tensor(index, dtype=torch.int64)


def group_shares(
    blocks: Iterable[ScoreBlock],
    labels: Sequence[Hashable],
    *,
    part: str = "positive",
    weights: Float[Tensor, " q"] | None = None,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> GroupShares:
    """Shares of attribution for groups of training rows, streamed.

    Args:
        blocks: Scores, best of a readout that is never negative (``square``, ``abs``).
        labels: Class, source or artist of every training row.
        part: What signed scores count with: their ``positive`` part, or their ``absolute`` value.
        weights: Worth of each query, for example how often an image was sold; equal by default.

    Raises:
        DataError: labels and scores do not match, or a query has nothing to share out.
        ConfigError: unknown part, or weights that are not positive in sum.
        NumericalError: NaN or infinite scores.
    """
    if part not in ("positive", "absolute"):
        raise ConfigError(f"unknown part '{part}': use positive or absolute")
    names, group = group_rows(labels)
    total, stop = None, 0
    for start, values in blocks:
        if start != stop or start + values.shape[1] > len(group):
            raise DataError(
                f"scores of training rows {start}..{start + values.shape[1]} do not continue at "
                f"{stop} of {len(group)} labels"
            )
        stop = start + values.shape[1]
        score = require_finite(values, "scores").double().cpu()
        score = score.abs() if part == "absolute" else score.clamp(min=0)
        if total is None:
            total = torch.zeros(len(score), len(names), dtype=torch.float64)
        total.index_add_(1, group[start:stop], score)
    if total is None or stop != len(group):
        raise DataError(f"scores cover {stop} training rows, there are {len(group)} labels")
    whole = total.sum(dim=1, keepdim=True)
    if bool((whole <= 0).any()):
        query = int((whole[:, 0] <= 0).nonzero()[0, 0])
        raise DataError(f"query {query} has no positive score, so nothing can be shared out")
    shares = total / whole
    worth = torch.ones(len(shares)) if weights is None else weights.cpu()
    worth = worth.double()
    if len(worth) != len(shares) or bool((worth < 0).any()) or not float(worth.sum()) > 0:
        raise ConfigError(f"weights must be {len(shares)} non-negative numbers, not all zero")
    mean = worth @ shares / worth.sum()
    generator = torch.Generator().manual_seed(seed)
    # Resampling queries is drawing how often each occurs, in proportion to nothing but chance.
    picks = torch.randint(len(shares), (n_resamples, len(shares)), generator=generator)
    counts = torch.zeros(n_resamples, len(shares), dtype=torch.float64)
    counts.scatter_add_(1, picks, torch.ones_like(counts))
    weighted = counts * worth
    drawn = weighted.sum(dim=1, keepdim=True)
    draws = torch.where(drawn > 0, weighted @ shares / drawn, mean)
    size = torch.bincount(group, minlength=len(names)).double()
    return GroupShares(
        names=names,
        per_query=shares,
        mean=mean,
        spread=tuple(spread_of(column, level) for column in draws.mT),
        data_share=size / len(group),
    )
