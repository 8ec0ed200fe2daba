"""The exact law of the winner under Gaussian noise, fast: ``P(argmax(z + eps n) = k)``.

With u = (z - max z)/eps and Φ, φ the normal distribution and density,

    c_k = ∫ G(x) φ(x - u_k)/Φ(x - u_k) dx,    G(x) = Π_j Φ(x - u_j),

by the trapezoid rule, which converges exponentially here. Evaluating Φ for every node and class
costs a hundred transcendental functions per logit. Both dependences on u are smooth, so they are
expanded in Chebyshev polynomials T_r of a variable t(u) instead:

    ln G(x_q) = Σ_r A_qr Σ_j T_r(t_j),
    c_k = exp(-u_k²/4) Σ_r T_r(t_k) Σ_q B_qr G(x_q)/Φ(x_q),

with fewer r in the second line, as errors of the first one add up over the classes.
What remains per logit are the T_r, by a recurrence of one multiply-add each; nodes cost only per
row. For many classes the T_r are spanned by products P_a(t) P_b(T_m(t)) of a few (m = 4: four times
five of them make twenty), so that both sums are small matrix products. The tables A and B are made
once in float64 by interpolation at Chebyshev points.

Source: the definition is that of Consistency Calibration (arXiv:2410.12295) in the limit of many
samples; the expansion is ours.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import log_ndtr
from torch import Tensor

from diffcal.core.devices import one_thread
from diffcal.core.tensors import lay_out
from diffcal.core.workers import share_out

__all__ = ["gaussian_consistency", "gaussian_log_consistency"]

WIDE = 48
"""Classes from which matrix products take the sums; with fewer, classes run along the first axis, so
that every operation is a long one."""

BLOCK_ELEMENTS = 1 << 16
"""Entries of a block on the CPU: small enough for the cache, large enough to hide the cost of calls.
Blocks are shared among threads, each of which takes its own alone."""

NARROW_ELEMENTS = 1 << 15
"""The same with few classes, which need more buffers."""

WORKER_ELEMENTS = 1 << 17
"""Entries that pay for a thread."""

DEVICE_ELEMENTS = 1 << 20
"""Entries of a block elsewhere."""

SMALLEST = 1e-15
"""Noise below this counts as this: its square would leave float32, and the winner is certain anyway."""

FLOOR = {torch.float32: 1e-30, torch.float64: 1e-290}
"""Below this the expansion's sum is rounding; positive, so that no class gets exactly nothing."""

NEGLIGIBLE = {torch.float32: -56.0, torch.float64: -430.0}
"""log2 G/Φ below this counts as this: far below rounding, and products stay normal numbers, as others
take a processor a hundred times as long."""


BEND = 0.2
"""t = s + BEND s² for an s linear in u: t is finer near u = 0."""


def _straight(t: np.ndarray) -> np.ndarray:
    """s of t."""
    return (np.sqrt(1 + 4 * BEND * t) - 1) / (2 * BEND)


FIRST, LAST = _straight(np.array([-1.0, 1.0])).tolist()
"""s of the lowest u and of u = 0."""


@dataclass(frozen=True)
class _Tables:
    """The expansion for one precision; see the module's text for A and B."""

    depth: float
    """u below its negative enters the polynomials as that; it only counts through exp(-u²/4) then."""
    inner: int
    """m of the products P_a(t) P_b(T_m(t)), a power of 2, for many classes."""
    log_g: Float[Tensor, "r q"]
    """For the logarithm to base 2, as are ``log_first``."""
    constant: int
    """r of the polynomial that is 1."""
    log_first: Float[Tensor, " q"]
    weights: Float[Tensor, "q s"]


# by the most classes: step, first and last node, depth, polynomials of A and B, inner; many classes have
# a narrow G' and add up errors of A
SETTINGS = {
    torch.float32: {
        16: (0.5, -6.25, 5.25, 9.6, 16, 16, 1),
        WIDE - 1: (0.4, -6.0, 6.4, 9.6, 18, 16, 1),
        sys.maxsize: (0.25, -6.5, 7.0, 9.4, 20, 16, 4),
    },
    torch.float64: {
        WIDE - 1: (0.25, -8.5, 8.5, 14.0, 48, 48, 1),
        sys.maxsize: (0.125, -8.5, 9.0, 14.0, 48, 48, 8),
    },
}


