"""The exact law of the winner under uniform and Gumbel noise, and all laws by name."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcal.calibration.posthoc.consistency_gaussian import (
    gaussian_consistency,
    gaussian_log_consistency,
)
from diffcal.calibration.posthoc.consistency_gradient import legendre_nodes, with_gradient
from diffcal.errors import ConfigError

__all__ = [
    "LOG_CONSISTENCY",
    "NoiseLaw",
    "exact_consistency",
    "gumbel_consistency",
    "uniform_consistency",
]

NoiseLaw = Literal["gaussian", "uniform", "gumbel"]

PIECE_ELEMENTS = 1 << 20

CHUNK_ELEMENTS = 1 << 20
"""Logits that are sorted and grouped together: what is gathered then stays in the cache."""

FEW_ACTIVE, FEW_ROWS, FEW_ELEMENTS = 16, 64, 1 << 17
"""Up to how many classes that can win, and from how many such rows, rows run along the last axis; and
the entries of a block then."""


def exact_consistency(
    logits: Float[Tensor, "b k"], epsilon: float, noise: NoiseLaw = "gaussian"
) -> Float[Tensor, "b k"]:
    """``P(argmax(z + epsilon n) = k)``: what Consistency Calibration samples, without sampling.

    The argmax is kept, a common shift of a row changes nothing, and the result is deterministic.

    Args:
        logits: Finite, any floating format; the result has the same, and its gradient. With Gaussian
            and Gumbel noise that can be differentiated again.
        epsilon: Noise scale, positive; it gets no gradient.
        noise: Law of independent n: standard normal, uniform on [0, 1), or standard Gumbel.

    Raises:
        ConfigError: ``epsilon`` is not positive.

    Source: Tao et al. 2024 (arXiv:2410.12295); the closed forms are ours.
    """
    if not epsilon > 0:
        raise ConfigError(f"epsilon must be positive, got {epsilon}")
    if noise == "gumbel":
        return gumbel_consistency(logits, epsilon)
    law = gaussian_consistency if noise == "gaussian" else uniform_consistency
    return with_gradient(logits, epsilon, law, noise)


def gumbel_consistency(logits: Float[Tensor, "b k"], epsilon: float) -> Float[Tensor, "b k"]:
    """``softmax(z / epsilon)``: with Gumbel noise Consistency Calibration is temperature scaling."""
    return (logits / epsilon).softmax(dim=1)


def gumbel_log_consistency(logits: Float[Tensor, "b k"], epsilon: float) -> Float[Tensor, "b k"]:
    """Logarithm of :func:`gumbel_consistency`."""
    return (logits / epsilon).log_softmax(dim=1)


def uniform_consistency(logits: Float[Tensor, "b k"], epsilon: float) -> Float[Tensor, "b k"]:
    """The winner's law for uniform noise: exactly 0 for classes ``epsilon`` or more below the best.

    With y = (x - max z)/epsilon and u = (z - max z)/epsilon the winning value y lies in [0, 1], and
    ``c_k = ∫ Π_{j≠k} min(y - u_j, 1) dy`` is a polynomial between the points 1 + u_j: in the i-th
    piece from above only the i largest classes are not certain to be exceeded. Gauss-Legendre
    quadrature is exact with ⌈i/2⌉ nodes; narrow pieces of very many classes take fewer (8, rising to
    64 for the widest), which is exact to rounding. Up to FEW_ACTIVE classes are computed in the
    precision of the logits, at least float32, in which ``c_k`` is then right to 3e-7.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    probs = torch.zeros_like(z)
    chunk = max(1, CHUNK_ELEMENTS // z.shape[1])
    for part, out in zip(z.split(chunk), probs.split(chunk), strict=True):
        order = _descending(part)
        u = part.gather(1, order)
        u = (u - u[:, :1]) / epsilon
        out.scatter_(1, order, _uniform_of_sorted(u))
    return probs.to(logits.dtype)


def _descending(z: Float[Tensor, "b k"]) -> Int[Tensor, "b k"]:
    """Classes from the largest logit; tied ones in any order, as they win equally often."""
    if z.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(z.neg().numpy().argsort(axis=1))  # several times torch's speed
    return z.argsort(dim=1, descending=True)


def _uniform_of_sorted(u: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    active = (u > -1).sum(dim=1)
    by_active = _grouped(active)  # rows with equally many classes side by side
    u = u.index_select(0, by_active)
    probs = torch.zeros_like(u)
    start = 0
    for count, rows in enumerate(active.bincount().tolist()):
        few = count <= FEW_ACTIVE and rows >= FEW_ROWS
        law = _uniform_of_few if few else _uniform_of_active
        per_row = count if few else count * min((count + 1) // 2, 64)
        size = max(1, (FEW_ELEMENTS if few else PIECE_ELEMENTS) // max(per_row, 1))
        for first in range(start, start + rows, size):
            part = slice(first, min(first + size, start + rows))
            probs[part, :count] = law(u[part, :count])
        start += rows
    return torch.empty_like(probs).index_copy_(0, by_active, probs)


def _grouped(counts: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Rows in the order of their counts."""
    few = counts.device.type == "cpu" and not torch.compiler.is_compiling()
    if few and len(counts) and int(counts.max()) < 256:
        # Bytes are sorted by counting them.
        return torch.from_numpy(counts.to(torch.uint8).numpy().argsort(kind="stable"))
    return counts.argsort()


def _uniform_of_few(u: Float[Tensor, "b i"]) -> Float[Tensor, "b i"]:
    """:func:`_uniform_of_active` with the rows along the last axis, so that operations are long."""
    u = u.t().contiguous()
    count = len(u)
    ends = torch.cat([1 + u, torch.zeros_like(u[:1])])
    probs, factors = torch.zeros_like(u), torch.empty_like(u)
    for i in range(1, count + 1):
        width = ends[i - 1] - ends[i]
        nodes, weights = legendre_nodes((i + 1) // 2)
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            some = torch.sub(torch.add(ends[i], width, alpha=node), u[:i], out=factors[:i])
            product = width * weight
            for factor in some:
                product.mul_(factor)
            probs[:i].addcdiv_(product, some)
    return probs.div_(probs.sum(dim=0)).t()


def _uniform_of_active(sorted_u: Float[Tensor, "b i"]) -> Float[Tensor, "b i"]:
    u = sorted_u.double()
    ends = torch.cat([1 + u, torch.zeros_like(u[:, :1])], dim=1)  # falling from 1 to 0
    probs = torch.zeros_like(u)
    for i in range(1, u.shape[1] + 1):
        width = ends[:, i - 1] - ends[:, i]
        widest = float(width.max())
        if widest <= 0:
            continue
        nodes, weights = legendre_nodes(min((i + 1) // 2, math.ceil(8 + 56 * widest)))
        y = ends[:, i, None] + width[:, None] * nodes.to(u)
        factors = y[:, :, None] - u[:, None, :i]
        product = factors.prod(dim=2) * (weights.to(u) * width[:, None])
        # y exceeds every u_k inside the piece, so that leaving one factor out is a division
        probs[:, :i] += (product[:, :, None] / factors).sum(dim=1)
    return (probs / probs.sum(dim=1, keepdim=True)).to(sorted_u.dtype)


LOG_CONSISTENCY: dict[str, Callable[[Tensor, float], Tensor]] = {
    "gaussian": gaussian_log_consistency,
    "uniform": lambda z, epsilon: uniform_consistency(z, epsilon).log(),
    "gumbel": gumbel_log_consistency,
}
"""Logarithms of the laws; minus infinity for uniform noise where a class cannot win."""
