"""Row statistics of one block of rows and their gradient in closed form, tuned for the CPU's cache.

With ``l = log_softmax(z)`` and ``p = exp(l)``, a statistic with the slopes ``h = dS/dl`` has the
gradient ``h - p sum_k h_k`` in the logits, and all that depends on a row's label alone is a change of
one entry. So each gradient is a softmax, a few multiply-adds and a scatter.

Two habits save most of the time. Comparisons are written as floating 0 and 1 into a buffer, since
boolean masks and ``where`` do not vectorise; and ``p`` is taken by ``softmax``, which is faster than
``exp`` of what is there already.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["UNDERFLOWN", "Excess", "Wanted", "block_gradient", "block_statistics", "large"]

UNDERFLOWN = -1e4
"""A log-probability whose probability is 0 in every format, so that 0 ln 0 comes out as 0."""


@dataclass(frozen=True)
class Excess:
    """The statistic ``sum_k relu(max z - z_k - margin)^power``."""

    margin: float
    power: int = 1
    """1 or 2."""
    held: bool = False
    """Hold the largest logit constant."""


@dataclass(frozen=True)
class Wanted:
    """Which statistics are computed besides the cross-entropy."""

    uniform: bool = False
    entropy: bool = False
    power: float | None = None
    below: bool = False
    top: bool = False
    excess: Excess | None = None
    dim: int = 1
    """Axis of the classes: 1, or 0 in transposed blocks."""


def block_statistics(
    z: Tensor, labels: Tensor | None, soft: Tensor | None, wanted: Wanted
) -> tuple[Tensor, ...]:
    """The statistics asked for, in the order of ``RowStatistics``, without autograd."""
    dim = wanted.dim
    log_p = torch.log_softmax(z, dim)
    spare = torch.empty_like(z)
    index = log_p_y = None
    if labels is not None:
        index = labels.unsqueeze(dim)
        log_p_y = log_p.gather(dim, index)
        values = [-log_p_y.squeeze(dim)]
    else:
        assert soft is not None
        cross_entropy = torch.mul(soft, log_p, out=spare).sum(dim).neg_()
        if not bool(cross_entropy.isfinite().all()):  # 0 * infinity is NaN, and must be 0
            cross_entropy = -torch.where(soft > 0, soft * log_p, 0).sum(dim)
        values = [cross_entropy]
    if wanted.uniform:
        values.append(-log_p.mean(dim))
    if wanted.entropy:
        surprise = torch.clamp(log_p, min=UNDERFLOWN, out=spare)
        values.append(-surprise.mul_(torch.softmax(z, dim)).sum(dim))
    if wanted.power is not None:
        values.append(_distance(z, log_p_y, index, soft, wanted.power, dim))
    if wanted.below:
        assert index is not None
        best = _below(z, log_p, index, dim, spare).squeeze(dim)
        values.append(torch.where(best > -large(z) / 2, best, -torch.inf))
    top = z.amax(dim, keepdim=True) if wanted.top or wanted.excess is not None else None
    if wanted.top and top is not None:
        values.append(top.squeeze(dim))
    if wanted.excess is not None and top is not None:
        over = torch.sub(top, z, out=spare).sub_(wanted.excess.margin).clamp_(min=0)
        values.append((over.square_() if wanted.excess.power == 2 else over).sum(dim))
    return tuple(values)


def block_gradient(
    z: Tensor,
    labels: Tensor | None,
    soft: Tensor | None,
    wanted: Wanted,
    slopes: list[Tensor],
    values: list[Tensor],
    out: Tensor,
) -> None:
    """Gradient in ``z`` of the statistics' sum weighted by ``slopes``, written into ``out``.

    Args:
        slopes: Of each statistic, with the axis of the classes kept.
        values: What :func:`block_statistics` returned, with the axis of the classes kept.
        out: Of the shape of ``z``.
    """
    dim, pairs = wanted.dim, zip(slopes[1:], values[1:], strict=True)
    slope, cross_entropy = slopes[0], values[0]
    index = None if labels is None else labels.unsqueeze(dim)
    # the gradient is p * factor, less the targets' part; factor stays one number per row if it can
    factor = slope if soft is None else slope * soft.sum(dim, keepdim=True)
    at_uniform = None
    if wanted.uniform:
        at_uniform, _ = next(pairs)
        factor = factor + at_uniform
    p = torch.softmax(z, dim, out=out)
    full = None
    if wanted.entropy:
        at_entropy, entropy = next(pairs)
        factor = factor - at_entropy * entropy
        full = torch.log_softmax(z, dim).clamp_(min=UNDERFLOWN).mul_(-at_entropy)
    if wanted.power is not None:
        at_distance, distance = next(pairs)
        if wanted.power == 1 and index is not None:
            # 2 (1 - p_y) is a function of l_y alone
            extra = 2 * at_distance * (-cross_entropy).exp()
            slope, factor = slope + extra, factor + extra
        elif index is not None:
            h, mean = _distance_slope(p, cross_entropy, distance, index, wanted.power, dim)
            full = h.mul_(at_distance) if full is None else full.addcmul_(h, at_distance)
            factor = factor - at_distance * mean
        else:
            assert soft is not None
            h = _soft_distance_slope(p, soft, wanted.power)
            factor = factor - at_distance * (p * h).sum(dim, keepdim=True)
            full = h.mul_(at_distance) if full is None else full.addcmul_(h, at_distance)
    spare = hits = at_below = None
    if wanted.below:
        assert index is not None
        spare = torch.empty_like(z)
        best = _below(z, z, index, dim, spare)
        hits = _only_first(spare.eq_(best), dim)
        at_below = torch.where(best > -large(z) / 2, next(pairs)[0], 0)
        factor = factor - at_below
    grad = p.mul_(factor if full is None else full.add_(factor))
    if at_uniform is not None:
        grad.sub_(at_uniform / z.shape[dim])
    if index is not None:
        grad.scatter_add_(dim, index, -slope)
    else:
        assert soft is not None
        grad.addcmul_(soft, slope, value=-1)
    if hits is not None and at_below is not None:
        grad.addcmul_(hits, at_below)
    if wanted.top or wanted.excess is not None:
        _add_margins(grad, z, wanted, pairs)


def _add_margins(
    grad: Tensor, z: Tensor, wanted: Wanted, pairs: Iterator[tuple[Tensor, Tensor]]
) -> None:
    """Add the gradients of the largest logit and of the excess over a margin."""
    dim = wanted.dim
    top = z.amax(dim, keepdim=True)
    at_top = next(pairs)[0] if wanted.top else None
    if wanted.excess is not None:
        at_excess, excess = next(pairs)
        if bool((excess > 0).any()):  # often no logit is so far below
            over = torch.sub(top, z).sub_(wanted.excess.margin)
            over = over.clamp_(min=0).mul_(2) if wanted.excess.power == 2 else over.gt_(0)
            grad.addcmul_(over, at_excess, value=-1)
            if not wanted.excess.held:
                through = at_excess * over.sum(dim, keepdim=True)
                at_top = through if at_top is None else at_top + through
    if at_top is not None and bool((at_top != 0).any()):
        largest = torch.eq(z, top, out=torch.empty_like(z))
        grad.addcmul_(largest, at_top / largest.sum(dim, keepdim=True))  # ties share


def large(z: Tensor) -> float:
    """A number that moves any logit out of reach."""
    return 1e30 if z.dtype == torch.float32 else 1e300


def _below(z: Tensor, scores: Tensor, index: Tensor, dim: int, spare: Tensor) -> Tensor:
    """Largest of ``scores`` among logits strictly below the label's; far below 0 without any.

    Leaves in ``spare`` the scores with the other classes moved out of reach.
    """
    torch.ge(z, z.gather(dim, index), out=spare)
    return torch.add(scores, spare, alpha=-large(z), out=spare).amax(dim, keepdim=True)


def _only_first(hits: Tensor, dim: int) -> Tensor:
    """0 and 1 with only the first 1 of each row kept."""
    many = (hits.sum(dim) > 1).nonzero()[:, 0]
    if len(many):
        rows = hits.index_select(1 - dim, many)
        first = torch.zeros_like(rows).scatter_(dim, rows.argmax(dim, keepdim=True), 1)
        hits.index_copy_(1 - dim, many, first)
    return hits


def _distance(
    z: Tensor,
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
        d = torch.softmax(z, dim).scatter_(dim, index, gap)
    else:
        assert soft is not None
        d = torch.softmax(z, dim).sub_(soft)
    if power == 2:
        return d.square_().sum(dim)
    d = d.abs_()
    return (d if power == 1 else d.pow_(power)).sum(dim)


def _distance_slope(
    p: Tensor, cross_entropy: Tensor, distance: Tensor, index: Tensor, power: float, dim: int
) -> tuple[Tensor, Tensor]:
    """Derivative h of a hard label's distance in ``p``, and ``sum_k p_k h_k``.

    With a = 1 - p_y the sum is ``power (distance - a^(power - 1))``.
    """
    a = -torch.expm1(-cross_entropy)
    at_label = a if power == 2 else a ** (power - 1)
    h = torch.mul(p, 2) if power == 2 else p.pow(power - 1).mul_(power)
    return h.scatter_(dim, index, -power * at_label), power * (distance - at_label)


def _soft_distance_slope(p: Tensor, soft: Tensor, power: float) -> Tensor:
    """Derivative of the distance in ``p``."""
    d = p - soft
    if power == 2:
        return d.mul_(2)
    if power == 1:
        return d.sign_()
    return d.abs().pow_(power - 1).mul_(power).mul_(d.sign_())
