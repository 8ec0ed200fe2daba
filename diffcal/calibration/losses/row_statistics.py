"""The few numbers of each row from which the pointwise losses are made, fast and with little memory.

With ``l = log_softmax(z)``, ``p = exp(l)`` and a target ``q`` (one-hot ``e_y`` for a hard label), a
row has

    cross_entropy   -sum_k q_k l_k
    uniform         -sum_k l_k / K                    cross-entropy against the uniform distribution
    entropy         -sum_k p_k l_k
    distance        sum_k |p_k - q_k|^power
    below           max {l_k : z_k < z_y}, -inf if y is last          (hard labels only)

A loss combines them with ordinary autograd on vectors of one number per row, so that each loss is
written once and only this file is tuned. On a CPU large inputs are read in blocks of rows that stay
in the cache, nothing of the logits' size is kept for the backward pass, and the gradient is written
in its closed form: as every statistic is a function of ``l``, with ``H = d/dl`` the gradient in the
logits is ``H - p sum_k H_k``. Elsewhere (other devices, small inputs, torch.compile, torch.func
transforms, gradients of gradients) the same statistics are differentiated by autograd.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

from diffcal.calibration.losses.contract import Rows
from diffcal.calibration.losses.row_blocks import block_of, in_blocks, row_blocks

__all__ = ["RowStatistics", "row_statistics"]


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of each row, ``[n]``; None where they were not asked for."""

    cross_entropy: Float[Tensor, " n"]
    uniform: Float[Tensor, " n"] | None = None
    entropy: Float[Tensor, " n"] | None = None
    distance: Float[Tensor, " n"] | None = None
    below: Float[Tensor, " n"] | None = None


@dataclass(frozen=True)
class _Wanted:
    """Which statistics are computed besides the cross-entropy."""

    uniform: bool
    entropy: bool
    power: float | None
    below: bool
    dim: int = 1
    """Axis of the classes: 1, or 0 in transposed blocks."""


def row_statistics(
    rows: Rows,
    *,
    uniform: bool = False,
    entropy: bool = False,
    power: float | None = None,
    below: bool = False,
) -> RowStatistics:
    """Differentiable statistics of each row of ``rows``.

    Args:
        rows: Logits and targets from :func:`diffcal.calibration.losses.contract.as_rows`.
        uniform: Also the cross-entropy against the uniform distribution.
        entropy: Also the entropy of the predicted distribution.
        power: Also the distance with this exponent, at least 1.
        below: Also the log-probability of the best class strictly below the label's; of tied
            classes the first one gets the gradient. Hard labels only.
    """
    wanted = _Wanted(uniform, entropy, power, below)
    z, labels, soft = rows.logits, rows.labels, rows.soft
    assert soft is None or not below
    if in_blocks(z, soft):
        values = _BlockedStatistics.apply(z, labels, soft, wanted)
    else:
        values = _statistics(z, labels, soft, wanted)
    rest = iter(values[1:])
    return RowStatistics(
        values[0],
        *(next(rest) if asked else None for asked in (uniform, entropy, power is not None, below)),
    )


def _statistics(
    z: Tensor, labels: Tensor | None, soft: Tensor | None, wanted: _Wanted
) -> tuple[Tensor, ...]:
    """The statistics asked for, in the order of :class:`RowStatistics`."""
    dim = wanted.dim
    log_p = torch.log_softmax(z, dim)
    index = None if labels is None else labels.unsqueeze(dim)
    if index is not None:
        log_p_y = log_p.gather(dim, index)
        values = [-log_p_y.squeeze(dim)]
    else:
        assert soft is not None
        log_p_y = None
        # 0 * infinity is NaN: a class without target mass must not contribute, however unlikely
        values = [-torch.where(soft > 0, soft * log_p, 0).sum(dim)]
    if wanted.uniform:
        values.append(-log_p.mean(dim))
    p = log_p.exp() if wanted.entropy or wanted.power is not None else None
    if wanted.entropy:
        assert p is not None
        values.append(-torch.where(p > 0, p * log_p, 0).sum(dim))
    if wanted.power is not None:
        assert p is not None
        values.append(_distance(p, log_p_y, index, soft, wanted.power, dim))
    if wanted.below:
        assert index is not None
        lower = torch.where(z < z.gather(dim, index), log_p, -torch.inf)
        if torch.is_grad_enabled() and z.requires_grad:
            values.append(lower.max(dim).values)
        else:
            values.append(lower.amax(dim))  # several times faster than finding the place too
    return tuple(values)