@lru_cache(maxsize=16)
def _tables(dtype: torch.dtype, most: int, device: str) -> _Tables:
    """For up to ``most`` classes, one of the numbers in the settings."""
    step, first, last, depth, count, fewer, inner = SETTINGS[dtype][most]
    x = np.arange(first, last + step / 2, step)[:, None]
    points = 4 * count
    angle = np.pi * (np.arange(points) + 0.5) / points
    u = depth * (_straight(np.cos(angle)) - LAST) / (LAST - FIRST)
    log_g = log_ndtr(x - u)
    log_phi = -0.5 * (x - u) ** 2 - 0.5 * math.log(2 * math.pi)
    kernel = step * np.exp(log_phi + u**2 / 4 - log_g + log_ndtr(x))
    # sums over classes come with b outside and falling a, those over nodes are taken with a outside
    by_degree = _basis(angle, count, inner).reshape(inner, -1, points)
    summed = by_degree[::-1].swapaxes(0, 1).reshape(count, points)
    taken = _basis(angle, fewer, inner)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.tensor(np.ascontiguousarray(values), dtype=dtype, device=device)

    return _Tables(
        depth=depth,
        inner=inner,
        log_g=tensor(_expanded(log_g, summed, angle).T / math.log(2)),
        constant=inner - 1,
        log_first=tensor(log_ndtr(x)[:, 0] / math.log(2)),
        weights=tensor(_expanded(kernel, taken, angle)),
    )


