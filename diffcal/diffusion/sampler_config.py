"""Settings of the samplers: solver, noise grid, churn, guidance, and named presets."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from diffcal.diffusion.schedules import ScheduleKind
from diffcal.errors import ConfigError

__all__ = ["PRESETS", "SamplerConfig", "Solver", "evaluations"]

Solver = Literal["heun", "euler", "dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3"]

_EDM = {
    "solver": "heun",
    "steps": 18,
    "schedule": "karras",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "rho": 7.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "edm-18": _EDM,
    "edm-20": _EDM | {"steps": 20},
    "edm-25": _EDM | {"steps": 25},
    "fast": {
        "solver": "unipc_2",
        "steps": 13,
        "schedule": "karras",
        "sigma_min": 0.02,
        "sigma_max": 40.0,
        "rho": 15.0,
    },
}
"""What a preset sets. edm-18 is EDM's own for CIFAR-10; edm-20 and edm-25 are those of CSM's
released recipes for CIFAR-10 and for CIFAR-100. fast needs 13 evaluations, a third of edm-20's 39:
a multistep solver gains most from levels that are nearly even in ln sigma (large rho), between ends
where the trajectory bends; chosen by distance to the exact solution (benchmarks/solvers.py)."""


_OF_PRESET: Any = None  # "not given", for fields that always have a value after construction


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How samples are drawn from a denoiser.

    Fields that are not given come from ``preset``, and without one from EDM's default (Karras et
    al. 2022, table 1: Heun, 18 steps, 35 evaluations). After construction every field has its
    value, and ``preset`` is None if a field deviates from it.

    Raises:
        ConfigError: a value out of range, or all values of a preset given with others than its own.
    """

    preset: str | None = None
    solver: Solver = _OF_PRESET
    steps: int = _OF_PRESET
    """Number of noise levels above 0."""
    schedule: ScheduleKind = _OF_PRESET
    sigma_min: float = _OF_PRESET
    sigma_max: float = _OF_PRESET
    """Ends of the grid; clipped to the denoiser's range when sampling."""
    rho: float = _OF_PRESET
    """Exponent of the karras schedule; the others ignore it."""
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    guidance_scale: float = 1.0
    """1: no guidance."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only at noise levels in (low, high] (Kynkäänniemi et al. 2024, arXiv:2404.07724)."""

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ConfigError(f"unknown preset '{self.preset}': use {', '.join(PRESETS)}")
        values = PRESETS["edm-18" if self.preset is None else self.preset]
        given = [name for name in values if getattr(self, name) is not None]
        deviating = [name for name in given if getattr(self, name) != values[name]]
        if self.preset is not None and deviating:
            if len(given) == len(values):
                name = deviating[0]
                raise ConfigError(
                    f"preset '{self.preset}' has {name} {values[name]!r}, but every field is given "
                    f"and {name} is {getattr(self, name)!r}; name a preset or all the fields"
                )
            object.__setattr__(self, "preset", None)
        for name, value in values.items():
            if name not in given:
                object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        for name, value, choices in (
            ("solver", self.solver, get_args(Solver)),
            ("schedule", self.schedule, get_args(ScheduleKind)),
        ):
            if value not in choices:
                raise ConfigError(f"unknown {name} '{value}': use {', '.join(choices)}")
        if self.steps < 2:
            raise ConfigError(f"steps must be at least 2, got {self.steps}")
        if not (0 < self.sigma_min < self.sigma_max and math.isfinite(self.sigma_max)):
            raise ConfigError(
                "noise levels must satisfy 0 < sigma_min < sigma_max < infinity, got "
                f"{self.sigma_min} and {self.sigma_max}"
            )
        if not (self.rho > 0 and math.isfinite(self.rho)):
            raise ConfigError(f"rho must be positive, got {self.rho}")
        if not (self.s_churn >= 0 and math.isfinite(self.s_churn)):
            raise ConfigError(f"s_churn must not be negative, got {self.s_churn}")
        if self.s_churn and self.solver not in ("heun", "euler"):
            raise ConfigError(
                f"churn (s_churn {self.s_churn:g}) needs solver heun or euler: {self.solver} reuses "
                "earlier evaluations, which fresh noise would make stale"
            )
        if not 0 <= self.s_min <= self.s_max:
            raise ConfigError(f"s_min {self.s_min} and s_max {self.s_max} are no range")
        if not (self.s_noise >= 0 and math.isfinite(self.s_noise)):
            raise ConfigError(f"s_noise must not be negative, got {self.s_noise}")
        if not math.isfinite(self.guidance_scale):
            raise ConfigError(f"guidance_scale must be finite, got {self.guidance_scale}")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < high:
                raise ConfigError(f"guidance_interval {low} to {high} is no range of noise levels")


def evaluations(config: SamplerConfig) -> int:
    """Denoiser calls for one batch: ``2 steps - 1`` for heun, ``steps`` for the others.

    A guided call counts as one, though its batch is doubled inside the guidance interval.
    """
    return 2 * config.steps - 1 if config.solver == "heun" else config.steps
