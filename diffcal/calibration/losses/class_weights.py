"""Weights by class of focal-like losses ``-sum_k q_k u_k ln p_k``, with their slopes for closed forms.

A weight has its formula twice: :meth:`ClassWeight.of` on log-probabilities, differentiable and
plain, and :meth:`ClassWeight.in_block`, the same with its derivative for a block of rows on the CPU,
without the masks and general powers that take most of the plain formula's time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

__all__ = ["ClassWeight", "StepPower", "TopLabelBrier", "safe_power"]

SMALL_POWERS = range(-8, 9)
"""Exponents taken by products, 20 times faster than a power."""

FEW_BEYOND = 4096
"""Values below which looking up their step is quicker than comparing all of them with each edge."""

DENSE = 64
"""Classes below which a step of small powers is taken on all of them."""


@runtime_checkable
class ClassWeight(Protocol):
    """The weight u of each class."""

    @property
    def constant(self) -> bool:
        """Whether the weight is held constant in gradients."""
        ...

    def of(self, log_p: Tensor, dim: int) -> Tensor:
        """Weight of each class from log-probabilities with the classes on ``dim``, differentiable."""
        ...

    def in_block(
        self, p: Tensor, rest: Tensor, dim: int, slope: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Weight of each class and, if asked and not constant, its derivative in that class's p.

        Args:
            p: Probabilities, contiguous, to be left alone.
            rest: ``1 - p`` without cancellation, at least the smallest normal number; likewise.
        """
        ...


@dataclass(frozen=True)
class StepPower:
    """``(1 - p)^gamma``, or ``(1 + p)^|gamma|`` where gamma is negative; gamma a step function of p.

    The step function is not differentiated.
    """

    gammas: Sequence[float] | Tensor
    edges: Sequence[float] | Tensor = ()
    """Ascending, where gamma changes: one less than gammas."""
    edge_above: bool = False
    """Whether a probability at an edge takes the gamma above it."""
    constant: bool = False

    def of(self, log_p: Tensor, dim: int = -1) -> Tensor:
        """The weight, from log-probabilities of any shape."""
        if self.constant:
            log_p = log_p.detach()
        if len(self.gammas) == 1:
            return _power_of(self.gammas[0], log_p)
        p = log_p.exp()
        edges, table = (
            torch.as_tensor(values, dtype=p.dtype, device=p.device).contiguous()
            for values in (self.edges, self.gammas)
        )
        gamma = table[torch.bucketize(p.detach(), edges, right=self.edge_above)]
        # one power for both sides
        return safe_power(torch.where(gamma >= 0, -log_p.expm1(), 1 + p), gamma.abs())

    def in_block(
        self, p: Tensor, rest: Tensor, dim: int, slope: bool
    ) -> tuple[Tensor, Tensor | None]:
        slope = slope and not self.constant
        gammas, edges = self._steps()
        u, du = _with_slope(p, rest, gammas[0], slope)
        if len(gammas) == 1:
            return u, du
        if p.shape[dim] < DENSE and all(gamma in SMALL_POWERS for gamma in gammas):
            # products on all classes, blended by 0 and 1: boolean masks do not vectorise
            compare = torch.ge if self.edge_above else torch.gt
            beyond = torch.empty_like(p)
            for gamma, edge in zip(gammas[1:], edges, strict=True):
                v, dv = _with_slope(p, rest, gamma, slope)
                compare(p, edge, out=beyond)
                u.addcmul_(v.sub_(u), beyond)
                if du is not None and dv is not None:
                    du.addcmul_(dv.sub_(du), beyond)
            return u, du
        # of many classes few have a probability beyond the first edge; NumPy's calls cost less
        values, other, (weights, slopes) = (
            p.numpy(),
            rest.numpy(),
            (None if x is None else x.numpy().reshape(-1) for x in (u, du)),
        )
        steps, table = (np.array(x, dtype=values.dtype) for x in (edges, gammas))
        compare = np.greater_equal if self.edge_above else np.greater
        places = np.flatnonzero(compare(values, steps[0]))
        if not len(places):
            return u, du
        some, some_rest = values.reshape(-1)[places], other.reshape(-1)[places]
        if len(some) < FEW_BEYOND:
            gamma = table[np.searchsorted(steps, some, "right" if self.edge_above else "left")]
        else:
            gamma = np.full_like(some, table[1])
            for edge, step in zip(steps[1:], np.diff(table[1:]), strict=True):
                gamma += compare(some, edge) * step
        base = np.where(gamma >= 0, some_rest, 1 + some)
        power = base ** np.abs(gamma)
        assert weights is not None
        weights[places] = power
        if slopes is not None:
            slopes[places] = -gamma * power / base
        return u, du

    def _steps(self) -> tuple[list[float], list[float]]:
        """Gammas, and the edges at which they change, without steps of no height."""
        gammas, edges = (
            values.tolist() if isinstance(values, Tensor) else list(values)
            for values in (self.gammas, self.edges)
        )
        steps = [gammas[0]]
        kept = []
        for edge, gamma in zip(edges, gammas[1:], strict=True):
            if gamma != steps[-1]:
                steps.append(gamma)
                kept.append(edge)
        return steps, kept


