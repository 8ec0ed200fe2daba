"""Smooth ECE: the calibration error under a reflected Gaussian kernel, at its own bandwidth."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.inputs import Confidences
from diffcal.calibration.metrics.profile import PIECE, Profile
from diffcal.errors import ConfigError

__all__ = [
    "GaussianSmoother",
    "linear_nodes",
    "smooth_calibration_error",
    "smooth_error_at",
    "smooth_errors_of_profile",
]

SMALLEST_SIGMA = 1e-3


class GaussianSmoother:
    """Convolution on [0, 1] with a Gaussian that is reflected at both ends, by FFT.

    Mass is put on ``cells + 1`` nodes by linear splitting, extended evenly to a periodic sequence of
    length ``2 cells`` (the end nodes count twice, so that an example at exactly 0 or 1 keeps its full
    weight) and multiplied by the transform of the kernel.
    """

    def __init__(self, device: torch.device | str = "cpu", cells: int = 8192) -> None:
        self.cells = cells
        frequency = torch.arange(cells + 1, dtype=torch.float64, device=device) / 2  # period 2
        self._exponent = -2 * (math.pi * frequency).square()

    def spread(
        self, position: Float[Tensor, " m"], mass: Float[Tensor, "*r m"]
    ) -> Float[Tensor, "*r g"]:
        """Transform of the periodic even extension of ``mass`` at ``position``."""
        size = PIECE if mass.ndim == 1 else max(len(position), 1)
        nodes = mass.new_zeros((*mass.shape[:-1], self.cells + 1))
        for start in range(0, len(position), size):
            part = slice(start, start + size)
            nodes += linear_nodes(position[part] * self.cells, mass[..., part], self.cells + 1)
        nodes[..., 0] *= 2
        nodes[..., -1] *= 2
        periodic = torch.cat([nodes, nodes[..., 1:-1].flip(-1)], dim=-1)
        # the extension is even, so its transform is real
        return torch.fft.rfft(periodic).real * self.cells

    def smooth(
        self, transform: Float[Tensor, "*r g"], sigma: Float[Tensor, "*s"]
    ) -> Float[Tensor, "*r g"]:
        """Density on the nodes after smoothing; ``sigma`` is one bandwidth or one per leading index."""
        kernel = torch.exp(self._exponent * sigma[..., None].square())
        full = torch.fft.irfft((transform * kernel).to(torch.complex128), n=2 * self.cells)
        return full[..., : self.cells + 1]

    def absolute_integral(
        self, transform: Float[Tensor, "*r g"], sigma: Float[Tensor, "*s"]
    ) -> Float[Tensor, "*r"]:
        """Integral over [0, 1] of the absolute value of the smoothed density (trapezoid rule)."""
        values = self.smooth(transform, sigma).abs()
        ends = (values[..., 0] + values[..., -1]) / 2
        return (values.sum(dim=-1) - ends) / self.cells


def linear_nodes(
    position: Float[Tensor, " m"], mass: Float[Tensor, "*r m"], nodes: int
) -> Float[Tensor, "*r g"]:
    """``mass`` at real positions (in node spacings) split linearly between the two nearest nodes."""
    lower = position.floor().clamp(0, nodes - 2)
    upper_share = position - lower
    index = lower.to(torch.int64)
    if mass.ndim == 1:
        left = torch.bincount(index, weights=mass * (1 - upper_share), minlength=nodes)
        return left + torch.bincount(index + 1, weights=mass * upper_share, minlength=nodes)
    out = mass.new_zeros((*mass.shape[:-1], nodes))
    out.index_add_(-1, index, mass * (1 - upper_share))
    return out.index_add_(-1, index + 1, mass * upper_share)


def smooth_calibration_error(scores: Confidences, cells: int = 8192) -> float:
    """smECE of the confidences, in [0, 1]: the smallest σ with ``smECE_σ <= σ``.

    ``smECE_σ`` is the integral over [0, 1] of ``|1/N Σ_i K_σ(x, c_i) (c_i - t_i)|`` with a Gaussian
    kernel reflected at 0 and 1. The authors' package relplot gives examples at exactly 0 or 1 half
    their weight; here they have all of it. Below σ = 1e-3 the value at 1e-3 is returned.

    Source: Błasiok and Nakkiran 2024 (arXiv:2309.12236), section 3.
    """

    def make() -> float:
        smoother = GaussianSmoother(scores.confidence.device, cells)
        parts = [smoother.spread(c, c - t.double()) for c, t in scores.pieces()]
        transform = torch.stack(parts).sum(dim=0) / len(scores)
        return float(_fixed_point(smoother, transform))

    return scores.cached(("smece", cells), make)


def smooth_error_at(scores: Confidences, sigma: float, cells: int = 8192) -> float:
    """``smECE_σ`` at a given bandwidth.

    Raises:
        ConfigError: ``sigma`` is not positive.
    """
    if not sigma > 0:
        raise ConfigError(f"sigma must be positive, got {sigma}")
    c, r = scores.confidence, scores.confidence - scores.outcome
    smoother = GaussianSmoother(c.device, cells)
    width = torch.tensor(sigma, dtype=torch.float64, device=c.device)
    return float(smoother.absolute_integral(smoother.spread(c, r / len(c)), width))


def smooth_errors_of_profile(profile: Profile, cells: int = 1024) -> Float[Tensor, "*r"]:
    """smECE of each resample of a profile, on a coarser grid by default (error below 1e-4)."""
    smoother = GaussianSmoother(profile.confidence.device, cells)
    transform = smoother.spread(profile.confidence, profile.residual / profile.total[..., None])
    return _fixed_point(smoother, transform)


def _fixed_point(smoother: GaussianSmoother, transform: Tensor) -> Tensor:
    """The integral falls as sigma rises, so that the crossing with the diagonal is bisected."""
    shape = transform.shape[:-1]
    low = torch.full(shape, SMALLEST_SIGMA, dtype=torch.float64, device=transform.device)
    high = torch.ones_like(low)
    at_least = smoother.absolute_integral(transform, low)
    for _ in range(34):  # the last interval is 6e-11 wide
        middle = (low + high) / 2
        above = smoother.absolute_integral(transform, middle) > middle
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(at_least <= SMALLEST_SIGMA, at_least, (low + high) / 2)
