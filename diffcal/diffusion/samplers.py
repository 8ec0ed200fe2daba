"""From noise to samples: Heun (deterministic or with churn), Euler and multistep solvers.

One function, :func:`sample`, integrates the probability-flow equation ``dx/dsigma = (x - D) / sigma``
of any denoiser. The state is float64 (float32 on devices without it, such as MPS) while networks
compute in their own format; everything that depends on the noise levels alone is worked out before
the first evaluation, and nothing waits for a GPU until the last.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcal.diffusion.guidance import Denoise, guided, in_interval
from diffcal.diffusion.multistep import Step, Update, multistep_plan
from diffcal.diffusion.sampler_config import PRESETS, SamplerConfig, Solver, evaluations
from diffcal.diffusion.schedules import clip_range, sigma_grid
from diffcal.errors import ConfigError, DataError, NumericalError

__all__ = [
    "PRESETS",
    "OnStep",
    "SamplerConfig",
    "Solver",
    "churned_sigmas",
    "evaluations",
    "sample",
    "sampling_sigmas",
]

ChurnNoise = Callable[[int], Tensor]
OnStep = Callable[[int, float, Tensor, Tensor], None]


@torch.no_grad()
def sample(
    denoise: Any,
    noise: Float[Tensor, "b *shape"],
    condition: Tensor | None,
    config: SamplerConfig,
    *,
    churn_noise: ChurnNoise | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b *shape"]:
    """Clean samples [b, ...] in float64 (float32 where the device has no float64).

    Args:
        denoise: A :class:`~diffcal.diffusion.denoisers.Denoiser`, or any function of (x, sigma [b],
            condition). It is called with float64 tensors; denoisers cast. If it has them,
            ``sigma_min`` and ``sigma_max`` clip the grid, and ``round_sigma`` (its own or its module's)
            rounds the levels to those that the network knows.
        noise: Standard normal draw; the state starts at ``noise`` times the largest level.
        condition: From ``denoiser.condition(weights)``; None for unconditional models.
        config: Solver, grid, churn and guidance. Guidance needs ``denoise.unconditional``, and is
            applied here: do not pass a :class:`~diffcal.diffusion.guidance.Guided` as well.
        churn_noise: Standard normal tensor of a step (counted from 0) that broadcasts over the
            state, so that the caller owns randomness and members of a group can share it. Only
            called for steps that add noise.
        on_step: Called after each step with the step's number, the noise level that it left, the
            state it reached and the last denoised state, which it must not change.

    Raises:
        ConfigError: churn without ``churn_noise``, guidance without an unconditional branch, or no
            noise level in the denoiser's range.
        DataError: the denoiser returned another shape.
        NumericalError: the denoiser returned NaN or infinity; names the step and the noise level.
            On a CPU at once, elsewhere after the last step.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithms 1 and 2; for the multistep solvers see
    :mod:`diffcal.diffusion.multistep`.
    """
    sigmas = sampling_sigmas(denoise, config).tolist()
    x = noise.to(_state_dtype(noise.device)) * sigmas[0]
    churned = churned_sigmas(sigmas, config, _rounding(denoise))
    if churned != sigmas[:-1] and churn_noise is None:
        raise ConfigError(
            f"s_churn {config.s_churn:g} adds fresh noise: give churn_noise, a function of the step"
        )
    evaluate = _Evaluations(denoise, condition, config, x, sorted({*churned, *sigmas[:-1]}))
    if config.solver in ("heun", "euler"):
        for i, (sigma, hat, after) in enumerate(zip(sigmas, churned, sigmas[1:], strict=False)):
            if hat > sigma:
                assert churn_noise is not None
                fresh = churn_noise(i).to(x.device, x.dtype)
                x = x + fresh * (math.sqrt(hat**2 - sigma**2) * config.s_noise)
            x, denoised = _one_step(evaluate, x, i, hat, after, heun=config.solver == "heun")
            if on_step is not None:
                on_step(i, sigma, x, denoised)
    else:
        plan = multistep_plan(config.solver, sigmas)
        x = _multistep(evaluate, x, sigmas, plan, on_step)
    evaluate.check()
    return x


def sampling_sigmas(denoise: Any, config: SamplerConfig) -> Float64[Tensor, " n"]:
    """Noise levels of ``config`` for this denoiser: clipped to its range, rounded as it asks, 0 last.

    Raises:
        ConfigError: the ranges do not meet, or rounding makes two levels equal.
    """
    low, high = clip_range(
        config.sigma_min,
        config.sigma_max,
        getattr(denoise, "sigma_min", 0.0),
        getattr(denoise, "sigma_max", math.inf),
    )
    sigmas = sigma_grid(config.schedule, config.steps, low, high, config.rho)
    round_sigma = _rounding(denoise)
    if round_sigma is not None:
        sigmas = torch.cat([round_sigma(sigmas[:-1]).double().cpu(), sigmas[-1:]])
        if bool((sigmas.diff() >= 0).any()):
            raise ConfigError(
                f"{config.steps} steps from {high:g} to {low:g} fall on equal noise levels of the "
                "network's table; use fewer steps or a larger sigma_min"
            )
    return sigmas


def churned_sigmas(
    sigmas: list[float], config: SamplerConfig, round_sigma: Callable[..., Tensor] | None = None
) -> list[float]:
    """Noise level at which each step starts, raised by churn: ``sigma (1 + gamma)``.

    ``gamma = min(s_churn / steps, sqrt(2) - 1)`` where ``s_min <= sigma <= s_max``, else 0 (Karras
    et al. 2022, algorithm 2).
    """
    gamma = min(config.s_churn / config.steps, math.sqrt(2) - 1)
    levels = []
    for sigma in sigmas[:-1]:
        if gamma > 0 and config.s_min <= sigma <= config.s_max:
            level = sigma * (1 + gamma)
            if round_sigma is not None:
                level = float(round_sigma(torch.tensor(level, dtype=torch.float64)))
            levels.append(max(level, sigma))
        else:
            levels.append(sigma)
    return levels


class _Evaluations:
    """Calls of the denoiser at known noise levels, guided where asked for, and checked."""

    def __init__(
        self,
        denoise: Any,
        condition: Tensor | None,
        config: SamplerConfig,
        x: Tensor,
        levels: list[float],
    ) -> None:
        self.plain: Denoise = denoise
        self.guided = guided(denoise, config.guidance_scale)
        self.interval = config.guidance_interval
        self.condition = condition
        table = torch.tensor(levels, dtype=x.dtype).to(x.device)
        # One transfer for all steps.
        self.sigma = {level: table[i].expand(len(x)) for i, level in enumerate(levels)}
        self.immediate = x.device.type == "cpu"
        self.sums: list[tuple[int, float, Tensor]] = []

    def __call__(self, x: Tensor, step: int, sigma: float) -> Tensor:
        call = self.guided if in_interval(sigma, self.interval) else self.plain
        denoised = call(x, self.sigma[sigma], self.condition)
        if denoised.shape != x.shape:
            raise DataError(
                f"the denoiser returned shape {list(denoised.shape)} for {list(x.shape)}"
            )
        # NaN and infinity survive a sum, which reads the tensor once and makes no copy.
        self.sums.append((step, sigma, denoised.sum()))
        if self.immediate:
            self.check()
        return denoised

    def check(self) -> None:
        if not self.sums:
            return
        finite = torch.stack([total for _, _, total in self.sums]).isfinite().tolist()
        for (step, sigma, _), good in zip(self.sums, finite, strict=True):
            if not good:
                raise NumericalError(
                    f"the denoiser returned NaN or infinity in step {step} at sigma {sigma:.6g}"
                )
        self.sums.clear()


def _one_step(
    evaluate: _Evaluations, x: Tensor, step: int, sigma: float, after: float, *, heun: bool
) -> tuple[Tensor, Tensor]:
    denoised = evaluate(x, step, sigma)
    slope = (x - denoised) / sigma
    moved = x + (after - sigma) * slope
    if heun and after > 0:
        denoised = evaluate(moved, step, after)
        moved = x + (after - sigma) * 0.5 * (slope + (moved - denoised) / after)
    return moved, denoised


def _multistep(
    evaluate: _Evaluations,
    x: Tensor,
    sigmas: list[float],
    plan: list[Step],
    on_step: OnStep | None,
) -> Tensor:
    kept = max(len(u.weights) for step in plan for u in (step.predict, step.correct) if u)
    history: list[Tensor] = []
    before = x  # the state one level before, from which the corrector starts
    for i, step in enumerate(plan):
        history = [evaluate(x, i, sigmas[i]), *history[: kept - 1]]
        if step.correct is not None:
            x = _apply(step.correct, before, history)
        before = x
        x = _apply(step.predict, x, history)
        if on_step is not None:
            on_step(i, sigmas[i], x, history[0])
    return x


def _apply(update: Update, x: Tensor, history: list[Tensor]) -> Tensor:
    result = x * update.decay
    for weight, denoised in zip(update.weights, history, strict=False):
        result.add_(denoised, alpha=weight)
    return result


def _rounding(denoise: Any) -> Callable[..., Tensor] | None:
    module = getattr(denoise, "module", None)
    return getattr(denoise, "round_sigma", None) or getattr(module, "round_sigma", None)


def _state_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
