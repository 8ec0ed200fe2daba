"""Blended real images of a training step, decided by (seed, step) whatever the number of processes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffcal.calibration.losses.mixup import MixupDraws, blend, draw_mixup
from diffcal.calibration.losses.rank_mixup import MixedCopies
from diffcal.calibration.training_config import DataMethodConfig
from diffcal.core.rng import item_generator

__all__ = ["Blender", "draw_blends"]


def draw_blends(
    config: DataMethodConfig, count: int, seed: int, step: int
) -> tuple[MixupDraws, ...]:
    """One set of draws for each blended copy of a step's ``count`` real images.

    One for mixup, ``config.copy_count`` for RankMixup, none for a step that ``config.probability``
    leaves alone.
    """
    if config.name == "none":
        return ()
    generator = item_generator(seed, "classifier-mixup", step)
    chosen = torch.rand(count if config.per_example else 1, generator=generator)
    chosen = chosen < config.probability
    if not bool(chosen.any()):
        return ()
    blends = []
    for _ in range(config.copy_count):
        draws = draw_mixup(
            count,
            alpha=config.strength,
            per_example=config.per_example,
            generator=generator,
        )
        # an example left alone keeps all of itself
        blends.append(MixupDraws(torch.where(chosen, draws.share, 1.0), draws.partner))
    return tuple(blends)


@dataclass(frozen=True)
class Blender:
    """Makes the blended images of one part of a step's batch.

    Args:
        images: Normalised images of any rows of the batch, by their place in it.
        targets: Hard or soft targets of the whole batch.
        num_classes: Of hard targets.
    """

    images: Callable[[Tensor], Float[Tensor, "b c h w"]]
    targets: Tensor
    num_classes: int

    def mixup(
        self, x: Float[Tensor, "b c h w"], part: slice, draws: MixupDraws
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
        """The images ``x`` of ``part`` and their targets, blended with their partners'."""
        draws = draws.part(part)
        q, other = self._soft(self.targets[part]), self._soft(self.targets[draws.partner])
        return (
            blend(x, self.images(draws.partner), draws.share),
            blend(q, other, draws.share).to(x.device),
        )

    def copies(
        self, x: Float[Tensor, "b c h w"], part: slice, blends: tuple[MixupDraws, ...]
    ) -> MixedCopies:
        """Several blends of the images ``x`` of ``part``, besides the raw ones."""
        made = [self.mixup(x, part, draws) for draws in blends]
        likeliest = self._soft(self.targets).argmax(dim=1)
        same = [likeliest[part] == likeliest[draws.partner[part]] for draws in blends]
        return MixedCopies(
            torch.stack([images for images, _ in made]),
            torch.stack([targets for _, targets in made]),
            torch.stack(same).to(x.device),
        )

    def _soft(self, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return targets.float()
        return F.one_hot(targets, self.num_classes).float()
