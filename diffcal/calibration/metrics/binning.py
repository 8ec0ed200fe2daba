"""Bins of confidences and the sums over them that all binned metrics are made of.

Conventions (arXiv:2308.11838 uses the same): bins are (lower, upper] and the first takes 0 too;
``width`` bins are equal intervals of [0, 1]; ``mass`` bins hold as equal a number of examples as
ties allow, with edges half way between neighbouring groups; ``rank`` bins hold exactly equal numbers
and may split ties. Empty bins contribute nothing. Other libraries differ, see :class:`Compat`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcal.calibration.metrics.histogram import ConfidenceHistogram
from diffcal.calibration.metrics.inputs import Confidences
from diffcal.calibration.metrics.profile import Profile, joined, parted, segment_sums
from diffcal.errors import ConfigError

__all__ = [
    "BinSums",
    "Compat",
    "Scheme",
    "assign_bins",
    "assign_width",
    "bin_sums",
    "mass_edges",
    "mass_edges_of_values",
    "profile_bin_sums",
    "width_edges",
]

HISTOGRAM_FROM = 1 << 16  # examples from which a fine histogram is quicker than single examples

Scheme = Literal["width", "mass", "rank"]

Compat = Literal["netcal", "torchmetrics", "focal"]
"""Whose convention to reproduce instead of ours:

