"""The highest scores of every query, found while scores stream by."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffcal.attribution.scores import ScoreBlock
from diffcal.errors import ConfigError, DataError

__all__ = ["TopScores", "top_scores"]


class TopScores:
    """Running ``k`` highest (or lowest) scores of each query.

    Of equal scores the training row with the lower index comes first, so that the result does not
    depend on how rows are split into blocks or in which order blocks come.
    """

    def __init__(self, k: int, *, largest: bool = True) -> None:
        if k < 1:
            raise ConfigError(f"top k must be at least 1, got {k}")
        self.k, self.largest = k, largest
        self._values: Tensor | None = None
        self._index: Tensor | None = None

    def update(self, block: ScoreBlock) -> "TopScores":
        """Take in a block."""
        values = block.values.cpu()
        index = self._best(values)
        values, index = values.gather(1, index), index + block.start
        if self._values is not None and self._index is not None:
            values = torch.cat([self._values, values], dim=1)
            index = torch.cat([self._index, index], dim=1)
        by_index = index.argsort(dim=1)
        values, index = values.gather(1, by_index), index.gather(1, by_index)
        order = values.argsort(dim=1, descending=self.largest, stable=True)[:, : self.k]
        self._values, self._index = values.gather(1, order), index.gather(1, order)
        return self

    def _best(self, values: Tensor) -> Tensor:
        """Columns of the best k of a block. A partial sort, except where ties decide."""
        k = min(self.k, values.shape[1])
        best, index = values.topk(k, dim=1, largest=self.largest)
        if k == values.shape[1]:
            return index
        last = best[:, -1:]
        reaching = (values >= last) if self.largest else (values <= last)
        tied = reaching.sum(dim=1) > k
        if bool(tied.any()):
            order = values[tied].argsort(dim=1, descending=self.largest, stable=True)
            index[tied] = order[:, :k]
        return index

    @property
    def values(self) -> Float[Tensor, "q k"]:
        """Scores, best first; fewer columns than k if there are fewer training rows."""
        return self._require(self._values)

    @property
    def index(self) -> Int64[Tensor, "q k"]:
        """Training row of each score."""
        return self._require(self._index)

    @staticmethod
    def _require(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise DataError("there are no scores")
        return tensor


def top_scores(blocks: Iterable[ScoreBlock], k: int, *, largest: bool = True) -> TopScores:
    """The ``k`` highest scores of each query; ``largest=False`` gives the lowest (opponents)."""
    top = TopScores(k, largest=largest)
    for block in blocks:
        top.update(block)
    return top