def _distance(
    p: Tensor,
    log_p_y: Tensor | None,
    index: Tensor | None,
    soft: Tensor | None,
    power: float,
    dim: int,
) -> Tensor:
    if index is not None and log_p_y is not None:
        gap = torch.expm1(log_p_y)  # p_y - 1 without cancellation
        if power == 1:
            return -2 * gap.squeeze(dim)
        d = p.scatter(dim, index, gap)
    else:
        assert soft is not None
        d = p - soft
    return d.square().sum(dim) if power == 2 else d.abs().pow(power).sum(dim)


class _BlockedStatistics(torch.autograd.Function):
    """:func:`_statistics` block by block, with the gradient in closed form."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, z: Tensor, labels: Tensor | None, soft: Tensor | None, wanted: _Wanted
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(z, labels, soft)  # type: ignore[arg-type]
        ctx.wanted = wanted  # type: ignore[attr-defined]
        parts = [
            _statistics(*block_of(z, labels, soft, rows, dim), replace(wanted, dim=dim))
            for rows, dim in row_blocks(z)
        ]
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, labels, soft = ctx.saved_tensors  # type: ignore[attr-defined]
        wanted: _Wanted = ctx.wanted  # type: ignore[attr-defined]
        if torch.is_grad_enabled():  # a gradient of this gradient will be asked for
            values = _statistics(z, labels, soft, wanted)
            (grad,) = torch.autograd.grad(values, z, grads, create_graph=True)
            return grad, None, None, None
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
        for rows, dim in row_blocks(z):
            block = block_of(z, labels, soft, rows, dim)
            slopes = [g[rows].unsqueeze(dim) for g in grads]
            grad = _closed_form(*block, replace(wanted, dim=dim), slopes)
            out[rows] = grad if dim == 1 else grad.t()
        return out, None, None, None


def _closed_form(
    z: Tensor,
    labels: Tensor | None,
    soft: Tensor | None,
    wanted: _Wanted,
    slopes: list[Tensor],
) -> Tensor:
    """Gradient in ``z`` of the statistics' sum weighted by ``slopes`` (kept axis of the classes)."""
    dim, rest = wanted.dim, iter(slopes[1:])
    index = None if labels is None else labels.unsqueeze(dim)
    slope = slopes[0]
    log_p = torch.log_softmax(z, dim)
    log_p_y = None if index is None else log_p.gather(dim, index)
    # the gradient is p * factor, less the targets' part; factor stays one number per row if it can
    factor = slope if soft is None else slope * soft.sum(dim, keepdim=True)
    at_uniform = at_entropy = at_below = place = distance_slope = None
    if wanted.uniform:
        at_uniform = next(rest)
        factor = factor + at_uniform
    if wanted.entropy:
        at_entropy = next(rest)
    if wanted.power is not None:
        distance_slope = next(rest)
        if wanted.power == 1 and log_p_y is not None:
            # 2 (1 - p_y) is a function of l_y alone
            extra = 2 * distance_slope * log_p_y.exp()
            slope, factor, distance_slope = slope + extra, factor + extra, None
    if wanted.below:
        assert index is not None
        best, place = torch.where(z < z.gather(dim, index), z, -torch.inf).max(dim, keepdim=True)
        at_below = torch.where(best > -torch.inf, next(rest), 0)
        factor = factor - at_below
    kept = log_p if at_entropy is not None else None
    p = log_p.exp() if kept is not None else log_p.exp_()
    if distance_slope is not None:
        assert wanted.power is not None
        h = _distance_slope(p, log_p_y, index, soft, wanted.power, dim)
        mean = (p * h).sum(dim, keepdim=True)
        factor = h.sub_(mean).mul_(distance_slope).add_(factor)
    if at_entropy is not None and kept is not None:
        surprise = torch.where(p > 0, kept, 0)
        surprise = surprise - (p * surprise).sum(dim, keepdim=True)
        factor = factor - surprise.mul_(at_entropy)
    grad = p.mul_(factor)
    if at_uniform is not None:
        grad.sub_(at_uniform / z.shape[dim])
    if index is not None:
        grad.scatter_add_(dim, index, -slope)
    else:
        assert soft is not None
        grad.sub_(slope * soft)
    if place is not None and at_below is not None:
        grad.scatter_add_(dim, place, at_below)
    return grad


def _distance_slope(
    p: Tensor,
    log_p_y: Tensor | None,
    index: Tensor | None,
    soft: Tensor | None,
    power: float,
    dim: int,
) -> Tensor:
    """Derivative of the distance in ``p``."""
    if index is not None and log_p_y is not None:
        d = p.scatter(dim, index, torch.expm1(log_p_y))
    else:
        assert soft is not None
        d = p - soft
    if power == 2:
        return d.mul_(2)
    if power == 1:
        return d.sign_()
    return d.abs().pow_(power - 1).mul_(power).mul_(d.sign())