def _expanded(values: np.ndarray, made: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Coefficients ``[q, r]`` of functions ``[q, points]`` in the polynomials ``[r, points]``."""
    basis = np.cos(np.arange(len(made))[:, None] * angle) * (2 / len(angle))
    basis[0] /= 2
    return values @ basis.T @ np.linalg.inv(made @ basis.T)


def _basis(angle: np.ndarray, count: int, inner: int) -> np.ndarray:
    """The polynomials ``[r, points]`` that the buffers make of ``t = cos(angle)``, with rising a."""

    def made(t: Tensor, size: int) -> Tensor:
        made = t.new_ones(size, len(t))
        made[1] = t
        for step in _fill(made, made[0]):
            step()
        return made

    t = torch.from_numpy(np.cos(angle))
    if inner == 1:
        return made(t, count).numpy()
    *first, outer = made(t, inner + 1)
    second = made(outer, count // inner)
    return (torch.stack(first)[:, None] * second).flatten(0, 1).numpy()


def _fill(made: Tensor | list[Tensor], one: Tensor) -> list[Callable[[], object]]:
    """Steps to polynomials of every degree r >= 2 within ±1, from 1 and t: ±T_r for powers of 2, and
    products of these, which take less memory traffic than a recurrence. In one tensor, all products
    with one power are one step."""
    steps, power = [], 2
    while power < len(made):
        half, more = made[power // 2], min(power, len(made) - power) - 1
        steps.append(partial(torch.addcmul, one, half, half, value=-2.0, out=made[power]))
        if isinstance(made, Tensor):
            pairs = [(made[1:][:more], made[power + 1 :][:more])] if more else []
        else:
            pairs = zip(made[1:][:more], made[power + 1 :][:more], strict=True)
        steps += [partial(torch.mul, made[power], factor, out=out) for factor, out in pairs]
        power *= 2
    return steps


def gaussian_consistency(
    logits: Float[Tensor, "b k"], epsilon: float, out: Float[Tensor, "b k"] | None = None
) -> Float[Tensor, "b k"]:
    """``P(argmax(z + epsilon n) = k)`` for standard normal n, rows summing to 1.

    float32 input is computed in float32 (absolute error about 1e-6 at 10 classes, up to 7e-5 seen at
    1 000), all else in float64 (1e-9 up to thousands of classes, 1e-13 for ten). Two classes use the
    closed form. Every entry is positive unless it underflows; :func:`gaussian_log_consistency` has no
    such limit.

    Args:
        out: Takes the result, in its own format; by default new, in that of ``logits``.
    """
    epsilon = max(epsilon, SMALLEST)
    z = logits if logits.dtype == torch.float32 else logits.double()
    out = torch.empty_like(logits) if out is None else out
    if z.shape[1] == 2:
        gap = (z[:, 1] - z[:, 0]) / (epsilon * math.sqrt(2))
        return out.copy_(torch.special.ndtr(torch.stack([-gap, gap], dim=1)))
    nothing, power = z.new_tensor(0.0), -0.25 / math.log(2) / epsilon**2

    def law(rows: slice, work: _Narrow | _Wide) -> None:
        factor, gap, axis = work.expand(z[rows]), work.gap, work.axis
        # 2 to a power is three times faster than exp
        factor.mul_(torch.addcmul(nothing, gap, gap, value=power, out=gap).exp2_())
        total = factor.sum(dim=axis, keepdim=True)
        if axis:
            torch.div(factor, total, out=out[rows])
        else:
            lay_out(factor.div_(total), out[rows].t())

    _by_blocks(z, epsilon, law)
    return out


def gaussian_log_consistency(logits: Float[Tensor, "b k"], epsilon: float) -> Float[Tensor, "b k"]:
    """Logarithm of :func:`gaussian_consistency`, finite where the probability underflows."""
    epsilon = max(epsilon, SMALLEST)
    z = logits if logits.dtype == torch.float32 else logits.double()
    if z.shape[1] == 2:
        gap = (z[:, 1] - z[:, 0]) / (epsilon * math.sqrt(2))
        return torch.special.log_ndtr(torch.stack([-gap, gap], dim=1)).to(logits.dtype)
    out = torch.empty_like(z)

    def law(rows: slice, work: _Narrow | _Wide) -> None:
        factor = work.expand(z[rows])
        log_p = work.gap.square_().mul_(-0.25 / epsilon**2).add_(factor.log_())
        out[rows] = (log_p if work.axis else log_p.t()).log_softmax(dim=1)

    _by_blocks(z, epsilon, law)
    return out.to(logits.dtype)


def _by_blocks(
    z: Float[Tensor, "b k"], epsilon: float, law: Callable[[slice, "_Narrow | _Wide"], None]
) -> None:
    """Call ``law`` with blocks of rows and buffers, on the CPU by as many threads as torch has."""
    n, k = z.shape
    on_cpu = z.device.type == "cpu" and not torch.compiler.is_compiling()
    workers = min(torch.get_num_threads(), n * k // WORKER_ELEMENTS) if on_cpu else 1
    elements = BLOCK_ELEMENTS if k >= WIDE else NARROW_ELEMENTS
    size = max(1, (elements if on_cpu else DEVICE_ELEMENTS) // k)
    starts = range(0, n, size)
    # less work for each call; a mode belongs to a thread
    inference = on_cpu or torch.is_inference_mode_enabled()

    def work(starts: Iterator[int]) -> None:
        buffers = None  # shared by the blocks: fresh memory would cost more than the arithmetic
        with torch.inference_mode(inference):
            for start in starts:
                rows = slice(start, min(start + size, n))
                count = rows.stop - start
                if buffers is None or count != buffers.rows:
                    buffers = (_Wide if k >= WIDE else _Narrow)(count, z, epsilon)
                law(rows, buffers)

    if not on_cpu:
        work(iter(starts))
        return
    with one_thread():
        share_out(starts, workers, work)


class _Buffers:
    """Memory for blocks of ``rows`` rows, and the steps that fill it from ``z - max z``.

    Steps work on the same memory for every block, so that each is a call made ready once.
    """

    axis: ClassVar[int]
    """Of the classes."""

    def __init__(self, rows: int, shape: tuple[int, int], like: Tensor, epsilon: float) -> None:
        self.rows = rows
        classes = like.shape[1]
        most = next(most for most in SETTINGS[like.dtype] if classes <= most)
        tables = self.tables = _tables(like.dtype, most, str(like.device))
        count, nodes = tables.log_g.shape
        fewer = tables.weights.shape[1]
        self.gap = like.new_empty(shape)
        self.moments, self.products, self.weights = (
            like.new_empty((rows, size) if self.axis else (size, rows))
            for size in (count, nodes, fewer)
        )
        self.steps: list[Callable[[], object]] = []

    def variable(self, out: Tensor, epsilon: float) -> None:
        """Steps to t(gap/epsilon) in [-1, 1]."""
        gap, depth = self.gap, self.tables.depth * epsilon
        # numbers of torch: others would be wrapped anew each time
        lowest, last = gap.new_tensor(-depth), gap.new_tensor(LAST)
        self.steps += [
            partial(torch.clamp, gap, min=lowest, out=out),
            partial(torch.add, last, out, alpha=(LAST - FIRST) / depth, out=out),
            partial(torch.addcmul, out, out, out, value=BEND, out=out),
        ]

    def sums_over_nodes(self, classes: int) -> None:
        """Steps from the polynomials' sums over classes to Σ B G/Φ: ``moments`` to ``weights``."""
        tables, products, moments, weights = self.tables, self.products, self.moments, self.weights
        # an equal share of -log2 Φ(x) for each class goes where the constant polynomial is
        log_g = tables.log_g.clone()
        log_g[tables.constant] -= tables.log_first / classes
        if self.axis:
            to_nodes, to_weights = (moments, log_g), (products, tables.weights)
        else:
            to_nodes, to_weights = (log_g.t(), moments), (tables.weights.t(), products)
        lowest = NEGLIGIBLE[products.dtype]
        self.steps += [
            partial(torch.mm, *to_nodes, out=products),
            partial(torch.clamp, products, min=lowest, out=products),
            partial(torch.exp2, products, out=products),
            partial(torch.mm, *to_weights, out=weights),
        ]


class _Narrow(_Buffers):
    """Few classes run along the first axis so that every operation is long."""

    axis = 0

    def __init__(self, rows: int, like: Tensor, epsilon: float) -> None:
        k = like.shape[1]
        super().__init__(rows, (k, rows), like, epsilon)
        count, fewer = len(self.moments), len(self.weights)
        half = 1 << (fewer - 1).bit_length() - 1
        # the parts of the second sum lie over polynomials of the first one that they do not take
        memory = like.new_empty((max(count, 2 * half + 1), k, rows))
        made, parts = memory[:count], memory[half + 1 :][:half]
        made[0] = 1
        self.variable(made[1], epsilon)
        self.steps += [
            *_fill(made, like.new_ones(())),
            partial(torch.sum, made, dim=1, out=self.moments),
        ]
        self.sums_over_nodes(k)
        weights = self.weights.unsqueeze(1)
        twice = fewer - half
        self.steps.append(
            partial(torch.addcmul, weights[:twice], made[half], weights[half:], out=parts[:twice])
        )
        if twice < half:
            self.steps.append(partial(parts[twice:].copy_, weights[twice:half]))
        self.steps += [
            *_sum_by_halves(parts, made),
            partial(parts[0].clamp_, min=FLOOR[like.dtype]),
        ]
        self.factor = parts[0]

    def expand(self, z: Float[Tensor, "b k"]) -> Float[Tensor, "k b"]:
        """``c exp(u²/4)``; :attr:`gap` becomes ``z - max z``."""
        lay_out(z.t(), self.gap)
        self.gap.sub_(self.gap.amax(dim=0))
        for step in self.steps:
            step()
        return self.factor


class _Wide(_Buffers):
    """For many classes, small matrix products take the sums."""

    axis = 1

    def __init__(self, rows: int, like: Tensor, epsilon: float) -> None:
        k = like.shape[1]
        super().__init__(rows, (rows, k), like, epsilon)
        inner = self.tables.inner
        outer, fewer = (table.shape[1] // inner for table in (self.moments, self.weights))
        # polynomials lie one after the other, so that each step is one long loop; the matrix products
        # take them per row by their strides. Both kinds share the constant one, and the parts lie over
        # those that only the first sum takes
        end = inner - 1 + fewer
        memory = like.new_empty((end + max(inner, outer - fewer), rows, k))
        falling, second, parts = memory[:inner], memory[inner - 1 :][:outer], memory[end:][:inner]
        memory[inner - 1] = 1
        first = [*list(falling)[::-1], second[1]]  # the last is T_m
        by_row = second.transpose(0, 1)
        one = like.new_ones(())
        self.variable(first[1], epsilon)
        self.steps += [
            *_fill(first, one),
            *_fill(second, one),
            partial(
                torch.bmm,
                by_row,
                falling.permute(1, 2, 0),
                out=self.moments.view(rows, outer, inner),
            ),
        ]
        self.sums_over_nodes(k)
        self.steps += [
            _combined(
                self.weights.view(rows, inner, fewer), by_row[:, :fewer], parts.transpose(0, 1)
            ),
            *_sum_by_halves(parts, first),
        ]
        self.factor = parts[0]
        self.steps.append(partial(self.factor.clamp_, min=FLOOR[like.dtype]))

    def expand(self, z: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """``c exp(u²/4)``; :attr:`gap` becomes ``z - max z``."""
        torch.sub(z, z.amax(dim=1, keepdim=True), out=self.gap)
        for step in self.steps:
            step()
        return self.factor


def _sum_by_halves(parts: Tensor, made: Tensor | list[Tensor]) -> list[Callable[[], object]]:
    """Steps to ``Σ_a P_a parts_a`` in ``parts[0]``, where P_a is as :func:`_fill` makes it and the
    number of parts a power of 2."""
    steps, half = [], len(parts) // 2
    while half:
        left, right = parts[:half], parts[half : 2 * half]
        steps.append(partial(torch.addcmul, left, made[half], right, out=left))
        half //= 2
    return steps


def _combined(a: Tensor, b: Tensor, out: Tensor) -> Callable[[], object]:
    """A step that takes the products of many small matrices, on the CPU with NumPy, which needs less
    than half of ``torch.bmm``'s time where ``out`` lies apart."""
    if a.device.type == "cpu" and not torch.compiler.is_compiling():
        return partial(np.matmul, a.numpy(), b.numpy(), out=out.numpy())
    return partial(torch.bmm, a, b, out=out)
