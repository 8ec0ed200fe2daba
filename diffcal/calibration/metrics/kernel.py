"""Calibration errors without bins: Kolmogorov-Smirnov, kernel density and maximum mean errors."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.profile import Profile
from diffcal.calibration.metrics.smooth import linear_nodes

__all__ = [
    "classwise_ks_error",
    "kernel_density_calibration_error",
    "kernel_density_errors",
    "ks_calibration_error",
    "ks_errors",
    "maximum_mean_calibration_error",
    "mmce_errors",
    "squared_kernel_calibration_error",
]

MMCE_RATE = 2.5  # 1 / (width 0.4) of the Laplacian kernel
KDE_LOW, KDE_HIGH, KDE_POINTS = -0.6, 1.6, 2**14
KDE_DUST = 1e-6
TRIWEIGHT = 35 / 32


def ks_calibration_error(scores: Confidences) -> float:
    """Largest absolute cumulative sum of confidence minus outcome along rising confidence, over N.

    Evaluated at the ends of blocks of equal confidences, so that it does not depend on their order.

    Source: Gupta et al. 2021 (arXiv:2006.12800), equation 7.
    """
    return float(ks_errors(scores.profile))


def ks_errors(profile: Profile) -> Float[Tensor, "*r"]:
    """:func:`ks_calibration_error` of each resample of a profile."""
    carry = torch.zeros_like(profile.total)
    largest = carry
    for piece in profile.pieces():
        running = piece.residual.cumsum(dim=-1).add_(carry[..., None])
        largest = torch.maximum(largest, running.abs().amax(dim=-1))
        carry = running[..., -1]
    return largest / profile.total


def classwise_ks_error(predictions: Predictions) -> float:
    """Mean over classes of the KS error of each class probability against the rest."""
    values = [
        ks_errors(Profile.of(predictions.class_probs(index), predictions.class_targets(index)))
        for index in range(predictions.classes)
    ]
    return float(torch.stack(values).mean())


def maximum_mean_calibration_error(scores: Confidences) -> float:
    """MMCE: ``sqrt(1/N² Σ_ij r_i r_j exp(-2.5 |c_i - c_j|))`` with r = c - outcome, in O(N log N).

    The square root is taken, as in netcal; training losses usually leave the square.

    Source: Kumar, Sarawagi and Jain 2018 (ICML), equation 7.
    """
    return float(mmce_errors(scores.profile))


def mmce_errors(profile: Profile) -> Float[Tensor, "*r"]:
    """:func:`maximum_mean_calibration_error` of each resample of a profile."""
    return (_kernel_sum(profile).clamp(min=0)).sqrt() / profile.total


def squared_kernel_calibration_error(scores: Confidences) -> float:
    """Unbiased estimate of the squared MMCE (no diagonal); may be negative. NaN for one example.

    Source: Widmann, Lindsten and Zachariah 2019 (arXiv:1910.11385), SKCE with the MMCE kernel.
    """
    n = len(scores)
    if n < 2:
        return math.nan
    diagonal = (scores.confidence - scores.outcome).square().sum()
    return float((_kernel_sum(scores.profile) - diagonal) / (n * (n - 1)))


def _kernel_sum(profile: Profile) -> Float[Tensor, "*r"]:
    # exp(-a (c_i - c_j)) splits into factors of i and of j, at most e^2.5 apart
    carry = torch.zeros_like(profile.total)
    total = carry
    for piece in profile.pieces():
        r = piece.residual
        left = torch.exp(-MMCE_RATE * piece.confidence)
        lifted = r / left
        running = lifted.cumsum(dim=-1).add_(carry[..., None])
        before = running - lifted
        total = total + r.square().sum(dim=-1) + 2 * (r * left * before).sum(dim=-1)
        carry = running[..., -1]
    return total


def kernel_density_calibration_error(
    scores: Confidences, points: int = KDE_POINTS, quirk: bool = False
) -> float:
    """KDE-ECE: integral over [0, 1] of ``|x - a(x)| f(x)`` with kernel estimates of f and a.

    ``a(x) = min(accuracy f1(x) / f(x), 1)``; f and f1 are triweight density estimates of all
    confidences and of those of right predictions, with reflection at 0 and 1 and the common bandwidth
    (standard deviation of the kernel) ``std(right) (2N)^(-1/5)``. NaN, never 0, if nothing is right
    or all right confidences are equal. Two classes: pass ``Confidences`` of P(class 1) for the
    behaviour of the original, which then leaves the top label.

    Args:
        points: Grid points from -0.6 to 1.6; 2048 is accurate to 1e-4.
        quirk: Where both densities vanish repeat the integrand's previous value, as the original, whose
            values may then exceed 1 where few confidences leave gaps. The benchmark's measures do.

    Source: Zhang, Kailkhura and Han 2020 (arXiv:2003.07329), section 3.2.
    """
    return float(kernel_density_errors(scores.profile, points, quirk))


def kernel_density_errors(
    profile: Profile, points: int = KDE_POINTS, quirk: bool = False
) -> Float[Tensor, "*r"]:
    """:func:`kernel_density_calibration_error` of each resample of a profile."""
    c, total = profile.confidence, profile.total
    right = profile.hits.sum(dim=-1)
    mean = (profile.hits * c).sum(dim=-1) / right
    variance = torch.zeros_like(right)
    for piece in profile.pieces():
        centred = piece.confidence - mean[..., None]
        variance = variance + (piece.hits * centred.square()).sum(dim=-1)
    variance = variance / right
    width = variance.sqrt() * (2 * total) ** -0.2
    # a spread below rounding (all right confidences equal) leaves the estimate undefined
    defined = (right > 0) & (width > 1e-12)
    radius = torch.where(defined, 3 * width, 1.0)
    nodes, nodes1 = _reflected_nodes(profile, float(radius.max()), points)
    f = _density(nodes / total[..., None], radius)
    f1 = _density(nodes1 / right.clamp(min=1e-300)[..., None], radius)
    grid = torch.linspace(KDE_LOW, KDE_HIGH, points, dtype=torch.float64, device=c.device)
    outside = (grid <= 0) | (grid >= 1)
    f, f1 = f.masked_fill(outside, 0), f1.masked_fill(outside, 0)
    accuracy = torch.clamp((right / total)[..., None] * f1 / f.clamp(min=1e-300), max=1)
    integrand = (grid - accuracy).abs() * f
    known = (f > KDE_DUST) | (f1 > KDE_DUST)
    known = known & ~outside
    integrand = torch.where(known, integrand, 0)
    if quirk:
        place = torch.where(known, torch.arange(points, device=c.device), -1).cummax(-1).values
        repeated = integrand.gather(-1, place.clamp(min=0))
        integrand = torch.where(outside | (place < 0), 0, repeated)
    value = torch.trapezoid(integrand, grid) / torch.trapezoid(f, grid)
    return torch.where(defined, value, math.nan)


def _reflected_nodes(
    profile: Profile, reach: float, points: int
) -> tuple[Float[Tensor, "*r g"], Float[Tensor, "*r g"]]:
    """Counts and hits on the grid with their mirror images at 0 and 1, as far as kernels reach."""
    step = (KDE_HIGH - KDE_LOW) / (points - 1)
    shape = (*profile.total.shape, points)
    nodes = torch.zeros(shape, dtype=torch.float64, device=profile.confidence.device)
    nodes1 = torch.zeros_like(nodes)
    low, high = max(KDE_LOW, -reach), min(KDE_HIGH, 1 + reach)
    for piece in profile.pieces():
        for image in (piece.confidence, -piece.confidence, 2 - piece.confidence):
            near = (image > low) & (image < high)
            if not bool(near.any()):
                continue
            part = slice(None) if bool(near.all()) else near
            position = (image[part] - KDE_LOW) / step
            nodes += linear_nodes(position, piece.count[..., part], points)
            nodes1 += linear_nodes(position, piece.hits[..., part], points)
    return nodes, nodes1


def _density(nodes: Float[Tensor, "*r g"], radius: Float[Tensor, "*r"]) -> Float[Tensor, "*r g"]:
    """Triweight density on the grid of mass on its nodes, by FFT."""
    points = nodes.shape[-1]
    length = 2 * points
    step = (KDE_HIGH - KDE_LOW) / (points - 1)
    offset = torch.arange(points, dtype=torch.float64, device=nodes.device) * step
    scaled = offset / radius[..., None]
    kernel = TRIWEIGHT * (1 - scaled.square()).clamp(min=0) ** 3 / radius[..., None]
    gap = kernel.new_zeros((*kernel.shape[:-1], 1))
    even = torch.cat([kernel, gap, kernel[..., 1:].flip(-1)], dim=-1)
    product = torch.fft.rfft(nodes, n=length) * torch.fft.rfft(even, n=length)
    return torch.fft.irfft(product, n=length)[..., :points].clamp(min=0)