netcal (1.4): [lower, upper) with 1 in the last bin.
torchmetrics (1.9): the same in float32, and a bin of its own for exactly 1.
focal: the adaptive ECE of the focal-calibration family of repositories: edges interpolated between
sorted confidences, (lower, upper], every example that equals the smallest confidence dropped.
"""


@dataclass(frozen=True)
class BinSums:
    """Sums over the examples of each bin, from lowest to highest confidence.

    Sums may carry leading axes, one entry per bootstrap resample of the same bins.
    """

    edges: Float[Tensor, " m1"]
    """Bin borders, first to last; for ``rank`` bins the midpoints between groups."""
    count: Float[Tensor, "*r m"]
    confidence: Float[Tensor, "*r m"]
    outcome: Float[Tensor, "*r m"]
    total: int
    """Examples in all, also those that a convention drops."""

    @property
    def filled(self) -> "BinSums":
        """The same without empty bins (edges stay as they are); only without leading axes."""
        keep = self.count > 0
        return BinSums(
            self.edges, self.count[keep], self.confidence[keep], self.outcome[keep], self.total
        )

    @property
    def weight(self) -> Float[Tensor, "*r m"]:
        """Share of the examples in each bin."""
        return self.count / self.total

    @property
    def mean_confidence(self) -> Float[Tensor, "*r m"]:
        """Mean confidence of each bin, NaN where it is empty."""
        return self.confidence / self.count

    @property
    def mean_outcome(self) -> Float[Tensor, "*r m"]:
        """Accuracy of each bin, NaN where it is empty."""
        return self.outcome / self.count

    @property
    def gap(self) -> Float[Tensor, "*r m"]:
        """Mean confidence minus accuracy; positive where confidence is too high."""
        return (self.confidence - self.outcome) / self.count


def width_edges(n_bins: int, device: torch.device | str = "cpu") -> Float[Tensor, " m1"]:
    """``n_bins + 1`` equally spaced borders of [0, 1], float64."""
    _require_bins(n_bins)
    return torch.from_numpy(np.linspace(0.0, 1.0, n_bins + 1)).to(device)


def mass_edges(profile: Profile, n_bins: int) -> Float[Tensor, " m1"]:
    """Borders of bins of equal mass: 0, midpoints between groups, 1; equal borders are merged.

    The sorted examples are split into ``min(n_bins, n)`` groups whose sizes differ by at most one,
    larger groups first.
    """
    ranks = _around(int(profile.total), n_bins).to(profile.confidence.device)
    return _midpoints(profile.quantile_values(ranks))


def mass_edges_of_values(values: Float[Tensor, " n"], n_bins: int) -> Float[Tensor, " m1"]:
    """:func:`mass_edges` of unsorted values."""
    ranks = _around(len(values), n_bins)
    if values.device.type != "cpu":
        return _midpoints(values.sort().values[ranks.to(values.device)])
    # NumPy sorts several times faster than torch, and than it selects this many
    return _midpoints(torch.from_numpy(np.sort(values.numpy()))[ranks])


def _around(n: int, n_bins: int) -> Int[Tensor, " j2"]:
    """Ranks of the last examples of all groups but one, then those of the first ones of the next."""
    _require_bins(n_bins)
    groups = min(n_bins, n)
    sizes = torch.full((groups,), n // groups, dtype=torch.int64)
    sizes[: n % groups] += 1
    ends = sizes.cumsum(0)[:-1]
    return torch.cat([ends - 1, ends])


def _midpoints(around: Float[Tensor, " j2"]) -> Float[Tensor, " m1"]:
    below, above = around.chunk(2) if len(around) else (around, around)
    upper = torch.unique(torch.cat([(below + above) / 2, around.new_ones(1)]))
    return torch.cat([upper.new_zeros(1), upper])


def assign_bins(
    values: Float[Tensor, "*n"], edges: Float[Tensor, " m1"], closed: str = "right"
) -> Int[Tensor, "*n"]:
    """Index of the bin of each value; what lies outside all edges falls into the end bins."""
    inner = edges[1:-1].to(values.dtype).contiguous()
    return torch.bucketize(values.contiguous(), inner, right=closed == "left")


def assign_width(values: Float[Tensor, "*n"], n_bins: int) -> Int[Tensor, "*n"]:
    """:func:`assign_bins` to equal-width bins, several times faster on large inputs.

    The product ``value * n_bins`` decides except within 1e-9 of a border, where the borders
    themselves are compared.
    """
    scaled = values * n_bins
    index = scaled.ceil()
    near = (scaled - scaled.round()).abs_() < 1e-9
    result = index.to(torch.int64).sub_(1).clamp_(0, n_bins - 1)
    if bool(near.any()):
        result[near] = assign_bins(values[near], width_edges(n_bins, values.device))
    return result


def bin_sums(
    scores: Confidences, n_bins: int = 15, scheme: Scheme = "width", compat: Compat | None = None
) -> BinSums:
    """Counts and sums over bins; computed once for a set of confidences and remembered.

    Raises:
        ConfigError: ``n_bins`` below 1, an unknown scheme or convention, or a scheme with a
            convention that does not have it.
    """
    _require_bins(n_bins)
    key = ("bins", n_bins, scheme, compat)
    return scores.cached(key, lambda: _bin_sums(scores, n_bins, scheme, compat))


def profile_bin_sums(profile: Profile, edges: Float[Tensor, " m1"]) -> BinSums:
    """Sums over (lower, upper] bins of every resample of a profile, at given borders."""
    ends = torch.searchsorted(profile.confidence, edges[1:].contiguous(), right=True)
    ends[-1] = len(profile.confidence)
    return BinSums(
        edges,
        segment_sums(profile.count, ends),
        segment_sums(profile.count * profile.confidence, ends),
        segment_sums(profile.hits, ends),
        round(float(profile.total.flatten()[0])),
    )


def _bin_sums(scores: Confidences, n_bins: int, scheme: str, compat: str | None) -> BinSums:
    c = scores.confidence
    if compat is not None:
        return _peer_sums(c, scores.outcome, n_bins, scheme, compat)
    if scheme in ("width", "mass") and len(c) >= HISTOGRAM_FROM:
        return _sums_of_histogram(scores, n_bins, scheme)
    if scheme == "width":
        edges = width_edges(n_bins, c.device)
        return _sums_of_pieces(scores, edges, lambda part: assign_width(part, n_bins))
    if scheme == "mass":
        sorted_already = scores.is_cached("profile")
        if not sorted_already and scores.raw_outcome.dtype == torch.bool and c.device.type == "cpu":
            made = _mass_sums_by_sorting(c, scores.raw_outcome, n_bins)
            if made is not None:
                return made
        edges = (
            mass_edges(scores.profile, n_bins)
            if sorted_already
            else mass_edges_of_values(c, n_bins)
        )
        return _sums_of_pieces(scores, edges, lambda part: assign_bins(part, edges))
    if scheme == "rank":
        t = scores.outcome
        order = torch.argsort(c, stable=True)
        groups = min(n_bins, len(c))
        rank = torch.arange(len(c), device=c.device)
        large, rest = divmod(len(c), groups)  # the first `rest` groups have one more
        cut = rest * (large + 1)
        index = torch.where(rank < cut, rank // (large + 1), rest + (rank - cut) // large)
        last = (torch.bincount(index).cumsum(0) - 1)[:-1]
        ordered = c[order]
        inner = (ordered[last] + ordered[last + 1]) / 2
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
        return _sums(ordered, t[order], index, edges)
    raise ConfigError(f"unknown binning scheme '{scheme}': use width, mass or rank")


def _sums_of_histogram(scores: Confidences, n_bins: int, scheme: str) -> BinSums:
    """Sums over bins of many examples, from one fine histogram for all numbers of bins."""
    table = scores.cached("histogram", lambda: ConfidenceHistogram(scores))
    if scheme == "width":
        edges = width_edges(n_bins, scores.confidence.device)
    else:
        edges = _midpoints(table.order_statistics(_around(len(scores), n_bins)))
    count, confidence, outcome = table.sums(edges)
    return BinSums(edges, count, confidence, outcome, len(scores))


def _mass_sums_by_sorting(c: Tensor, right: Tensor, n_bins: int) -> BinSums | None:
    """Sums over bins of equal mass as sorting parts the examples; None if ties cross a border."""
    ranks = _around(len(c), n_bins)
    last, first = ranks.chunk(2) if len(ranks) else (ranks, ranks)
    key = joined(c, right)
    key.numpy().sort()
    values, hits = parted(key)
    edges = _midpoints(values[ranks])
    inner = edges[1:-1]
    if len(inner) != len(last) or not bool(
        ((values[last] <= inner) & (inner < values[first])).all()
    ):
        return None
    starts = np.concatenate([[0], first.numpy()])
    count = torch.from_numpy(np.diff(starts, append=len(c))).double()
    confidence, outcome = (np.add.reduceat(part.numpy(), starts) for part in (values, hits))
    return BinSums(edges, count, torch.from_numpy(confidence), torch.from_numpy(outcome), len(c))


def _sums_of_pieces(
    scores: Confidences, edges: Tensor, assign: Callable[[Tensor], Tensor]
) -> BinSums:
    """Sums over bins in pieces that fit the cache."""
    bins = len(edges) - 1
    total = torch.zeros((3, bins), dtype=torch.float64, device=edges.device)
    for c, t in scores.pieces():
        index = assign(c)
        weights = (None, c, t.double())
        total += torch.stack(
            [torch.bincount(index, weights=w, minlength=bins).double() for w in weights]
        )
    return BinSums(edges, total[0], total[1], total[2], len(scores))


def _peer_sums(c: Tensor, t: Tensor, n_bins: int, scheme: str, compat: str) -> BinSums:
    if compat == "focal":
        ordered = np.sort(c.cpu().numpy())
        places = np.linspace(0, len(c), n_bins + 1)
        edges = torch.from_numpy(np.interp(places, np.arange(len(c)), ordered)).to(c.device)
        kept = c > edges[0]
        index = assign_bins(c[kept], edges)
        return _sums(c[kept], t[kept], index, edges, total=len(c))
    if scheme != "width":
        raise ConfigError(f"compat='{compat}' has equal-width bins only, not '{scheme}'")
    if compat == "netcal":
        edges = width_edges(n_bins, c.device)
        return _sums(c, t, assign_bins(c, edges, closed="left"), edges)
    if compat == "torchmetrics":
        edges = torch.linspace(0, 1, n_bins + 1, device=c.device)
        single = c.float()
        index = torch.bucketize(single, edges, right=True) - 1  # exactly 1 gets index n_bins
        return _sums(single.double(), t, index, torch.cat([edges, edges[-1:]]).double())
    raise ConfigError(f"unknown convention '{compat}': use netcal, torchmetrics or focal")


def _sums(
    c: Tensor, t: Tensor, index: Tensor, edges: Tensor, *, total: int | None = None
) -> BinSums:
    bins = len(edges) - 1
    return BinSums(
        edges,
        torch.bincount(index, minlength=bins).double(),
        torch.bincount(index, weights=c, minlength=bins).double(),  # of nothing it gives integers
        torch.bincount(index, weights=t, minlength=bins).double(),
        len(c) if total is None else total,
    )


def _require_bins(n_bins: int) -> None:
    if not isinstance(n_bins, Integral) or n_bins < 1:
        raise ConfigError(f"n_bins must be a whole number of at least 1, got {n_bins!r}")
