"""Order statistics and bin sums of many confidences without sorting them.

A fine histogram has the count, the confidences' sum and the outcomes' sum of each of some 55,000
cells. Whatever is asked of it (the value of a rank, the sums over bins with given borders) touches a
few cells only, whose members are then fetched and looked at one by one, so that results are exact.
Cells are narrow near 1, where confidences of trained networks crowd: 1,024 to each halving of the
distance to 1.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcal.calibration.metrics.inputs import Confidences
from diffcal.calibration.metrics.profile import PIECE, sort_with_outcome

__all__ = ["ConfidenceHistogram"]

SHIFT = 52 - 10
"""Bits of a float64 below the ten leading ones of its mantissa."""

FIRST = 1023 << 10
"""The leading bits of 1.0, which is the distance to 1 of cell 0."""

CELLS = (54 << 10) + 2
"""Distances to 1 are 0 or at least 2^-54."""


class ConfidenceHistogram:
    """Counts and sums of confidences over fine cells, with members fetched as needed."""

    def __init__(self, scores: Confidences) -> None:
        self._confidence, self._outcome = scores.confidence, scores.raw_outcome
        c, t = self._confidence, self._outcome
        cell = self._cell = _cells(c)
        self._table = c.new_zeros((3, CELLS))
        if t.dtype == torch.bool:  # counts of wrong and right at once
            both = torch.bincount(cell.mul_(2).add_(t), minlength=2 * CELLS).view(-1, 2)
            cell.bitwise_right_shift_(1)
            self._table[0], self._table[2] = both.sum(dim=1), both[:, 1]
        else:
            self._table[0] = torch.bincount(cell, minlength=CELLS)
            self._table[2] = torch.bincount(cell, weights=t, minlength=CELLS)
        self._table[1] = torch.bincount(cell, weights=c, minlength=CELLS)
        self._fetched = torch.zeros(CELLS, dtype=torch.bool, device=c.device)
        self._values, self._outcomes = c.new_empty(0), t.new_empty(0)

    def order_statistics(self, ranks: Int[Tensor, " j"]) -> Float[Tensor, " j"]:
        """The confidences at 0-based ``ranks`` in rising order."""
        ranks = ranks.to(self._table.device)
        before = self._table[0].cumsum(0).long()
        cell = torch.searchsorted(before, ranks, right=True)
        self._fetch(cell)
        # ranks within the members that were fetched, which are sorted
        fetched = torch.where(self._fetched, self._table[0], 0).cumsum(0).long()
        return self._values[ranks - before[cell] + fetched[cell]]

    def sums(self, edges: Float[Tensor, " m1"]) -> Float[Tensor, "3 m"]:
        """Counts and sums of confidences and outcomes over (lower, upper] bins.

        The first bin takes what lies below all borders, the last one what lies above.
        """
        inner = edges[1:-1].contiguous()
        cell = _cells(inner)
        self._fetch(cell)
        rest = torch.where(self._fetched, 0, self._table)
        # an unfetched cell lies on one side of every border
        cells = torch.arange(CELLS, dtype=cell.dtype, device=cell.device)
        whole = torch.searchsorted(cell, cells)
        total = self._table.new_zeros((3, len(inner) + 1)).index_add_(1, whole, rest)
        # most members are at hand where most confidences are equal: piece by piece
        for c, t in zip(self._values.split(PIECE), self._outcomes.split(PIECE), strict=True):
            members = torch.stack([torch.ones_like(c), c, t.to(c)])
            total.index_add_(1, torch.searchsorted(inner, c), members)
        if len(self._values) > PIECE:  # not worth the memory until the next call
            self._forget()
        return total

    def _forget(self) -> None:
        self._fetched.fill_(False)
        self._values, self._outcomes = self._values[:0].clone(), self._outcomes[:0].clone()

    def _fetch(self, cells: Int[Tensor, " j"]) -> None:
        """Add the members of ``cells`` to those that are at hand, in order."""
        wanted = torch.zeros_like(self._fetched)
        wanted[cells.long()] = True
        wanted &= ~self._fetched & (self._table[0] > 0)
        if not bool(wanted.any()):
            return
        chosen = [wanted.index_select(0, part).nonzero()[:, 0] for part in self._cell.split(PIECE)]
        places = torch.cat([part.add_(PIECE * i) for i, part in enumerate(chosen)])
        self._values, self._outcomes = sort_with_outcome(
            torch.cat([self._values, self._confidence.index_select(0, places)]),
            torch.cat([self._outcomes, self._outcome.index_select(0, places)]),
        )
        self._outcomes = self._outcomes.to(self._outcome.dtype)
        self._fetched |= wanted


def _cells(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Cell of each value, int32, rising with it: the leading bits of its distance to 1."""
    cell = torch.empty(len(values), dtype=torch.int32, device=values.device)
    gap = values.new_empty(min(PIECE, len(values)))  # fresh memory would take most of the time
    for part, out in zip(values.split(PIECE), cell.split(PIECE), strict=True):
        bits = torch.sub(1, part, out=gap[: len(part)]).view(torch.int64)
        out.copy_(bits.bitwise_right_shift_(SHIFT).neg_().add_(FIRST))
    return cell.clamp_(min=0, max=CELLS - 1)
