"""Selective classification: how well confidence ranks right predictions above wrong ones."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.inputs import Confidences
from diffcal.calibration.metrics.profile import Profile
from diffcal.errors import ConfigError

__all__ = [
    "RiskCoverage",
    "area_under_generalised_risk_coverage",
    "area_under_risk_coverage",
    "augrc_of_profile",
    "aurc_of_profile",
    "auroc_of_confidence",
    "auroc_of_profile",
    "coverage_at_risk",
    "excess_area_under_risk_coverage",
    "optimal_area_under_risk_coverage",
    "optimal_aurc_of_profile",
    "risk_coverage_curve",
    "selective_accuracy",
]


@dataclass(frozen=True)
class RiskCoverage:
    """Risk among the most confident examples at the end of each block of equal confidences."""

    coverage: Float[Tensor, " m"]
    """Share of examples kept, rising to 1."""
    risk: Float[Tensor, " m"]
    """Share of errors among the kept."""
    threshold: Float[Tensor, " m"]
    """Examples of at least this confidence are kept."""


def risk_coverage_curve(scores: Confidences) -> RiskCoverage:
    """Risk against coverage as the confidence threshold falls.

    Source: El-Yaniv and Wiener 2010; Geifman and El-Yaniv 2017 (arXiv:1705.08500).
    """
    c, kept, errors = _falling(scores.profile)
    return RiskCoverage(kept / kept[-1], errors / kept, c)


def area_under_risk_coverage(scores: Confidences) -> float:
    """AURC: mean over j = 1..N of the risk among the j most confident examples.

    The errors of a block of equal confidences are spread evenly over it.

    Source: Geifman, Uziel and El-Yaniv 2019 (arXiv:1805.08206).
    """
    return scores.cached("aurc", lambda: float(aurc_of_profile(scores.profile)))


def aurc_of_profile(profile: Profile) -> Float[Tensor, "*r"]:
    """:func:`area_under_risk_coverage` of each resample of a profile."""
    total = torch.zeros_like(profile.total)
    kept_before, errors_before = total, total
    for piece in profile.pieces(falling=True):
        count, failed = piece.count.flip(-1), (piece.count - piece.hits).flip(-1)
        kept = count.cumsum(dim=-1).add_(kept_before[..., None])
        errors = failed.cumsum(dim=-1).add_(errors_before[..., None])
        # sum over i = 1..m of (E + e i/m) / (n + i) = (E - e n/m) (H(n + m) - H(n)) + e
        rate = failed / count.clamp(min=1)
        edges = torch.cat([kept_before[..., None], kept], dim=-1)
        harmonic = torch.special.digamma(edges + 1).diff(dim=-1)
        areas = (errors - failed - rate * (kept - count)) * harmonic + failed
        total = total + torch.where(count > 0, areas, 0).sum(dim=-1)
        kept_before, errors_before = kept[..., -1], errors[..., -1]
    return total / profile.total


def optimal_area_under_risk_coverage(scores: Confidences) -> float:
    """AURC if all right predictions were ranked above all wrong ones: ``1/N Σ_j max(0, j-(N-E))/j``."""
    return float(optimal_aurc_of_profile(scores.profile))


def optimal_aurc_of_profile(profile: Profile) -> Float[Tensor, "*r"]:
    """:func:`optimal_area_under_risk_coverage` of each resample of a profile, in closed form."""
    n, right = profile.total, profile.hits.sum(dim=-1)
    # the sum over j from the first whole j above R to N of (j - R)/j
    whole = torch.floor(right + 1e-9)
    harmonic = torch.special.digamma(n + 1) - torch.special.digamma(whole + 1)
    return (n - whole - right * harmonic) / n


def excess_area_under_risk_coverage(scores: Confidences, geifman: bool = False) -> float:
    """E-AURC: AURC minus that of the perfect ordering with the same accuracy.

    Args:
        geifman: Subtract the paper's approximation ``r + (1-r) log(1-r)`` instead of the exact sum.

    Source: Geifman, Uziel and El-Yaniv 2019 (arXiv:1805.08206), section 3.
    """
    area = area_under_risk_coverage(scores)
    if not geifman:
        return area - optimal_area_under_risk_coverage(scores)
    risk = 1 - scores.mean_outcome
    return area - (risk + ((1 - risk) * math.log1p(-risk) if risk < 1 else 0.0))


def area_under_generalised_risk_coverage(scores: Confidences) -> float:
    """AUGRC: mean over j of the errors among the j most confident examples divided by N.

    Source: Traub et al. 2024 (arXiv:2407.01032).
    """
    return float(augrc_of_profile(scores.profile))


def augrc_of_profile(profile: Profile) -> Float[Tensor, "*r"]:
    """:func:`area_under_generalised_risk_coverage` of each resample of a profile."""
    total = torch.zeros_like(profile.total)
    before = total
    for piece in profile.pieces(falling=True):
        count, failed = piece.count.flip(-1), (piece.count - piece.hits).flip(-1)
        errors = failed.cumsum(dim=-1).add_(before[..., None])
        # errors before the block stay for all m of its steps, its own enter evenly: e (m + 1) / 2
        areas = (errors - failed) * count + failed * (count + 1) / 2
        total = total + areas.sum(dim=-1)
        before = errors[..., -1]
    return total / profile.total.square()


def auroc_of_confidence(scores: Confidences) -> float:
    """Probability that a right prediction is more confident than a wrong one, ties half.

    NaN if all predictions are right or all are wrong.
    """
    return float(auroc_of_profile(scores.profile))


def auroc_of_profile(profile: Profile) -> Float[Tensor, "*r"]:
    """:func:`auroc_of_confidence` of each resample of a profile."""
    wins = torch.zeros_like(profile.total)
    carry = wins
    for piece in profile.pieces():
        wrong = piece.count - piece.hits
        running = wrong.cumsum(dim=-1).add_(carry[..., None])
        wins = wins + (piece.hits * (running - wrong / 2)).sum(dim=-1)
        carry = running[..., -1]
    pairs = profile.hits.sum(dim=-1) * carry
    return torch.where(pairs > 0, wins / pairs, math.nan)


def selective_accuracy(scores: Confidences, coverage: float) -> float:
    """Accuracy of the ``ceil(coverage N)`` most confident examples; ties are shared evenly.

    Raises:
        ConfigError: ``coverage`` outside (0, 1].
    """
    if not 0 < coverage <= 1:
        raise ConfigError(f"coverage must lie in (0, 1], got {coverage}")
    _, kept, errors = _falling(scores.profile)
    n = len(scores)
    wanted = min(n, math.ceil(coverage * n - 1e-9))  # 0.7 * 10 is 7.000000000000001
    block = int(torch.searchsorted(kept, torch.tensor(float(wanted), dtype=kept.dtype).to(kept)))
    before = float(kept[block - 1]) if block else 0.0
    errors_before = float(errors[block - 1]) if block else 0.0
    share = (wanted - before) / (float(kept[block]) - before)
    lost = errors_before + share * (float(errors[block]) - errors_before)
    return 1 - lost / wanted


def coverage_at_risk(scores: Confidences, risk: float) -> float:
    """Largest coverage at which the risk is at most ``risk``; 0 if even the first example errs.

    Any number of examples may be kept; inside a block of equal confidences errors are spread evenly.

    Raises:
        ConfigError: ``risk`` outside [0, 1].
    """
    if not 0 <= risk <= 1:
        raise ConfigError(f"risk must lie in [0, 1], got {risk}")
    _, kept, errors = _falling(scores.profile)
    n = float(kept[-1])
    count = torch.diff(kept, prepend=kept.new_zeros(1))
    failed = torch.diff(errors, prepend=errors.new_zeros(1))
    before, errors_before = kept - count, errors - failed
    # largest whole i in 0..m with E + e i/m <= risk (n + i)
    slack = risk * before - errors_before
    slope = failed / count - risk
    steps = torch.where(
        slope > 1e-15, torch.floor(slack / slope.clamp(min=1e-15) + 1e-9), count
    ).clamp(max=count)
    # with falling risk inside the block only its end can be the largest
    fits = torch.where(
        slope > 1e-15, (slack >= -1e-12) & (steps >= 1), slack >= slope * count - 1e-12
    )
    best = torch.where(fits, before + steps, 0).max()
    return float(best) / n


def _falling(
    profile: Profile,
) -> tuple[Float[Tensor, " m"], Float[Tensor, "*r m"], Float[Tensor, "*r m"]]:
    """Confidences in falling order with examples and errors up to and including each."""
    kept = profile.count.flip(-1).cumsum(dim=-1)
    errors = (profile.count - profile.hits).flip(-1).cumsum(dim=-1)
    return profile.confidence.flip(-1), kept, errors
