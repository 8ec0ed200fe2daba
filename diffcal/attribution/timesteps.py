"""Timesteps at which gradients are taken, and their noise levels for any denoiser."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.discrete_noise import DiscreteNoise
from diffcal.diffusion.schedules import alphas_cumprod, sigma_of_alphas_cumprod
from diffcal.errors import ConfigError

__all__ = ["NoiseLevels", "TimestepStrategy", "elbo_weights", "noise_levels", "timestep_grid"]

TimestepStrategy = Literal["centred", "uniform", "cumulative", "released"]


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels of the rows of one sample."""

    timesteps: tuple[int, ...]
    """Indices into the table of timesteps; the order number of a level given as sigma."""
    sigmas: Float64[Tensor, " t"]
    """Noise standard deviations in the units of ``x``."""
    weights: Float64[Tensor, " t"]
    """Weight of each level in ``weighted-mse``; NaN for levels given as sigma."""


def timestep_grid(
    count: int, strategy: TimestepStrategy = "uniform", total: int = 1000
) -> tuple[int, ...]:
    """``count`` timesteps of a table of ``total``.

    - ``centred``: the middle of each of ``count`` equal parts, ``floor((2i + 1) total / (2 count))``:
      500 for one, 250 and 750 for two;
    - ``uniform``: ``floor(i total / count)``, which is ``range(0, total, total // count)`` where
      ``count`` divides ``total``;
    - ``cumulative``: the first ``count``;
    - ``released``: ``range(0, total, total // count)`` as in the DAS release, which has *more* than
      ``count`` entries where ``count`` does not divide ``total``.

    Raises:
        ConfigError: ``count`` is not between 1 and ``total``, or an unknown strategy.
    """
    if not 1 <= count <= total:
        raise ConfigError(f"number of timesteps must be between 1 and {total}, got {count}")
    if strategy == "centred":
        return tuple((2 * i + 1) * total // (2 * count) for i in range(count))
    if strategy == "uniform":
        return tuple(i * total // count for i in range(count))
    if strategy == "cumulative":
        return tuple(range(count))
    if strategy == "released":
        return tuple(range(0, total, total // count))
    raise ConfigError(
        f"unknown timesteps '{strategy}': use centred, uniform, cumulative or released"
    )


def elbo_weights(alphas: Float64[Tensor, " t"]) -> Float64[Tensor, " t"]:
    """``beta_t / (2 alpha_t (1 - abar_t))`` of every timestep of a table of ``abar_t``."""
    steps = alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
    return (1 - steps) / (2 * steps * (1 - alphas))


def noise_levels(
    denoiser: Denoiser,
    timesteps: int | Sequence[int] = 10,
    strategy: TimestepStrategy = "uniform",
    sigmas: Sequence[float] | None = None,
) -> NoiseLevels:
    """Noise levels of ``timesteps`` for ``denoiser``.

    Models with a table of timesteps use their own. Models in continuous noise levels (the EDM
    family) use the linear DDPM table of 1000 entries, clipped to the levels that they support.

    Args:
        timesteps: How many, placed by ``strategy``; or the timesteps themselves.
        sigmas: Noise levels instead of timesteps.

    Raises:
        ConfigError: a timestep outside the table, a level that is not positive, or an empty list.
    """
    if sigmas is not None:
        levels = torch.tensor(list(sigmas), dtype=torch.float64)
        if not len(levels) or not bool((levels > 0).all() & levels.isfinite().all()):
            raise ConfigError(f"sigmas must be positive numbers, got {list(sigmas)}")
        order = tuple(range(len(levels)))
        return NoiseLevels(order, levels, torch.full_like(levels, float("nan")))
    noise = getattr(denoiser, "noise", None)
    if isinstance(noise, DiscreteNoise):
        table = noise.log_sigmas.detach().cpu().exp()
    else:
        table = sigma_of_alphas_cumprod(alphas_cumprod("ddpm_linear"))
    total = len(table)
    chosen = (
        timestep_grid(timesteps, strategy, total)
        if isinstance(timesteps, int)
        else tuple(int(t) for t in timesteps)
    )
    outside = [t for t in chosen if not 0 <= t < total]
    if outside or not chosen:
        raise ConfigError(
            f"timestep {outside[0]} is outside the table (0 to {total - 1})"
            if outside
            else "give at least one timestep"
        )
    index = torch.tensor(chosen)
    weights = elbo_weights(1 / (1 + table.square()))[index]
    clipped = table[index].clamp(denoiser.sigma_min, denoiser.sigma_max)
    return NoiseLevels(chosen, clipped, weights)
