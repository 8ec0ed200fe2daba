"""The exact law of the winner under Gaussian noise, fast: ``P(argmax(z + eps n) = k)``.

With u = (z - max z)/eps and Φ, φ the normal distribution and density,

    c_k = ∫ G(x) φ(x - u_k)/Φ(x - u_k) dx,    G(x) = Π_j Φ(x - u_j),

by the trapezoid rule, which converges exponentially here. Evaluating Φ for every node and class
costs a hundred transcendental functions per logit. Both dependences on u are smooth, so they are
expanded in Chebyshev polynomials T_r of a variable t(u) instead:

    ln G(x_q) = Σ_r A_qr Σ_j T_r(t_j),
    c_k = exp(-u_k²/4) Σ_r T_r(t_k) Σ_q B_qr G(x_q)/Φ(x_q).

What remains per logit are the T_r, by a recurrence of one multiply-add each; nodes cost only per
row. For many classes the T_r are spanned by products T_a T_mb of a few (m = 4: four times five of
them make twenty), so that both sums are small matrix products. The tables A and B are made once in
float64 by interpolation at Chebyshev points.

Source: the definition is that of Consistency Calibration (arXiv:2410.12295) in the limit of many
samples; the expansion is ours.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import log_ndtr
from torch import Tensor

__all__ = ["gaussian_consistency", "gaussian_log_consistency"]

WIDE = 48
"""Classes from which matrix products take the sums; with fewer, classes run along the first axis, so
that every operation is a long one."""

NARROW_ELEMENTS, WIDE_ELEMENTS = 40_960, 131_072
"""Entries of a block: small enough for the cache, large enough to hide the cost of calls."""

SMALLEST = 1e-15
"""Noise below this counts as this: its square would leave float32, and the winner is certain anyway."""

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
    inner: int
    """m of the products P_a(t) P_b(P_m(t)), a < m; for many classes."""
    log_g: Float[Tensor, "q r"]
    log_first: Float[Tensor, "q 1"]
    weights: Float[Tensor, "r q"]


# step, first and last node, lowest u, polynomials, bend, inner; many classes have a narrow G'
SETTINGS = {
    (torch.float32, False): (0.4, -6.4, 6.8, 10.0, 20, 8.0, 4),
    (torch.float32, True): (0.25, -6.5, 7.0, 10.0, 20, 8.0, 4),
    (torch.float64, False): (0.25, -8.5, 8.5, 14.0, 48, 12.0, 6),
    (torch.float64, True): (0.125, -8.5, 9.0, 14.0, 48, 12.0, 6),
}


@lru_cache(maxsize=16)
def _tables(dtype: torch.dtype, many: bool, device: str) -> _Tables:
    step, first, last, depth, count, bend, inner = SETTINGS[dtype, many]
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
    made = np.cos(np.arange(count)[:, None] * angle) * np.array(turned)[:, None]
    if many:  # the same polynomials spanned by products
        outer = np.arccos(np.clip(np.cos(inner * angle) * turned[inner], -1, 1))
        second = np.cos(np.arange(count // inner)[:, None] * outer)
        second *= np.array(turned)[: count // inner, None]
        made = (made[:inner, None] * second).reshape(count, points)
    change = np.linalg.inv(made @ basis.T)  # from coefficients in T_r to coefficients in `made`
    log_table, kernel_table = (values @ basis.T @ change for values in (log_g, kernel))

    def tensor(values: np.ndarray) -> Tensor:
        return torch.tensor(np.ascontiguousarray(values), dtype=dtype, device=device)

    return _Tables(
        lowest=-depth,
        bend=bend,
        signs=signs,
        inner=inner,
        log_g=tensor(log_table),
        log_first=tensor(log_ndtr(x)),
        weights=tensor(kernel_table.T),
    )


def gaussian_consistency(logits: Float[Tensor, "b k"], epsilon: float) -> Float[Tensor, "b k"]:
    """``P(argmax(z + epsilon n) = k)`` for standard normal n, rows summing to 1.

    float32 input is computed in float32 (absolute error about 1e-6 at 10 classes, up to 2e-5 seen at
    1 000), all else in float64 (1e-9 up to thousands of classes, 1e-13 for ten). Two classes use the
    closed form. Every entry is positive unless it underflows; :func:`gaussian_log_consistency` has no
    such limit.
    """
    epsilon = max(epsilon, SMALLEST)
    z = logits if logits.dtype == torch.float32 else logits.double()
    if z.shape[1] == 2:
        gap = (z[:, 1] - z[:, 0]) / (epsilon * math.sqrt(2))
        return torch.special.ndtr(torch.stack([-gap, gap], dim=1)).to(logits.dtype)
    out = torch.empty_like(z)
    for rows, work in _blocks(z):
        gap, factor, axis = work.expand(z[rows], epsilon)
        # 2 to a power is three times faster than exp
        nothing, power = gap.new_tensor(0.0), -0.25 / math.log(2) / epsilon**2
        factor.mul_(torch.addcmul(nothing, gap, gap, value=power, out=gap).exp2_())
        target = out[rows] if axis else out[rows].t()
        torch.div(factor, factor.sum(dim=axis, keepdim=True), out=target)
    return out.to(logits.dtype)


def gaussian_log_consistency(logits: Float[Tensor, "b k"], epsilon: float) -> Float[Tensor, "b k"]:
    """Logarithm of :func:`gaussian_consistency`, finite where the probability underflows."""
    epsilon = max(epsilon, SMALLEST)
    z = logits if logits.dtype == torch.float32 else logits.double()
    if z.shape[1] == 2:
        gap = (z[:, 1] - z[:, 0]) / (epsilon * math.sqrt(2))
        return torch.special.log_ndtr(torch.stack([-gap, gap], dim=1)).to(logits.dtype)
    out = torch.empty_like(z)
    for rows, work in _blocks(z):
        gap, factor, axis = work.expand(z[rows], epsilon)
        log_p = gap.square_().mul_(-0.25 / epsilon**2).add_(factor.log_())
        out[rows] = (log_p if axis else log_p.t()).log_softmax(dim=1)
    return out.to(logits.dtype)


def _blocks(z: Float[Tensor, "b k"]) -> Iterator[tuple[slice, "_Narrow | _Wide"]]:
    """Blocks of rows with the buffers that all of them share: fresh memory would cost more than the
    arithmetic."""
    wide = z.shape[1] >= WIDE
    size = max(1, (WIDE_ELEMENTS if wide else NARROW_ELEMENTS) // z.shape[1])
    work = None
    for start in range(0, len(z), size):
        rows = slice(start, min(start + size, len(z)))
        count = rows.stop - rows.start
        if work is None or count != work.rows:
            work = (_Wide if wide else _Narrow)(count, z)
        yield rows, work


class _Narrow:
    """Buffers for few classes, which run along the first axis so that every operation is long."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.rows = rows
        self.tables = _tables(like.dtype, False, str(like.device))
        shape = (like.shape[1], rows)
        self.gap, self.factor = like.new_empty(shape), like.new_empty(shape)
        self.basis = like.new_empty((len(self.tables.signs), *shape))
        self.basis[0] = 1

    def expand(self, z: Float[Tensor, "b k"], epsilon: float) -> tuple[Tensor, Tensor, int]:
        """``z - max z`` and ``c exp(u²/4)``, classes along axis 0."""
        basis, signs = self.basis, self.tables.signs
        torch.sub(z.t(), z.amax(dim=1), out=self.gap)
        t = _variable(self.gap, epsilon, basis[1], self.tables)
        for r in range(2, len(signs)):
            torch.addcmul(basis[r - 2], t, basis[r - 1], value=signs[r], out=basis[r])
        coefficients = _coefficients(basis.sum(dim=1), self.tables).unsqueeze(1)
        torch.mul(t, coefficients[1], out=self.factor).add_(coefficients[0])
        for r in range(2, len(signs)):
            self.factor.addcmul_(basis[r], coefficients[r])
        return self.gap, self.factor.clamp_(min=FLOOR[z.dtype]), 0


