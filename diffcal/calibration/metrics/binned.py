"""Binned calibration errors of the top label (or of one event): ECE and its relatives."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.binning import BinSums, Compat, Scheme, bin_sums
from diffcal.calibration.metrics.inputs import Confidences
from diffcal.errors import ConfigError

__all__ = [
    "average_calibration_error",
    "average_of_sums",
    "calibration_gap",
    "ece_of_sums",
    "expected_calibration_error",
    "maximum_calibration_error",
    "mce_of_sums",
    "over_confidence_error",
    "over_confidence_part",
    "over_part_of_sums",
    "root_mean_square_calibration_error",
    "under_confidence_error",
    "under_confidence_part",
    "under_part_of_sums",
]


def expected_calibration_error(
    scores: Confidences,
    n_bins: int = 15,
    scheme: Scheme = "width",
    norm: float = 1.0,
    compat: Compat | None = None,
) -> float:
    """Weighted gap between mean confidence and accuracy over bins, a fraction in [0, 1].

    ``(Σ_b n_b/N |acc_b - conf_b|^p)^(1/p)`` with p = ``norm``; infinity gives the largest gap.
    Bins are (lower, upper] in float64. With the scheme ``mass`` it is the adaptive (equal-mass) ECE.

    Raises:
        ConfigError: ``norm`` below 1 or unusable binning.

    Source: Naeini et al. 2015; Guo et al. 2017 (arXiv:1706.04599), equation 3; Nguyen and O'Connor
    2015 for equal mass.
    """
    return float(ece_of_sums(bin_sums(scores, n_bins, scheme, compat), norm))


def root_mean_square_calibration_error(
    scores: Confidences, n_bins: int = 15, scheme: Scheme = "width", compat: Compat | None = None
) -> float:
    """:func:`expected_calibration_error` with norm 2.

    Source: Hendrycks et al. 2019 (arXiv:1812.04606).
    """
    return expected_calibration_error(scores, n_bins, scheme, 2.0, compat)


def maximum_calibration_error(
    scores: Confidences,
    n_bins: int = 15,
    scheme: Scheme = "width",
    min_count: int = 1,
    compat: Compat | None = None,
) -> float:
    """Largest gap between mean confidence and accuracy over bins of at least ``min_count`` examples.

    With many bins a bin of one example decides it; raise ``min_count`` to avoid that. NaN if no bin
    is large enough.

    Source: Naeini et al. 2015; Guo et al. 2017 (arXiv:1706.04599), equation 5.
    """
    return float(mce_of_sums(bin_sums(scores, n_bins, scheme, compat), min_count))


def average_calibration_error(
    scores: Confidences, n_bins: int = 15, scheme: Scheme = "width", compat: Compat | None = None
) -> float:
    """Unweighted mean of the absolute gaps over non-empty bins (what netcal calls ACE).

    Source: Neumann et al. 2018.
    """
    return float(average_of_sums(bin_sums(scores, n_bins, scheme, compat)))


def calibration_gap(scores: Confidences) -> float:
    """Mean confidence minus accuracy, signed: positive is over-confident. The ECE of one bin."""
    return scores.moments["c"] - scores.moments["t"]


def over_confidence_part(
    scores: Confidences, n_bins: int = 15, scheme: Scheme = "width", compat: Compat | None = None
) -> float:
    """The part of the ECE from bins whose confidence exceeds their accuracy."""
    return float(over_part_of_sums(bin_sums(scores, n_bins, scheme, compat)))


def under_confidence_part(
    scores: Confidences, n_bins: int = 15, scheme: Scheme = "width", compat: Compat | None = None
) -> float:
    """The part of the ECE from bins whose accuracy exceeds their confidence."""
    return float(under_part_of_sums(bin_sums(scores, n_bins, scheme, compat)))


def over_confidence_error(
    scores: Confidences, n_bins: int = 15, scheme: Scheme = "width", compat: Compat | None = None
) -> float:
    """Over-confident gaps weighted by confidence: ``Σ_b w_b conf_b max(conf_b - acc_b, 0)``.

    Source: Thulasidasan et al. 2019 (arXiv:1905.11001), section 3.
    """
    sums = bin_sums(scores, n_bins, scheme, compat).filled
    return float((sums.weight * sums.mean_confidence * sums.gap.clamp(min=0)).sum())


def under_confidence_error(
    scores: Confidences, n_bins: int = 15, scheme: Scheme = "width", compat: Compat | None = None
) -> float:
    """Under-confident gaps weighted by accuracy: ``Σ_b w_b acc_b max(acc_b - conf_b, 0)``.

    The mirror image of :func:`over_confidence_error`.
    """
    sums = bin_sums(scores, n_bins, scheme, compat).filled
    return float((sums.weight * sums.mean_outcome * (-sums.gap).clamp(min=0)).sum())


def ece_of_sums(sums: BinSums, norm: float = 1.0) -> Float[Tensor, "*r"]:
    """:func:`expected_calibration_error` of ready sums, one value per leading index."""
    if norm < 1:
        raise ConfigError(f"norm must be at least 1, got {norm}")
    if math.isinf(norm):
        return mce_of_sums(sums)
    residual = (sums.confidence - sums.outcome).abs()
    if norm == 1:  # n_b |conf_b - acc_b| is the residual itself
        return residual.sum(dim=-1) / sums.total
    gap = residual / sums.count.clamp(min=1)
    return (sums.weight * gap**norm).sum(dim=-1) ** (1 / norm)


def mce_of_sums(sums: BinSums, min_count: int = 1) -> Float[Tensor, "*r"]:
    """:func:`maximum_calibration_error` of ready sums."""
    large = sums.count >= max(min_count, 1)
    gap = torch.where(large, sums.gap.abs(), -1).amax(dim=-1)
    return torch.where(gap < 0, math.nan, gap)


def average_of_sums(sums: BinSums) -> Float[Tensor, "*r"]:
    """:func:`average_calibration_error` of ready sums."""
    filled = sums.count > 0
    return torch.where(filled, sums.gap.abs(), 0).sum(dim=-1) / filled.sum(dim=-1).double()


def over_part_of_sums(sums: BinSums) -> Float[Tensor, "*r"]:
    """:func:`over_confidence_part` of ready sums."""
    return (sums.confidence - sums.outcome).clamp(min=0).sum(dim=-1) / sums.total


def under_part_of_sums(sums: BinSums) -> Float[Tensor, "*r"]:
    """:func:`under_confidence_part` of ready sums."""
    return (sums.outcome - sums.confidence).clamp(min=0).sum(dim=-1) / sums.total
