"""Expected losses of soft targets that weight each class by its gap to the best class below it.

With ``g_k = p_k - p_j(k)``, j the best class strictly below k (no p_j where there is none), the loss
is ``-sum_k q_k u(g_k) ln p_k``. Its derivative in ``ln p_k`` is

    -q_k u_k - p_k (G_k - sum_{i: j(i) = k} G_i),    G_k = q_k u'(g_k) ln p_k.

Which class lies below which is the order of the logits. Few classes are compared in pairs, each with
all others of many rows at once; of many classes the order is sorted, and everything is computed along
it, where the class below is the neighbour. Of several classes tied for ``j`` the first one counts.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffcal.calibration.losses.class_weights import StepPower
from diffcal.calibration.losses.contract import Rows
from diffcal.calibration.losses.expectation import expected_in_closed_form, probabilities
from diffcal.calibration.losses.statistics_blocks import UNDERFLOWN, large

__all__ = ["expected_gap_loss"]

PAIRS = 64
"""Classes below which pairs are compared."""


def expected_gap_loss(
    rows: Rows,
    loss: Callable[[Tensor, Tensor], Tensor],
    weight: StepPower,
    *,
    below_held: bool = False,
) -> Float[Tensor, " n"]:
    """The loss of each row of soft targets.

    Args:
        loss: From ``ln p_k`` and ``ln p_j``, -inf without one; differentiable.
        weight: The same loss's u as a function of the gap, for closed forms.
        below_held: Whether that loss holds ``p_j`` constant in gradients, though not ``p_k``.
    """

    def plain(z: Tensor, soft: Tensor, dim: int) -> Tensor:
        log_p = torch.log_softmax(z, dim)
        values = loss(log_p, _below_each_class(z, log_p, dim))
        return torch.where(soft > 0, soft * values, 0).sum(dim)

    def block(z: Tensor, q: Tensor, dim: int, out: Tensor | None) -> Tensor:
        if dim == 0:
            return _by_pairs(z, q, weight, below_held, out)
        return _along_the_order(z, q, weight, below_held, out)

    return expected_in_closed_form(rows, plain, block, PAIRS)


def _by_pairs(
    z: Tensor, q: Tensor, weight: StepPower, below_held: bool, out: Tensor | None
) -> Tensor:
    """Values of a block with the classes on the first axis, and their gradient into ``out``."""
    lowest = -large(z)
    best, spare = torch.full_like(z, lowest), torch.empty_like(z)
    for row in z:  # the best logit strictly below each
        torch.ge(row, z, out=spare)
        torch.maximum(best, torch.add(row, spare, alpha=lowest, out=spare), out=best)
    log_p, p, rest = probabilities(z, 0)
    at_top = (z.amax(0) - log_p.amax(0)).neg_()  # minus the log-sum-exp
    below = torch.add(best, at_top, out=spare).exp_()
    values, h, slopes = _weighted(p, rest, log_p, below, q, weight, 0, out is not None)
    if out is None or h is None:
        return values
    if slopes is not None:
        h.addcmul_(p, slopes)
        if not below_held:
            through = torch.empty_like(z)  # what falls to each class from those above it
            for row, total in zip(z, through, strict=True):
                torch.eq(row, best, out=spare)
                torch.sum(spare.mul_(slopes), 0, out=total)
                slopes.sub_(spare)  # of tied classes only the first gets it
            h.addcmul_(p, through, value=-1)
    torch.mul(p, h.sum(0, keepdim=True), out=out).sub_(h)
    return values


def _along_the_order(
    z: Tensor, q: Tensor, weight: StepPower, below_held: bool, out: Tensor | None
) -> Tensor:
    """:func:`_by_pairs` of a block with the classes on the last axis, by sorting."""
    order = torch.from_numpy(z.numpy().argsort(axis=1))  # far quicker than torch's sort
    ascending = z.gather(1, order)
    rows, place, exists = _with_ties(z, order, ascending)
    log_p, p, rest = probabilities(ascending, 1)
    below = torch.zeros_like(p)
    below[:, 1:] = p[:, :-1]
    if len(rows):
        below[rows] = torch.where(exists, p[rows].gather(1, place), 0)
    values, h, slopes = _weighted(
        p, rest, log_p, below, q.gather(1, order), weight, 1, out is not None
    )
    if out is None or h is None:
        return values
    if slopes is not None:
        h.addcmul_(p, slopes)
        if not below_held:
            through = torch.zeros_like(p)  # what falls to each class from those above it
            through[:, :-1] = slopes[:, 1:]
            if len(rows):
                moved = torch.where(exists, slopes[rows], 0)
                through[rows] = torch.zeros_like(moved).scatter_add_(1, place, moved)
            h.addcmul_(p, through, value=-1)
    grad = torch.mul(p, h.sum(1, keepdim=True), out=rest).sub_(h)
    out.scatter_(1, order, grad)
    return values


def _with_ties(
    z: Tensor, order: Tensor, ascending: Tensor
) -> tuple[Int[Tensor, " r"], Int[Tensor, "r k"], Bool[Tensor, "r k"]]:
    """Rows with tied classes: places along the order of the first class of the group below each.

    And whether there is one. Sets ``order`` so that tied classes keep their own order.
    """
    tied = ascending[:, 1:] == ascending[:, :-1]
    rows = tied.any(dim=1).nonzero()[:, 0]
    order[rows] = z[rows].argsort(dim=1, stable=True)
    first = torch.arange(z.shape[1]).repeat(len(rows), 1)  # of each one's own group
    first[:, 1:].masked_fill_(tied[rows], 0)
    first = first.cummax(dim=1).values if len(rows) else first
    return rows, first.gather(1, (first - 1).clamp(min=0)), first > 0


def _weighted(
    p: Tensor,
    rest: Tensor,
    log_p: Tensor,
    below: Tensor,
    q: Tensor,
    weight: StepPower,
    dim: int,
    slope: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The values, and if asked ``q u`` and, unless u is constant, ``q u'(g) ln p`` of each class.

    Overwrites ``rest``, ``log_p`` and ``below``.
    """
    rest.add_(below)
    gap = torch.sub(p, below, out=below)
    h, du = weight.in_block(gap, rest, dim, slope)
    h.mul_(q)
    values = torch.mul(h, log_p, out=rest).sum(dim).neg_()
    if not slope:
        return values, None, None
    if du is not None:
        du.mul_(q).mul_(log_p.clamp_(min=UNDERFLOWN))
    return values, h, du


def _below_each_class(z: Tensor, log_p: Tensor, dim: int) -> Tensor:
    """Log-probability of the best class strictly below each class; -inf for the last ones."""
    with torch.no_grad():
        # equal values keep their order, so that the first of tied classes comes last and is chosen
        ascending, order = z.movedim(dim, -1).flip(-1).sort(dim=-1, stable=True)
        order = z.shape[dim] - 1 - order
        first_equal = torch.searchsorted(ascending.contiguous(), ascending.contiguous())
        place = order.gather(-1, (first_equal - 1).clamp(min=0))
        exists = first_equal > 0
        # from sorted places back to classes
        below = torch.empty_like(place).scatter_(-1, order, place)
        has = torch.empty_like(exists).scatter_(-1, order, exists)
    below, has = below.movedim(-1, dim), has.movedim(-1, dim)
    return torch.where(has, log_p.gather(dim, below), -torch.inf)
