"""Grids of noise levels for samplers, and noise levels of discrete-time models.

All grids are one construction: a function of sigma in which the levels are equally spaced, from
``sigma_max`` down to ``sigma_min``, and a final 0. The kinds differ in that function only.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcal.errors import ConfigError

__all__ = [
    "AlphasKind",
    "ScheduleKind",
    "alphas_cumprod",
    "clip_range",
    "ddpm_sigmas",
    "karras_sigmas",
    "log_snr_sigmas",
    "sigma_grid",
    "sigma_of_alphas_cumprod",
    "sigma_of_timestep",
    "timestep_of_sigma",
    "ve_sigmas",
    "vp_sigma",
    "vp_sigmas",
    "vp_time",
]

ScheduleKind = Literal[
    "karras", "log_snr", "vp", "ve", "ddpm_linear", "ddpm_cosine", "scaled_linear"
]
AlphasKind = Literal["ddpm_linear", "ddpm_cosine", "scaled_linear"]
Grid = Float64[Tensor, " n"]

_MAX_BETA = 0.999  # improved DDPM caps the last steps of the cosine schedule, whose abar is 0


def sigma_grid(
    kind: ScheduleKind,
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Grid:
    """``steps`` falling noise levels from ``sigma_max`` to ``sigma_min`` and a final 0, float64.

    The levels are equally spaced in a function of sigma: ``sigma^(1/rho)`` (karras), ``ln sigma``
    (log_snr and ve, which differ in the range they are usually given), the time of the continuous
    variance preserving process (vp), or the fractional timestep of a discrete one (ddpm_linear,
    ddpm_cosine, scaled_linear; the range is clipped to the 1000 levels of its table).

    Raises:
        ConfigError: fewer than 2 steps, an empty or negative range, or an unknown kind.
    """
    if kind == "karras":
        return karras_sigmas(steps, sigma_min, sigma_max, rho)
    if kind in ("log_snr", "ve"):
        return log_snr_sigmas(steps, sigma_min, sigma_max)
    if kind == "vp":
        return vp_sigmas(steps, sigma_min, sigma_max)
    if kind in get_args(AlphasKind):
        return ddpm_sigmas(steps, alphas_cumprod(kind), sigma_min, sigma_max)
    raise ConfigError(f"unknown schedule '{kind}': use {', '.join(get_args(ScheduleKind))}")


def karras_sigmas(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Grid:
    """Levels equally spaced in ``sigma^(1/rho)`` and a final 0, float64 ``[steps + 1]``.

    Source: Karras et al. 2022 (arXiv:2206.00364), equation 5; its defaults.

    Raises:
        ConfigError: fewer than 2 steps (the formula divides by ``steps - 1``), an empty range, or
            ``rho`` not positive.
    """
    if not (math.isfinite(rho) and rho > 0):
        raise ConfigError(f"rho must be positive, got {rho}")
    return _grid(steps, sigma_min, sigma_max, lambda s: s ** (1 / rho), lambda u: u**rho)


def log_snr_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Grid:
    """Levels equally spaced in ``ln sigma`` (that is, in log-SNR) and a final 0, float64."""
    return _grid(steps, sigma_min, sigma_max, torch.log, torch.exp)


def ve_sigmas(steps: int, sigma_min: float = 0.02, sigma_max: float = 100.0) -> Grid:
    """Levels of the variance exploding process and a final 0, float64.

    Equally spaced in ``ln sigma``, over the range that its networks were trained on. Source: Song et
    al. 2021 (arXiv:2011.13456); Karras et al. 2022, table 1, column "VE".
    """
    return log_snr_sigmas(steps, sigma_min, sigma_max)


def vp_sigmas(
    steps: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
) -> Grid:
    """Levels equally spaced in the time of the variance preserving process and a final 0, float64.

    The default range is that of the times 1 down to 0.001. Source: Song et al. 2021
    (arXiv:2011.13456); Karras et al. 2022, table 1, column "VP".
    """
    ends = vp_sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64), beta_d, beta_min)
    return _grid(
        steps,
        float(ends[0]) if sigma_min is None else sigma_min,
        float(ends[1]) if sigma_max is None else sigma_max,
        lambda s: vp_time(s, beta_d, beta_min),
        lambda t: vp_sigma(t, beta_d, beta_min),
    )


def ddpm_sigmas(
    steps: int,
    alphas: Float[Tensor, " t"],
    sigma_min: float = 0.0,
    sigma_max: float = math.inf,
) -> Grid:
    """Levels at equally spaced (fractional) timesteps of a table and a final 0, float64.

    Args:
        alphas: ``alphas_cumprod`` of the timesteps 0, 1, ...
        sigma_min: Ends of the grid, clipped to the table's own range.
        sigma_max: See ``sigma_min``.
    """
    table = sigma_of_alphas_cumprod(alphas)
    low, high = clip_range(sigma_min, sigma_max, float(table[0]), float(table[-1]))
    return _grid(
        steps,
        low,
        high,
        lambda s: timestep_of_sigma(s, alphas),
        lambda t: sigma_of_timestep(t, alphas),
    )


def clip_range(
    sigma_min: float, sigma_max: float, lowest: float, highest: float
) -> tuple[float, float]:
    """(sigma_min, sigma_max) clipped to what a network supports.

    Raises:
        ConfigError: nothing is left.
    """
    low, high = max(sigma_min, lowest), min(sigma_max, highest)
    if not low < high:
        raise ConfigError(
            f"noise levels {sigma_min:g} to {sigma_max:g} do not meet the supported range "
            f"{lowest:g} to {highest:g}"
        )
    return low, high


def alphas_cumprod(
    kind: AlphasKind,
    timesteps: int = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
) -> Float64[Tensor, " t"]:
    """Share of signal variance ``abar_t`` at the timesteps 0 ... ``timesteps`` - 1, float64.

    ddpm_linear: betas from 1e-4 to 0.02 (Ho et al. 2020, arXiv:2006.11239, section 4);
    scaled_linear: square roots of betas linear from 0.00085 to 0.012 (Stable Diffusion, Rombach et
    al. 2022); ddpm_cosine: squared cosine with offset 0.008 and betas of at most 0.999 (Nichol and
    Dhariwal 2021, arXiv:2102.09672, equation 17).

    Raises:
        ConfigError: an unknown kind, betas outside (0, 1), or given for the cosine schedule.
    """
    if timesteps < 2:
        raise ConfigError(f"timesteps must be at least 2, got {timesteps}")
    if kind == "ddpm_cosine":
        if beta_start is not None or beta_end is not None:
            raise ConfigError("the cosine schedule has no beta_start and beta_end")
        t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        bar = ((t + 0.008) / 1.008 * (math.pi / 2)).cos().square()
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=_MAX_BETA)
    elif kind in ("ddpm_linear", "scaled_linear"):
        default = (1e-4, 0.02) if kind == "ddpm_linear" else (0.00085, 0.012)
        start = default[0] if beta_start is None else beta_start
        end = default[1] if beta_end is None else beta_end
        if not 0 < start <= end < 1:
            raise ConfigError(f"betas must satisfy 0 < start <= end < 1, got {start} and {end}")
        power = 1.0 if kind == "ddpm_linear" else 2.0
        ends = start ** (1 / power), end ** (1 / power)
        betas = torch.linspace(*ends, timesteps, dtype=torch.float64) ** power
    else:
        raise ConfigError(f"unknown table '{kind}': use {', '.join(get_args(AlphasKind))}")
    return (1 - betas).cumprod(0)


def sigma_of_alphas_cumprod(alphas: Float[Tensor, " t"]) -> Float64[Tensor, " t"]:
    """Noise level ``sqrt((1 - abar) / abar)`` of ``x / sqrt(abar) = x_0 + sigma noise``, float64.

    Raises:
        ConfigError: the table does not fall strictly within (0, 1).
    """
    alphas = alphas.double()
    if alphas.numel() < 2 or not bool(
        (alphas > 0).all() and (alphas < 1).all() and (alphas.diff() < 0).all()
    ):
        raise ConfigError(
            "alphas_cumprod must have at least 2 entries that fall strictly within (0, 1); leave out "
            "a last entry of 0 (zero terminal SNR), which has no finite noise level"
        )
    return ((1 - alphas) / alphas).sqrt()


def sigma_of_timestep(
    timestep: Float[Tensor, "..."], alphas: Float[Tensor, " t"]
) -> Float64[Tensor, "..."]:
    """Noise levels of timesteps, fractional ones interpolated in ``ln sigma``; float64."""
    table = sigma_of_alphas_cumprod(alphas).log().to(timestep.device)
    position = timestep.double().clamp(0, len(table) - 1)
    below = position.floor().long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], position - below).exp()


def timestep_of_sigma(
    sigma: Float[Tensor, "..."], alphas: Float[Tensor, " t"]
) -> Float64[Tensor, "..."]:
    """Fractional timesteps of noise levels, the inverse of :func:`sigma_of_timestep`; float64.

    Levels outside the table get its first or last timestep.
    """
    table = sigma_of_alphas_cumprod(alphas).log().to(sigma.device)
    level = sigma.double().clamp_min(torch.finfo(torch.float64).tiny).log()
    level = level.clamp(table[0], table[-1])
    above = torch.searchsorted(table, level).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    return above - 1 + (level - low) / (high - low)


def vp_sigma(
    t: Float[Tensor, "..."], beta_d: float = 19.9, beta_min: float = 0.1
) -> Float[Tensor, "..."]:
    """Noise level ``sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)`` at time ``t`` in [0, 1]."""
    return torch.expm1(beta_d * t.square() / 2 + beta_min * t).sqrt()


def vp_time(
    sigma: Float[Tensor, "..."], beta_d: float = 19.9, beta_min: float = 0.1
) -> Float[Tensor, "..."]:
    """Time at which the variance preserving process has noise level ``sigma``."""
    inner = beta_min**2 + 2 * beta_d * torch.log1p(sigma.square())
    return (inner.sqrt() - beta_min) / beta_d


def _grid(
    steps: int,
    sigma_min: float,
    sigma_max: float,
    to_time: Callable[[Tensor], Tensor],
    to_sigma: Callable[[Tensor], Tensor],
) -> Grid:
    if steps < 2:
        raise ConfigError(f"a noise grid needs at least 2 steps, got {steps}")
    if not (0 < sigma_min < sigma_max and math.isfinite(sigma_max)):
        raise ConfigError(
            f"noise levels must satisfy 0 < sigma_min < sigma_max < infinity, got {sigma_min} and "
            f"{sigma_max}"
        )
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64)
    start, end = to_time(ends)
    share = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    sigmas = to_sigma(start + share * (end - start))
    sigmas[0], sigmas[-1] = sigma_max, sigma_min  # not up to rounding, but exactly
    return torch.cat([sigmas, sigmas.new_zeros(1)])
