"""A random subset of the gradient's coordinates."""

import math

import torch
from jaxtyping import Int64
from torch import Tensor

from diffcal.attribution.projection import LocalProjector
from diffcal.core.rng import item_generator
from diffcal.errors import ConfigError

__all__ = ["MaskProjection", "random_coordinates"]


class MaskProjection(LocalProjector):
    """``dim`` coordinates drawn without replacement, times sqrt(num_params / dim).

    Squared norms are kept in mean, but the error is large for gradients with few large entries;
    followed by an SJLT it is the first stage of GraSS (arXiv:2505.18976).

    Raises:
        ConfigError: more coordinates are asked for than there are.
    """

    def __init__(self, num_params: int, dim: int, seed: int = 0) -> None:
        self.num_params, self.dim, self.seed = num_params, dim, seed
        self.coordinates = random_coordinates(num_params, dim, seed)
        self._scale = math.sqrt(num_params / dim)

    def touched(self, offset: int, stop: int) -> tuple[int, int]:
        """Places of the kept coordinates among ``offset .. stop``."""
        low, high = torch.searchsorted(self.coordinates, torch.tensor([offset, stop])).tolist()
        return low, high

    def add_at(self, out: Tensor, block: Tensor, offset: int, origin: int) -> None:
        """Add the kept coordinates of the block."""
        low, high = self.touched(offset, offset + block.shape[1])
        chosen = (self.coordinates[low:high] - offset).to(block.device)
        out[:, low - origin : high - origin] += block[:, chosen] * self._scale


def random_coordinates(total: int, count: int, seed: int) -> Int64[Tensor, " {count}"]:
    """``count`` different integers below ``total``, ascending, every subset equally likely."""
    if count > total:
        raise ConfigError(
            f"cannot keep {count} of {total} gradient coordinates: lower the projection's dim"
        )
    generator = item_generator(seed, "projection-mask", 0)
    if 4 * count > total:
        return torch.randperm(total, generator=generator)[:count].sort().values
    # Few of many: the first `count` different values of a stream of draws are a uniform subset.
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        draws = torch.randint(total, (2 * count,), generator=generator)
        chosen.update(dict.fromkeys(draws.tolist()))
    return torch.tensor(list(chosen)[:count]).sort().values
