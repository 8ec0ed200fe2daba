"""Sorted confidences: the compressed form from which ranking and kernel metrics are computed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

__all__ = [
    "Profile",
    "in_order",
    "joined",
    "parted",
    "segment_sums",
    "sort_with_order",
    "sort_with_outcome",
    "stable_order",
]


PIECE = 1 << 16


@dataclass(frozen=True)
class Profile:
    """Distinct confidences in rising order, with how often each occurs and how often it was right.

    Metrics of a profile treat equal confidences as one block, so that they do not depend on the
    order of the examples. ``count`` and ``hits`` may carry leading axes (bootstrap resamples of one
    set of confidences); a metric then returns one value per leading index.
    """

    confidence: Float[Tensor, " m"]
    count: Float[Tensor, "*r m"]
    hits: Float[Tensor, "*r m"]

    @staticmethod
    def of(confidence: Float[Tensor, " n"], outcome: Shaped[Tensor, " n"]) -> "Profile":
        """Profile of single examples; outcomes may be booleans."""
        c, t = sort_with_outcome(confidence, outcome)
        last = torch.ones(len(c), dtype=torch.bool, device=c.device)
        torch.ne(c[1:], c[:-1], out=last[:-1])
        if bool(last.all()):
            return Profile(c, c.new_ones(1).expand(len(c)), t)  # ones that take no memory
        lasts = last.nonzero()[:, 0]
        del last  # millions of examples: every array of theirs counts
        return Profile(c[lasts], _counts(lasts), _block_sums(t, lasts))

    def pieces(self, falling: bool = False) -> Iterator["Profile"]:
        """The profile cut along the confidences into pieces that fit the cache, in order.

        Metrics that run along the confidences carry their running sums from piece to piece, so that
        temporaries stay small. Resamples (leading axes) are small already and come as one piece.
        """
        m = len(self.confidence)
        size = PIECE if self.count.ndim == 1 else max(m, 1)
        starts = range(0, m, size)
        for start in reversed(starts) if falling else starts:
            part = slice(start, start + size)
            yield Profile(self.confidence[part], self.count[..., part], self.hits[..., part])

    @property
    def total(self) -> Float[Tensor, "*r"]:
        """Number of examples."""
        return self.count.sum(dim=-1)

    @property
    def residual(self) -> Float[Tensor, "*r m"]:
        """Sum over each block of confidence minus outcome."""
        return self.count * self.confidence - self.hits

    def quantile_values(self, ranks: Int[Tensor, " j"]) -> Float[Tensor, " j"]:
        """The values at 0-based ``ranks`` of the sorted examples (no leading axes)."""
        if len(self.confidence) == int(self.total):
            return self.confidence[ranks]
        cumulative = self.count.cumsum(dim=0)
        return self.confidence[torch.searchsorted(cumulative, ranks.double(), right=True)]


def segment_sums(values: Float[Tensor, "*r m"], ends: Int[Tensor, " b"]) -> Float[Tensor, "*r b"]:
    """Sums of ``values`` between consecutive ``ends`` (exclusive), the first segment from 0."""
    cumulative = values.cumsum(dim=-1)
    at_ends = torch.where(ends > 0, cumulative[..., (ends - 1).clamp(min=0)], 0)
    return torch.diff(at_ends, dim=-1, prepend=torch.zeros_like(at_ends[..., :1]))


def _counts(lasts: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    counts = lasts.double()
    counts[1:] -= lasts[:-1]
    counts[0] += 1
    return counts


def _block_sums(values: Float[Tensor, " n"], lasts: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Sums of ``values`` up to each of ``lasts`` (inclusive) from behind the one before."""
    if values.device.type != "cpu":
        return segment_sums(values, lasts + 1)
    starts = np.empty(len(lasts), dtype=np.int64)
    starts[0] = 0
    np.add(lasts[:-1].numpy(), 1, out=starts[1:])
    return torch.from_numpy(np.add.reduceat(values.numpy(), starts))


def sort_with_outcome(
    confidence: Float[Tensor, " n"], outcome: Shaped[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Confidences in rising order with their outcomes, in float64; booleans are much quicker."""
    if outcome.dtype != torch.bool:
        c, order = sort_with_order(confidence)
        return c, outcome[order].double()
    key = joined(confidence, outcome)
    if key.device.type == "cpu":
        key.numpy().sort()
    else:
        key = key.sort().values
    right = (key & 1).double()
    return key.bitwise_right_shift_(1).view(torch.float64), right


def joined(confidence: Float[Tensor, " n"], right: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Each confidence in [0, 1] with its outcome as one whole number, which rises with it.

    The bits of non-negative floats rise with their values and those up to 1 leave a bit for the
    outcome: whole numbers sort faster than floats with an order, and NumPy sorts them in place.
    """
    return confidence.add(0.0).view(torch.int64).mul_(2).add_(right)  # 0 + -0 is 0


def parted(key: Int[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Confidences and outcomes that :func:`joined` made one, in float64."""
    return (key >> 1).view(torch.float64), (key & 1).double()


def sort_with_order(values: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Sorted values and the indices that sort them; the order among equal values is unspecified."""
    if values.device.type == "cpu":  # NumPy's vectorised sort is faster than torch's stable one
        order = torch.from_numpy(np.argsort(values.numpy()))
        return values[order], order
    return torch.sort(values)


def in_order(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Sorted values, without the order that torch would make along with them."""
    if values.device.type != "cpu":
        return values.sort().values
    return torch.from_numpy(np.sort(values.numpy()))


def stable_order(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The indices that sort the values, equal ones in their own order."""
    if values.device.type != "cpu":
        return torch.argsort(values, stable=True)
    return torch.from_numpy(np.argsort(values.numpy(), kind="stable"))
