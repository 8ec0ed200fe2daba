"""Reliability curves: accuracy as a function of confidence, binned or smooth, with intervals."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.binning import Compat, Scheme, bin_sums
from diffcal.calibration.metrics.inputs import Confidences
from diffcal.calibration.metrics.intervals import resample_profile
from diffcal.calibration.metrics.profile import Profile
from diffcal.calibration.metrics.smooth import GaussianSmoother, smooth_calibration_error
from diffcal.errors import ConfigError

__all__ = [
    "ReliabilityCurve",
    "SmoothReliabilityCurve",
    "reliability_curve",
    "smooth_reliability_curve",
    "wilson_interval",
]


@dataclass(frozen=True)
class ReliabilityCurve:
    """One entry per bin, float64; empty bins have count 0 and NaN elsewhere."""

    edges: Float[Tensor, " m1"]
    count: Float[Tensor, " m"]
    confidence: Float[Tensor, " m"]
    """Mean confidence."""
    accuracy: Float[Tensor, " m"]
    """Mean outcome."""
    low: Float[Tensor, " m"]
    """Lower end of the interval of the accuracy."""
    high: Float[Tensor, " m"]

    @property
    def gap(self) -> Float[Tensor, " m"]:
        """Confidence minus accuracy."""
        return self.confidence - self.accuracy


def reliability_curve(
    scores: Confidences,
    n_bins: int = 15,
    scheme: Scheme = "width",
    level: float = 0.95,
    compat: Compat | None = None,
) -> ReliabilityCurve:
    """Confidence and accuracy of each bin with Wilson intervals, what a reliability diagram draws.

    Source: DeGroot and Fienberg 1983; Wilson 1927 for the interval.
    """
    sums = bin_sums(scores, n_bins, scheme, compat)
    low, high = wilson_interval(sums.outcome, sums.count, level)
    return ReliabilityCurve(
        sums.edges, sums.count, sums.mean_confidence, sums.mean_outcome, low, high
    )


def wilson_interval(
    hits: Float[Tensor, "*m"], count: Float[Tensor, "*m"], level: float = 0.95
) -> tuple[Float[Tensor, "*m"], Float[Tensor, "*m"]]:
    """Wilson score interval of a proportion; NaN where ``count`` is 0.

    Raises:
        ConfigError: ``level`` is not inside (0, 1).
    """
    if not 0 < level < 1:
        raise ConfigError(f"level must lie strictly between 0 and 1, got {level}")
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
    p = hits / count
    scale = 1 + z * z / count
    centre = (p + z * z / (2 * count)) / scale
    half = z / scale * (p * (1 - p) / count + z * z / (4 * count.square())).sqrt()
    return (centre - half).clamp(min=0), (centre + half).clamp(max=1)


@dataclass(frozen=True)
class SmoothReliabilityCurve:
    """Kernel regression of the outcome on the confidence, on a grid of [0, 1], float64."""

    grid: Float[Tensor, " g"]
    accuracy: Float[Tensor, " g"]
    """NaN where there is practically no data."""
    density: Float[Tensor, " g"]
    """Density of the confidences, integral 1."""
    low: Float[Tensor, " g"]
    high: Float[Tensor, " g"]
    """Pointwise bootstrap percentiles of the accuracy."""
    sigma: float
    """Bandwidth of the Gaussian kernel."""


def smooth_reliability_curve(
    scores: Confidences,
    sigma: float | None = None,
    level: float = 0.95,
    n_resamples: int = 200,
    seed: int = 0,
    points: int = 513,
) -> SmoothReliabilityCurve:
    """Smooth accuracy against confidence at the bandwidth of the smooth ECE, with a bootstrap band.

    Args:
        sigma: Bandwidth; None takes that of the smooth ECE, but at least 0.01 and the spacing that
            leaves about ten examples under the kernel.
        points: Grid points from 0 to 1.

    Source: Błasiok and Nakkiran 2024 (arXiv:2309.12236), section 4.
    """
    n = len(scores)
    if sigma is None:
        sigma = max(smooth_calibration_error(scores), 0.01, min(0.1, 10 / n))
    smoother = GaussianSmoother(scores.confidence.device, points - 1)
    accuracy, density = _regress(smoother, scores.profile, sigma)
    # far from all data nothing is known; one example contributes 0.4 at its own place
    accuracy = torch.where(density * n * sigma > 0.05, accuracy, math.nan)
    low = high = torch.full_like(accuracy, math.nan)
    if n_resamples > 0:
        tail = (1 - level) / 2
        resampled, _ = _regress(smoother, resample_profile(scores, n_resamples, seed), sigma)
        low, high = (resampled.nanquantile(end, dim=0) for end in (tail, 1 - tail))
    grid = torch.linspace(0, 1, points, dtype=torch.float64, device=accuracy.device)
    return SmoothReliabilityCurve(grid, accuracy, density, low, high, float(sigma))


def _regress(
    smoother: GaussianSmoother, profile: Profile, sigma: float
) -> tuple[Float[Tensor, "*r g"], Float[Tensor, "*r g"]]:
    width = torch.tensor(sigma, dtype=torch.float64, device=profile.confidence.device)
    total = profile.total[..., None]
    mass = smoother.smooth(smoother.spread(profile.confidence, profile.count / total), width)
    hits = smoother.smooth(smoother.spread(profile.confidence, profile.hits / total), width)
    return (hits / mass.clamp(min=1e-12)).clamp(0, 1), mass
