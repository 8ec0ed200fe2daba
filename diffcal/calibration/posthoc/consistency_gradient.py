"""Derivatives of the winner's exact law with respect to the logits.

For independent noise with distribution F and density f, with u = z/eps and
r_j(x) = f(x - u_j)/F(x - u_j), classes j ≠ k compete at the rate

    w_jk = (1/eps) ∫ G(x) r_j(x) r_k(x) dx,    G(x) = Π_l F(x - u_l),

so that ∂c_k/∂z_j = -w_jk and ∂c_k/∂z_k = Σ_j w_jk: a graph Laplacian, whose product with a vector g
needs no matrix,

    (gᵀ J)_j = (1/eps) ∫ G r_j (g_j R - S) dx,    R = Σ_k r_k,  S = Σ_k g_k r_k.

The integrals are those of the laws themselves: the trapezoid rule for Gaussian noise, Gauss-Legendre
between the breakpoints for uniform noise.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.errors import ConfigError

__all__ = ["legendre_nodes", "with_gradient"]

STEP, FIRST, LAST = 1 / 8, -9.0, 9.0
"""Nodes of the trapezoid rule, in noise scales from the best logit; the error is below 1e-13."""

BLOCK_ELEMENTS = 1 << 20

Law = Callable[[Tensor, float], Tensor]


class _Gaussian(torch.autograd.Function):
    """The law as given, with the derivative above; it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, epsilon: float, law: Law) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.epsilon = epsilon
        return law(logits.detach(), epsilon)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        z, g = logits.double(), gradients[0].double()
        size = max(1, BLOCK_ELEMENTS // (z.shape[1] * round((LAST - FIRST) / STEP)))
        parts = zip(z.split(size), g.split(size), strict=True)
        made = torch.cat([_gaussian_product(part, g_part, ctx.epsilon) for part, g_part in parts])
        return made.to(logits.dtype), None, None


def _gaussian_product(
    z: Float[Tensor, "b k"], g: Float[Tensor, "b k"], epsilon: float
) -> Float[Tensor, "b k"]:
    # a common shift does not matter, so that the maximum is a constant even to second derivatives
    u = ((z - z.detach().amax(dim=1, keepdim=True)) / epsilon)[:, None]
    x = torch.arange(FIRST, LAST + STEP / 2, STEP, dtype=z.dtype, device=z.device)[:, None]
    log_f = torch.special.log_ndtr(x - u)
    r = (-0.5 * (x - u).square() - 0.5 * math.log(2 * math.pi) - log_f).exp()
    weight = log_f.sum(dim=2, keepdim=True).exp() * (STEP / epsilon)
    total, weighted = r.sum(dim=2, keepdim=True), (r * g[:, None]).sum(dim=2, keepdim=True)
    return (weight * r * (g[:, None] * total - weighted)).sum(dim=1)


class _Uniform(torch.autograd.Function):
    """The law as given, with the derivative above; once only, for it has kinks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, epsilon: float, law: Law) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.epsilon = epsilon
        return law(logits.detach(), epsilon)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise ConfigError(
                "the uniform law has kinks and no second derivative: differentiate it without "
                "create_graph, or take gaussian noise"
            )
        (logits,) = ctx.saved_tensors
        s, order = logits.double().sort(dim=1, descending=True)
        u = (s - s[:, :1]) / ctx.epsilon
        g = gradients[0].double().gather(1, order)
        active = (u > -1).sum(dim=1)
        made = torch.zeros_like(u)
        for count in active.unique().tolist():
            rows = (active == count).nonzero()[:, 0]
            for part in rows.split(max(1, BLOCK_ELEMENTS // (count * min(count, 64)))):
                made[part, :count] = _uniform_product(u[part, :count], g[part, :count])
        made = torch.zeros_like(made).scatter_(1, order, made / ctx.epsilon)
        return made.to(logits.dtype), None, None


def _uniform_product(u: Float[Tensor, "b i"], g: Float[Tensor, "b i"]) -> Float[Tensor, "b i"]:
    ends = torch.cat([1 + u, torch.zeros_like(u[:, :1])], dim=1)
    made = torch.zeros_like(u)
    for i in range(2, u.shape[1] + 1):  # a class alone has no rival
        width = ends[:, i - 1] - ends[:, i]
        widest = float(width.max())
        if widest <= 0:
            continue
        nodes, weights = legendre_nodes(min((i + 1) // 2, math.ceil(8 + 56 * widest)))
        factors = (
            ends[:, i, None, None] + (width[:, None] * nodes.to(u))[:, :, None] - u[:, None, :i]
        )
        r, part = 1 / factors, g[:, None, :i]
        weight = factors.prod(dim=2, keepdim=True) * (weights.to(u) * width[:, None])[:, :, None]
        total, weighted = r.sum(dim=2, keepdim=True), (r * part).sum(dim=2, keepdim=True)
        made[:, :i] += (weight * r * (part * total - weighted)).sum(dim=1)
    return made


@lru_cache(maxsize=64)
def legendre_nodes(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def with_gradient(
    logits: Float[Tensor, "b k"], epsilon: float, law: Law, noise: str
) -> Float[Tensor, "b k"]:
    """``law(logits, epsilon)``, differentiable with respect to the logits.

    Args:
        logits: Of any floating format.
        epsilon: Noise scale; it gets no gradient.
        law: Computes the winner's law for tensors without gradient.
        noise: ``gaussian`` (its derivative can be differentiated again) or ``uniform`` (it cannot).
    """
    function = {"gaussian": _Gaussian, "uniform": _Uniform}[noise]
    return function.apply(logits, epsilon, law)
