"""Ratios where the images change: halving, again and again, the largest step of a ladder.

Between two classes a sampler mostly stays with one of them and passes to the other within a small
part of the way, elsewhere for every noise: of images at equal steps of lambda few lie between the
classes. The image is a continuous function of lambda all the same (it solves an ordinary
differential equation whose right-hand side is continuous in lambda), so that halving the interval at
whose ends the images differ most finds the passage wherever it lies. This placement is ours; CSM (Luo
et al. 2025, arXiv:2504.13548) takes equal steps.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.errors import ConfigError

__all__ = ["FINEST", "Draw", "bisected"]

FINEST = 2.0**-16
"""Intervals of lambda that are not halved any more."""

START = (0.0, 0.5, 1.0)

Draw = Callable[[Sequence[int], Float[Tensor, " b"]], Float[Tensor, "b c h w"]]
"""(ladder of each row, lambda of each row) to samples on the CPU."""


def bisected(
    draw: Draw, ladders: int, members: int, spare: int = 0
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m c h w"]]:
    """Ladders of ``members`` images whose steps, in root mean square, are alike.

    Every ladder starts with lambda 0, 1/2 and 1. Each further image halves the interval whose ends
    differ most, of equal ones the first; one below :data:`FINEST` only if all are. At the end
    ``spare`` images leave again, one after the other, each the one whose neighbours differ least.

    Args:
        draw: Draws one sample for each row; called once with three rows for each ladder, then
            ``members + spare - 3`` times with one row for each.
        ladders: How many.
        members: Images in each, at least 3.
        spare: Images that are drawn beyond these. With some the images lie more evenly, because
            those that were only needed to find the passage are not kept.

    Returns:
        (lambda, rising from 0 to 1, float32 and exact; samples in that order).

    Raises:
        ConfigError: fewer than 3 members, or fewer than no spare ones.
    """
    if members < len(START) or spare < 0:
        raise ConfigError(
            f"a bisection needs at least 3 members and 0 spare ones, got {members} and {spare}"
        )
    first = draw(
        [ladder for ladder in range(ladders) for _ in START], torch.tensor(START * ladders)
    )
    made = [_Ladder(list(one)) for one in first.unflatten(0, (ladders, len(START)))]
    for _ in range(members + spare - len(START)):
        places = [ladder.widest() for ladder in made]
        middles = [ladder.middle(place) for ladder, place in zip(made, places, strict=True)]
        drawn = draw(range(ladders), torch.tensor(middles))
        for ladder, place, middle, x in zip(made, places, middles, drawn, strict=True):
            ladder.insert(place, middle, x)
    for ladder in made:
        for _ in range(spare):
            ladder.drop()
    lambdas = torch.tensor([ladder.lambdas for ladder in made])
    return lambdas, torch.stack([torch.stack(ladder.samples) for ladder in made])


class _Ladder:
    """Samples by rising lambda, and the steps between them."""

    def __init__(self, samples: list[Tensor]) -> None:
        self.samples, self.lambdas = samples, list(START)
        self.steps = [_distance(a, b) for a, b in pairwise(samples)]

    def widest(self) -> int:
        """Place of the interval to halve: those that may still be halved first, then by their step."""
        wide = [right - left > FINEST for left, right in pairwise(self.lambdas)]
        return max(range(len(self.steps)), key=lambda place: (wide[place], self.steps[place]))

    def middle(self, place: int) -> float:
        return (self.lambdas[place] + self.lambdas[place + 1]) / 2

    def insert(self, place: int, middle: float, x: Tensor) -> None:
        left, right = self.samples[place], self.samples[place + 1]
        self.steps[place : place + 1] = [_distance(left, x), _distance(x, right)]
        self.samples.insert(place + 1, x)
        self.lambdas.insert(place + 1, middle)

    def drop(self) -> None:
        """Remove the image whose neighbours differ least."""
        merged = [
            _distance(self.samples[place - 1], self.samples[place + 1])
            for place in range(1, len(self.samples) - 1)
        ]
        least = min(range(len(merged)), key=merged.__getitem__)
        self.steps[least : least + 2] = [merged[least]]
        del self.samples[least + 1], self.lambdas[least + 1]


def _distance(a: Float[Tensor, "c h w"], b: Float[Tensor, "c h w"]) -> float:
    return float((a - b).double().square().mean().sqrt())