@dataclass(frozen=True)
class TopLabelBrier:
    """``|correct - max p|^gamma``, constant; ``correct`` of a class says whether it is the likeliest."""

    gamma: float
    constant: bool = True

    def of(self, log_p: Tensor, dim: int) -> Tensor:
        """The weight of each class, from the log-probabilities of all."""
        with torch.no_grad():
            log_top, best = log_p.max(dim, keepdim=True)
            u = log_top.exp().expand_as(log_p).scatter(dim, best, -log_top.expm1())
            return safe_power(u, self.gamma)

    def in_block(
        self, p: Tensor, rest: Tensor, dim: int, slope: bool
    ) -> tuple[Tensor, Tensor | None]:
        top = p.amax(dim, keepdim=True)
        at = torch.eq(p, top, out=torch.empty_like(p))
        if float(at.sum(dtype=torch.float64)) == top.numel():  # no ties: quicker than with an index
            best = (rest * at).sum(dim, keepdim=True)
            others = top**self.gamma
            return at.mul_(safe_power(best, self.gamma) - others).add_(others), None
        best = p.argmax(dim, keepdim=True)
        u = (top**self.gamma).expand_as(p).contiguous()
        return u.scatter_(dim, best, safe_power(rest.gather(dim, best), self.gamma)), None


def safe_power(base: Tensor, exponent: Tensor | float) -> Tensor:
    """``base ** exponent`` for ``base >= 0``, with a finite gradient everywhere.

    1 where the exponent is 0; else 0 with gradient 0 where the base is at most the dtype's smallest
    normal number, since exponents below 1 have an infinite slope there.
    """
    if not isinstance(exponent, Tensor):
        if exponent == 0:
            return torch.ones_like(base)
        positive = base > torch.finfo(base.dtype).tiny
        return torch.where(positive, torch.where(positive, base, 1) ** exponent, 0)
    positive = base > torch.finfo(base.dtype).tiny
    power = torch.where(positive, base, 1) ** exponent
    return torch.where(positive | (exponent == 0), power, 0)


def _power_of(gamma: float | Tensor, log_p: Tensor) -> Tensor:
    return safe_power(-log_p.expm1(), gamma) if gamma >= 0 else (1 + log_p.exp()) ** -gamma


def _with_slope(p: Tensor, rest: Tensor, gamma: float, slope: bool) -> tuple[Tensor, Tensor | None]:
    """The weight of one gamma and its derivative in p."""
    if gamma == 0:
        return torch.ones_like(p), torch.zeros_like(p) if slope else None
    base, size = (rest, gamma) if gamma > 0 else (1 + p, -gamma)
    if not slope:
        return _power(base, size), None
    lower = _power(base, size - 1)
    return lower * base, lower.mul_(-gamma)


def _power(base: Tensor, exponent: float) -> Tensor:
    """``base ** exponent``, by products for small whole exponents."""
    if exponent == 0:
        return torch.ones_like(base)
    if exponent not in SMALL_POWERS:
        return base**exponent
    result, square, left = None, base, int(exponent)
    while left:
        if left % 2:
            result = square if result is None else result * square
        left //= 2
        if left:
            square = square.square()
    assert result is not None
    return result.clone() if result is base else result
