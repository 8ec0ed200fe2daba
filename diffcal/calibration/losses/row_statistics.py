"""The few numbers of each row from which the pointwise losses are made, fast and with little memory.

With ``l = log_softmax(z)``, ``p = exp(l)`` and a target ``q`` (one-hot ``e_y`` for a hard label), a
row has

    cross_entropy   -sum_k q_k l_k
    uniform         -sum_k l_k / K                    cross-entropy against the uniform distribution
    entropy         -sum_k p_k l_k
    distance        sum_k |p_k - q_k|^power
    below           max {l_k : z_k < z_y}, -inf if y is last          (hard labels only)
    top             max_k z_k
    excess          sum_k relu(max z - z_k - margin)^power

A loss combines them with ordinary autograd on vectors of one number per row, so that each loss is
written once and only this file is tuned. On a CPU large inputs are read in blocks of rows that stay
in the cache, nothing of the logits' size is kept for the backward pass, and the gradient is written
in its closed form (:mod:`diffcal.calibration.losses.statistics_blocks`). Elsewhere (other devices,
small inputs, torch.compile, torch.func transforms, gradients of gradients) the same statistics are
differentiated by autograd.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

from diffcal.calibration.losses.contract import Rows
from diffcal.calibration.losses.row_blocks import block_of, in_blocks, row_blocks
from diffcal.calibration.losses.statistics_blocks import (
    Excess,
    Wanted,
    block_gradient,
    block_statistics,
)
from diffcal.core.tensors import lay_out

__all__ = ["RowStatistics", "row_statistics"]


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of each row, ``[n]``; None where they were not asked for."""

    cross_entropy: Float[Tensor, " n"]
    uniform: Float[Tensor, " n"] | None = None
    entropy: Float[Tensor, " n"] | None = None
    distance: Float[Tensor, " n"] | None = None
    below: Float[Tensor, " n"] | None = None
    top: Float[Tensor, " n"] | None = None
    excess: Float[Tensor, " n"] | None = None


def row_statistics(
    rows: Rows,
    *,
    uniform: bool = False,
    entropy: bool = False,
    power: float | None = None,
    below: bool = False,
    top: bool = False,
    excess: Excess | None = None,
) -> RowStatistics:
    """Differentiable statistics of each row of ``rows``.

    Args:
        rows: Logits and targets from :func:`diffcal.calibration.losses.contract.as_rows`.
        uniform: Also the cross-entropy against the uniform distribution.
        entropy: Also the entropy of the predicted distribution.
        power: Also the distance with this exponent, at least 1.
        below: Also the log-probability of the best class strictly below the label's; of tied
            classes the first one gets the gradient. Hard labels only.
        top: Also the largest logit; tied classes share its gradient.
        excess: Also how far logits fall more than a margin below the largest.
    """
    wanted = Wanted(uniform, entropy, power, below, top, excess)
    z, labels, soft = rows.logits, rows.labels, rows.soft
    assert soft is None or not below
    if in_blocks(z, soft):
        values = _BlockedStatistics.apply(z, labels, soft, wanted)
    else:
        values = _statistics(z, labels, soft, wanted)
    asked_for = (uniform, entropy, power is not None, below, top, excess is not None)
    rest = iter(values[1:])
    return RowStatistics(
        values[0],
        *(next(rest) if asked else None for asked in asked_for),
    )


def _statistics(
    z: Tensor, labels: Tensor | None, soft: Tensor | None, wanted: Wanted
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
    if wanted.top or wanted.excess is not None:
        top = z.amax(dim, keepdim=True)
        if wanted.top:
            values.append(top.squeeze(dim))
        if wanted.excess is not None:
            highest = top.detach() if wanted.excess.held else top
            over = (highest - z - wanted.excess.margin).relu()
            values.append((over.square() if wanted.excess.power == 2 else over).sum(dim))
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
        ctx: FunctionCtx, z: Tensor, labels: Tensor | None, soft: Tensor | None, wanted: Wanted
    ) -> tuple[Tensor, ...]:
        parts = [
            block_statistics(*block_of(z, labels, soft, rows, dim), replace(wanted, dim=dim))
            for rows, dim in row_blocks(z)
        ]
        values = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(z, labels, soft, *values)  # type: ignore[arg-type]
        ctx.wanted = wanted  # type: ignore[attr-defined]
        return values

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, labels, soft, *values = ctx.saved_tensors  # type: ignore[attr-defined]
        wanted: Wanted = ctx.wanted  # type: ignore[attr-defined]
        if torch.is_grad_enabled():  # a gradient of this gradient will be asked for
            values = _statistics(z, labels, soft, wanted)
            (grad,) = torch.autograd.grad(values, z, grads, create_graph=True)
            return grad, None, None, None
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
        for rows, dim in row_blocks(z):
            block = block_of(z, labels, soft, rows, dim)
            slopes = [g[rows].unsqueeze(dim) for g in grads]
            known = [v[rows].unsqueeze(dim) for v in values]
            target = out[rows] if dim == 1 else torch.empty_like(block[0])
            block_gradient(*block, replace(wanted, dim=dim), slopes, known, target)
            if dim == 0:
                lay_out(target.t(), out[rows])
        return out, None, None, None