class _Wide:
    """Buffers for many classes, where small matrix products take the sums."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.rows = rows
        self.tables = _tables(like.dtype, True, str(like.device))
        self.inner = self.tables.inner
        self.outer = len(self.tables.signs) // self.inner
        k = like.shape[1]
        # polynomials lie one after the other, so that each step of a recurrence is one long loop;
        # the matrix products take them per row by their strides
        self.gap = like.new_empty((rows, k))
        self.first = like.new_empty((self.inner, rows, k))
        self.second = like.new_empty((self.outer, rows, k))
        self.partial = like.new_empty((rows, self.inner, k))
        self.first[0] = self.second[0] = 1

    def expand(self, z: Float[Tensor, "b k"], epsilon: float) -> tuple[Tensor, Tensor, int]:
        """``z - max z`` and ``c exp(u²/4)``, classes along axis 1."""
        first, second = self.first, self.second
        signs = self.tables.signs
        torch.sub(z, z.amax(dim=1, keepdim=True), out=self.gap)
        t = _variable(self.gap, epsilon, first[1], self.tables)
        for r in range(2, self.inner + 1):
            out = second[1] if r == self.inner else first[r]
            torch.addcmul(first[r - 2], t, first[r - 1], value=signs[r], out=out)
        for r in range(2, self.outer):
            torch.addcmul(second[r - 2], second[1], second[r - 1], value=signs[r], out=second[r])
        by_row = second.transpose(0, 1)
        moments = _products(first.transpose(0, 1), by_row.transpose(1, 2)).flatten(1)
        coefficients = _coefficients(moments.t(), self.tables).t().contiguous()
        shape = (self.rows, self.inner, self.outer)
        _products(coefficients.reshape(shape), by_row, out=self.partial)
        factor = self.partial[:, 0]  # P_0 is 1
        for a in range(1, self.inner):
            factor.addcmul_(first[a], self.partial[:, a])
        return self.gap, factor.clamp_(min=FLOOR[z.dtype]), 1


def _products(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.bmm``; NumPy takes products of such small matrices in a third of the time, but on one
    thread."""
    if a.device.type != "cpu" or torch.get_num_threads() > 2 or torch.compiler.is_compiling():
        return torch.bmm(a, b, out=out)
    made = np.matmul(a.numpy(), b.numpy(), out=None if out is None else out.numpy())
    return torch.from_numpy(made)


def _variable(gap: Tensor, epsilon: float, out: Tensor, tables: _Tables) -> Tensor:
    """The variable t(gap/epsilon) in [-1, 1] of the polynomials."""
    depth, bend = -tables.lowest, tables.bend
    scale = 2 * (depth + bend) / depth
    torch.clamp(gap, min=tables.lowest * epsilon, out=out).sub_(bend * epsilon).reciprocal_()
    first = gap.new_tensor(1 - scale)
    return torch.add(first, out, alpha=-scale * bend * epsilon, out=out)


def _coefficients(moments: Float[Tensor, "r b"], tables: _Tables) -> Float[Tensor, "r b"]:
    """Sums over nodes of B G/Φ for each row, from the sums over classes of the polynomials."""
    products = torch.addmm(tables.log_first, tables.log_g, moments, beta=-1).exp_()
    return tables.weights @ products
