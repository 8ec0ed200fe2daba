"""Binned errors corrected for their bias: debiased, sweep, and the noise floor of a perfect model."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from diffcal.calibration.metrics.binning import (
    BinSums,
    Scheme,
    assign_bins,
    bin_sums,
    width_edges,
)
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.profile import in_order, stable_order
from diffcal.errors import ConfigError

__all__ = [
    "SweepResult",
    "debiased_calibration_error",
    "debiased_classwise_error",
    "debiased_square_of_sums",
    "debiased_squared_error",
    "ece_noise_floor",
    "noise_floor_draws",
    "sweep_calibration_error",
]


def debiased_squared_error(scores: Confidences, n_bins: int = 15, scheme: Scheme = "mass") -> float:
    """Squared calibration error over bins with its sampling bias subtracted; may be negative.

    ``Σ_b w_b [(conf_b - acc_b)² - acc_b (1 - acc_b)/(n_b - 1)]``; bins of one example contribute 0.
    Average this one over data sets or seeds, not its root.

    Source: Kumar, Liang and Ma 2019 (arXiv:1909.10155), section 5.
    """
    return float(debiased_square_of_sums(bin_sums(scores, n_bins, scheme)))


def debiased_calibration_error(
    scores: Confidences, n_bins: int = 15, scheme: Scheme = "mass"
) -> float:
    """Root of :func:`debiased_squared_error`, 0 where that is negative."""
    return math.sqrt(max(0.0, debiased_squared_error(scores, n_bins, scheme)))


def debiased_classwise_error(
    predictions: Predictions, n_bins: int = 15, scheme: Scheme = "mass"
) -> float:
    """Root of the mean over classes of the squared debiased errors (marginal calibration error)."""
    values = []
    for index in range(predictions.classes):
        part = Confidences(
            predictions.class_probs(index).clamp(max=1), predictions.class_targets(index)
        )
        # the reference clips each class's estimate at 0 before it averages
        values.append(max(0.0, debiased_squared_error(part, n_bins, scheme)))
    return math.sqrt(sum(values) / len(values))


def debiased_square_of_sums(sums: BinSums) -> Float[Tensor, "*r"]:
    """:func:`debiased_squared_error` of ready sums."""
    accuracy = sums.mean_outcome
    bias = accuracy * (1 - accuracy) / (sums.count - 1)
    term = torch.where(sums.count > 1, sums.gap.square() - bias, 0)
    return (sums.weight * term).sum(dim=-1)


@dataclass(frozen=True)
class SweepResult:
    """A sweep ECE and the number of bins it settled on."""

    value: float
    n_bins: int


def _between(running: Shaped[Tensor, " n"], ends: Int[Tensor, " m"]) -> Float[Tensor, " b"]:
    """Differences at consecutive ``ends`` (exclusive, from 0) of sums of the first 1, 2, ... values."""
    at_ends = running[(ends - 1).clamp(min=0)].double()
    at_ends[0] = 0
    return at_ends.diff()


def sweep_calibration_error(scores: Confidences, norm: float = 1.0) -> SweepResult:
    """Equal-mass ECE with the largest number of bins whose accuracies still rise.

    Bins are raised from 1 until accuracies are not non-decreasing; the last good number counts.
    Groups hold exactly equal numbers, ties are in the order of the examples.

    Source: Roelofs et al. 2022 (arXiv:2012.08668), algorithm 1.
    """
    # Millions of examples: every array of theirs counts, so that none outlives its use.
    profile, n = scores.profile, len(scores)
    tied = len(profile.confidence) < n  # then outcomes need the order of the examples
    t = profile.hits
    if tied:
        t = scores.raw_outcome[stable_order(scores.confidence)]
    if bool((t[1:] >= t[:-1]).all()):  # then bins of single examples rise, and so do all others
        errors = (scores.confidence - scores.raw_outcome.double()).abs()
        return SweepResult(float((errors**norm).mean() ** (1 / norm)), n)
    whole = torch.int32 if t.dtype == torch.bool else torch.float64
    sum_t = torch.cumsum(t, 0, dtype=whole)
    del t
    sum_c = in_order(scores.confidence).cumsum_(0) if tied else profile.confidence.cumsum(0)
    best = SweepResult(float("nan"), 0)
    for bins in range(1, n + 1):
        ends = _rank_ends(n, bins, sum_t.device)
        count = torch.diff(ends).double()
        accuracy = _between(sum_t, ends) / count
        # bins of sums that differ by rounding only count as equal
        if bool((torch.diff(accuracy) < -1e-12).any()):
            break
        gap = (_between(sum_c, ends) / count - accuracy).abs()
        best = SweepResult(float((count / n * gap**norm).sum() ** (1 / norm)), bins)
    return best


def _rank_ends(n: int, bins: int, device: torch.device) -> Tensor:
    sizes = torch.full((bins,), n // bins, dtype=torch.int64, device=device)
    sizes[: n % bins] += 1
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def ece_noise_floor(
    scores: Confidences,
    n_bins: int = 15,
    scheme: Scheme = "width",
    n_resamples: int = 200,
    seed: int = 0,
) -> float:
    """Mean ECE of a perfectly calibrated model with these very confidences: what sampling alone gives.

    Outcomes are redrawn from the confidences ``n_resamples`` times. In bins of more than a thousand
    examples the number of hits is drawn from its normal limit.

    Raises:
        ConfigError: ``n_resamples`` below 1.
    """
    return float(noise_floor_draws(scores, n_bins, scheme, n_resamples, seed).mean())


def noise_floor_draws(
    scores: Confidences,
    n_bins: int = 15,
    scheme: Scheme = "width",
    n_resamples: int = 200,
    seed: int = 0,
) -> Float[Tensor, " r"]:
    """The ECEs behind :func:`ece_noise_floor`, for quantiles."""
    if n_resamples < 1:
        raise ConfigError(f"n_resamples must be at least 1, got {n_resamples}")
    sums = bin_sums(scores, n_bins, scheme)
    c = scores.profile.confidence
    count = scores.profile.count
    if scheme == "rank":
        raise ConfigError("the noise floor has the schemes width and mass")
    edges = width_edges(n_bins, c.device) if scheme == "width" else sums.edges
    ends = torch.searchsorted(c, edges[1:].contiguous(), right=True)
    ends[-1] = len(c)
    generator = torch.Generator().manual_seed(seed)
    bins = torch.diff(ends, prepend=ends.new_zeros(1))
    # hits minus their expectation has variance sum of c(1 - c)
    variance = torch.zeros(len(bins), dtype=torch.float64, device=c.device)
    for piece in scores.profile.pieces():
        weights = piece.count * piece.confidence * (1 - piece.confidence)
        index = assign_bins(piece.confidence, edges)
        variance += torch.bincount(index, weights=weights, minlength=len(bins))
    spread = variance.clamp(min=0).sqrt()
    draws = torch.randn((n_resamples, len(bins)), generator=generator, dtype=torch.float64)
    gaps = draws.to(c.device).mul_(spread).abs_()
    small = (bins <= 1000) & (bins > 0)
    for index in small.nonzero()[:, 0].tolist():
        part = slice(int(ends[index] - bins[index]), int(ends[index]))
        gaps[:, index] = _exact_gaps(c[part], count[part], n_resamples, generator)
    return gaps.sum(dim=1) / float(count.sum())


def _exact_gaps(c: Tensor, count: Tensor, n_resamples: int, generator: torch.Generator) -> Tensor:
    p = torch.repeat_interleave(c, count.to(torch.int64)).cpu()
    uniform = torch.rand((n_resamples, len(p)), generator=generator, dtype=torch.float64)
    return ((uniform < p).double().sum(dim=1) - p.sum()).abs().to(c.device)
