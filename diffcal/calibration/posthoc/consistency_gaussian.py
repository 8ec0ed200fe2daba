"""The exact law of the winner under Gaussian noise, fast: ``P(argmax(z + eps n) = k)``.

With u = (z - max z)/eps and Φ, φ the normal distribution and density,

    c_k = ∫ G(x) φ(x - u_k)/Φ(x - u_k) dx,    G(x) = Π_j Φ(x - u_j),

by the trapezoid rule, which converges exponentially here. Evaluating Φ for every node and class
costs a hundred transcendental functions per logit. Both dependences on u are smooth, so they are
expanded in Chebyshev polynomials T_r of a variable t(u) instead:

    ln G(x_q) = Σ_r A_qr Σ_j T_r(t_j),
    c_k = exp(-u_k²/4) Σ_r T_r(t_k) Σ_q B_qr G(x_q)/Φ(x_q).

What remains per logit are the T_r, by a recurrence of one multiply-add each; nodes cost only per
row. The tables A and B are made once in float64 by interpolation at Chebyshev points.

Source: the definition is that of Consistency Calibration (arXiv:2410.12295) in the limit of many
samples; the expansion is ours.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import log_ndtr
from torch import Tensor

__all__ = ["gaussian_consistency", "gaussian_log_consistency"]

WIDE = 48
"""Classes from which rows are worked on as they lie; fewer are transposed first, so that every
operation runs along the rows."""

LOG_TINY = -700.0
FLOOR = {torch.float32: 1e-30, torch.float64: 1e-290}
"""Below this the expansion's sum is rounding; positive, so that no class gets exactly nothing."""


@dataclass(frozen=True)
class _Tables:
    """The expansion for one precision; see the module's text for A and B."""

    lowest: float
    """u below this enters the polynomials as this; it only counts through exp(-u²/4) then."""
    bend: float
    """t = 1 - 2 v (bend - lowest)/(-lowest) with v = u/(u - bend): finer near u = 0."""
    signs: tuple[float, ...]
    """Factors of the recurrence P_r = P_{r-2} + signs_r t P_{r-1}, in which P_r = ±T_r."""
    log_g: Float[Tensor, "q r"]
    log_first: Float[Tensor, "q 1"]
    weights: Float[Tensor, "r q"]


# step, first and last node, lowest u, polynomials, bend
SETTINGS = {
    (torch.float32, False): (0.4, -6.4, 6.8, 10.0, 20, 8.0),
    (torch.float32, True): (0.25, -6.5, 7.0, 10.0, 20, 8.0),
    (torch.float64, False): (0.25, -8.5, 8.5, 14.0, 48, 12.0),
    (torch.float64, True): (0.125, -8.5, 9.0, 14.0, 48, 12.0),
}


@lru_cache(maxsize=16)
def _tables(dtype: torch.dtype, many: bool, device: str) -> _Tables:
    step, first, last, depth, count, bend = SETTINGS[dtype, many]
    x = np.arange(first, last + step / 2, step)[:, None]
    points = 4 * count
    angle = np.pi * (np.arange(points) + 0.5) / points
    v = (1 - np.cos(angle)) / 2 * depth / (depth + bend)
    u = -bend * v / (1 - v)
    log_g = log_ndtr(x - u)
    log_phi = -0.5 * (x - u) ** 2 - 0.5 * math.log(2 * math.pi)
    kernel = step * np.exp(log_phi + u**2 / 4 - log_g + log_ndtr(x))
    basis = np.cos(np.arange(count)[:, None] * angle) * (2 / points)
    basis[0] /= 2
    turned = [1.0, 1.0]  # signs by which P_r differs from T_r
    for r in range(2, count):
        turned.append(-turned[r - 2])
    signs = (0.0, 0.0, *(2 * turned[r] / turned[r - 1] for r in range(2, count)))

    def tensor(values: np.ndarray) -> Tensor:
        return torch.tensor(np.ascontiguousarray(values), dtype=dtype, device=device)

    return _Tables(
        lowest=-depth,
        bend=bend,
        signs=signs,
        log_g=tensor(log_g @ basis.T * turned),
        log_first=tensor(log_ndtr(x)),
        weights=tensor((kernel @ basis.T * turned).T),
    )


def gaussian_consistency(logits: Float[Tensor, "b k"], epsilon: float) -> Float[Tensor, "b k"]:
    """``P(argmax(z + epsilon n) = k)`` for standard normal n, rows summing to 1.

    float32 input is computed in float32 (absolute error about 1e-6), all else in float64 (1e-9 up to
    thousands of classes, 1e-13 for ten). Two classes use the closed form. Every entry is positive
    unless it underflows; :func:`gaussian_log_consistency` has no such limit.
    """
    z = logits if logits.dtype == torch.float32 else logits.double()
    if z.shape[1] == 2:
        gap = (z[:, 1] - z[:, 0]) / (epsilon * math.sqrt(2))
        return torch.special.ndtr(torch.stack([-gap, gap], dim=1)).to(logits.dtype)
    transposed = z.shape[1] < WIDE
    u, factor = _expand(z.t().contiguous() if transposed else z, epsilon, transposed)
    probs = u.square_().mul_(-0.25).exp_().mul_(factor)
    axis = 0 if transposed else 1
    probs /= probs.sum(dim=axis, keepdim=True)
    return (probs.t() if transposed else probs).to(logits.dtype)


def gaussian_log_consistency(logits: Float[Tensor, "b k"], epsilon: float) -> Float[Tensor, "b k"]:
    """Logarithm of :func:`gaussian_consistency`, finite where the probability underflows."""
    z = logits if logits.dtype == torch.float32 else logits.double()
    if z.shape[1] == 2:
        gap = (z[:, 1] - z[:, 0]) / (epsilon * math.sqrt(2))
        return torch.special.log_ndtr(torch.stack([-gap, gap], dim=1)).to(logits.dtype)
    transposed = z.shape[1] < WIDE
    u, factor = _expand(z.t().contiguous() if transposed else z, epsilon, transposed)
    log_p = u.square_().mul_(-0.25).add_(factor.log_())
    log_p = (log_p.t() if transposed else log_p).contiguous()
    return log_p.log_softmax(dim=1).to(logits.dtype)


def _expand(z: Tensor, epsilon: float, transposed: bool) -> tuple[Tensor, Tensor]:
    """u, and c exp(u²/4) of every entry; classes run along axis 0 if ``transposed``, else 1."""
    axis = 0 if transposed else 1
    many = z.shape[axis] >= WIDE
    tables = _tables(z.dtype, many, str(z.device))
    depth, bend = -tables.lowest, tables.bend
    u = (z - z.amax(dim=axis, keepdim=True)).div_(epsilon).clamp_(min=-1e8)
    scale = 2 * (depth + bend) / depth
    t = (bend - u.clamp(min=tables.lowest)).reciprocal_().mul_(scale * bend).add_(1 - scale)
    count = len(tables.signs)
    basis = z.new_empty((count, *z.shape))
    basis[0] = 1
    basis[1] = t
    for r in range(2, count):
        torch.addcmul(basis[r - 2], t, basis[r - 1], value=tables.signs[r], out=basis[r])
    moments = basis.sum(dim=axis + 1)
    products = torch.addmm(tables.log_first, tables.log_g, moments, beta=-1).exp_()
    coefficients = (tables.weights @ products).unsqueeze(axis + 1)
    factor = basis[1].mul_(coefficients[1]).add_(coefficients[0])
    for r in range(2, count):
        factor.addcmul_(basis[r], coefficients[r])
    return u, factor.clamp_(min=FLOOR[z.dtype])
