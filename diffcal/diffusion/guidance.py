"""Guidance: denoisers pushed away from what an unconditional or weaker denoiser says."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.core.tensors import append_dims
from diffcal.errors import ConfigError

__all__ = ["Denoise", "Guided", "guided", "in_interval"]

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``D(x, sigma [b], condition)``: a :class:`~diffcal.diffusion.denoisers.Denoiser` or any function."""


class Guided:
    """``D_u + scale (D_c - D_u)`` where the noise level is inside the interval, ``D_c`` elsewhere.

    ``D_u`` is the denoiser's own unconditional branch, evaluated in one doubled batch with ``D_c``
    (classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598; here ``scale`` 1 is no
    guidance), or a weaker ``guide`` under the same condition (autoguidance, Karras et al. 2024,
    arXiv:2406.02507), which costs a second evaluation.

    Args:
        denoiser: Has ``unconditional(batch_size)`` unless ``guide`` is given.
        scale: Weight of the difference.
        interval: Guide only at noise levels in (low, high] (Kynkäänniemi et al. 2024,
            arXiv:2404.07724); None: always. Each row is judged by its own noise level.
        guide: The weaker denoiser.

    Raises:
        ConfigError: no unconditional branch, a scale that is not finite, an empty interval.
    """

    def __init__(
        self,
        denoiser: Any,
        scale: float,
        interval: tuple[float, float] | None = None,
        guide: Denoise | None = None,
    ) -> None:
        if not math.isfinite(scale):
            raise ConfigError(f"guidance scale must be finite, got {scale}")
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise ConfigError(f"guidance interval {interval} is no range of noise levels")
        if guide is None:
            if not hasattr(denoiser, "unconditional"):
                raise ConfigError(
                    "guidance needs a denoiser with an unconditional branch, or a weaker denoiser "
                    "as guide"
                )
            denoiser.unconditional(1)  # refuses here rather than in the middle of a run
        self.denoiser, self.guide = denoiser, guide
        self.scale, self.interval = scale, interval
        # What samplers ask of a denoiser, handed on.
        self.module = getattr(denoiser, "module", None)
        self.sigma_min = getattr(denoiser, "sigma_min", 0.0)
        self.sigma_max = getattr(denoiser, "sigma_max", math.inf)

    def __call__(
        self,
        x: Float[Tensor, "b *shape"],
        sigma: Float[Tensor, " b"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "b *shape"]:
        """Guided denoised ``x``."""
        if self.interval is None:
            return self._guide(x, sigma, condition, self.scale)
        inside = (sigma > self.interval[0]) & (sigma <= self.interval[1])
        if not bool(inside.any()):
            return self.denoiser(x, sigma, condition)
        scale = torch.where(inside, self.scale, 1.0).to(x.dtype)
        return self._guide(x, sigma, condition, append_dims(scale, x))

    def _guide(
        self, x: Tensor, sigma: Tensor, condition: Tensor | None, scale: Tensor | float
    ) -> Tensor:
        if self.guide is not None:
            strong, weak = self.denoiser(x, sigma, condition), self.guide(x, sigma, condition)
        else:
            if condition is None:
                raise ConfigError("guidance needs a condition to guide towards")
            none = self.denoiser.unconditional(len(x)).to(condition.device, condition.dtype)
            strong, weak = self.denoiser(
                torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([condition, none])
            ).chunk(2)
        return weak + scale * (strong - weak)


def guided(denoiser: Any, scale: float) -> Denoise:
    """``denoiser`` with classifier-free guidance at every noise level; itself if ``scale`` is 1.

    A denoiser that mixes conditions inside (``with_guidance`` method) guides itself.

    Raises:
        ConfigError: the denoiser has no unconditional branch.
    """
    if scale == 1:
        return denoiser
    if hasattr(denoiser, "with_guidance"):
        return denoiser.with_guidance(scale)
    return Guided(denoiser, scale)


def in_interval(sigma: float, interval: tuple[float, float] | None) -> bool:
    """Is a noise level in (low, high]? Without an interval every one is."""
    return interval is None or interval[0] < sigma <= interval[1]
