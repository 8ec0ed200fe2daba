"""Noise levels and predictions of discrete-time diffusion models, in the variance exploding form."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcal.errors import CheckpointError

__all__ = ["DiscreteNoise", "PredictionType", "TimestepRule", "discrete_noise"]

PredictionType = Literal["epsilon", "sample", "v_prediction"]
TimestepRule = Literal["continuous", "integer"]

# Schedulers of diffusers that describe x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps with a table of
# abar_t. What they do when sampling does not matter here. Distilled models (LCM, TCD) are not in the
# list: their networks are no posterior mean.
_SCHEDULERS = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


@dataclass(frozen=True, kw_only=True)
class DiscreteNoise:
    """Noise level of every training timestep, and what the network predicts there.

    The network sees ``x_t = x / sqrt(1 + sigma^2)``, where ``x = x_0 + sigma noise`` and
    ``sigma_t = sqrt((1 - abar_t) / abar_t)``. Levels outside the table are given to the network as
    its first or last timestep, while the formulas keep the level itself.

    Source: Karras et al. 2022 (arXiv:2206.00364), appendix C.3; v prediction: Salimans and Ho 2022
    (arXiv:2202.00512), appendix D.
    """

    log_sigmas: Float64[Tensor, " t"]
    """ln sigma of the timesteps 0, 1, ... in float64, increasing."""
    prediction: PredictionType
    rule: TimestepRule = "continuous"
    """``continuous`` interpolates timesteps in ln sigma; ``integer`` rounds to the nearest one."""

    @property
    def sigma_min(self) -> float:
        """Noise level of timestep 0."""
        return float(self.log_sigmas[0].exp())

    @property
    def sigma_max(self) -> float:
        """Noise level of the last timestep."""
        return float(self.log_sigmas[-1].exp())

    def sigma(self, timestep: Tensor) -> Float[Tensor, " b"]:
        """Noise level of timesteps [b], whole or fractional, in float64."""
        table = self.log_sigmas.to(timestep.device)
        position = timestep.double().clamp(0, len(table) - 1)
        below = position.floor().long().clamp(max=len(table) - 2)
        return torch.lerp(table[below], table[below + 1], position - below).exp()

    def timestep(self, sigma: Float[Tensor, " b"]) -> Tensor:
        """Timestep of noise levels [b]: float32 (``continuous``) or int64 (``integer``)."""
        # MPS has no float64; elsewhere it keeps the timestep of a table entry whole to 1e-5.
        table = self.log_sigmas.to(
            sigma.device, torch.float32 if sigma.device.type == "mps" else torch.float64
        )
        level = sigma.to(table.dtype).clamp_min(1e-30).log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, level).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        position = above - 1 + (level - low) / (high - low)
        return position.round().long() if self.rule == "integer" else position.float()

    def network_input(
        self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, "b 1 1 1"]
    ) -> Float[Tensor, "b c h w"]:
        """``x_t`` of the variance preserving form."""
        return x / (1 + sigma.square()).sqrt()

    def clean(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "b 1 1 1"],
        output: Float[Tensor, "b c h w"],
    ) -> Float[Tensor, "b c h w"]:
        """Prediction of ``x_0`` from the network's ``output`` at ``x = x_0 + sigma noise``."""
        if self.prediction == "epsilon":
            return x - sigma * output
        if self.prediction == "v_prediction":
            scale = 1 + sigma.square()
            return x / scale - sigma / scale.sqrt() * output
        return output

    def target(
        self,
        clean: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "b 1 1 1"],
    ) -> Float[Tensor, "b c h w"]:
        """What the network is trained to output at ``x = clean + sigma noise``."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "v_prediction":
            return (noise - sigma * clean) / (1 + sigma.square()).sqrt()
        return clean

    def to(self, device: torch.device | str) -> "DiscreteNoise":
        """The same table on ``device`` (on MPS it stays on the CPU, having no float64)."""
        if torch.device(device).type == "mps":
            return self
        return replace(self, log_sigmas=self.log_sigmas.to(device))


def discrete_noise(scheduler: Any, rule: TimestepRule = "continuous") -> DiscreteNoise:
    """Noise levels of a diffusers scheduler (its sampling rules are not used).

    A terminal timestep without signal (zero terminal SNR) has no finite sigma and is left out.

    Raises:
        CheckpointError: the scheduler has no table of ``alphas_cumprod``, is made for another kind of
            model, or asks for a prediction that is not epsilon, sample or v_prediction.
    """
    name = type(scheduler).__name__
    check_scheduler_name(name)
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "sample", "v_prediction"):
        raise CheckpointError(
            f"{name} has prediction_type '{prediction}'; supported: epsilon, sample, v_prediction"
        )
    if scheduler.config.get("timestep_type", "discrete") != "discrete":
        raise CheckpointError(
            f"{name} has timestep_type '{scheduler.config['timestep_type']}'; supported: discrete"
        )
    alphas = torch.as_tensor(scheduler.alphas_cumprod).detach().cpu().double()
    alphas = alphas[alphas > 0]
    log_sigmas = 0.5 * ((1 - alphas).log() - alphas.log())
    increasing = len(alphas) >= 2 and bool(
        log_sigmas.isfinite().all() and (log_sigmas.diff() > 0).all()
    )
    if not increasing:
        raise CheckpointError(
            f"{name}: alphas_cumprod must fall from timestep to timestep, from below 1 towards 0; "
            "check its beta_start, beta_end, beta_schedule or trained_betas"
        )
    return DiscreteNoise(log_sigmas=log_sigmas, prediction=prediction, rule=rule)


def check_scheduler_name(name: str) -> None:
    """Refuse a scheduler class that is not of the discrete variance preserving kind.

    Raises:
        CheckpointError: ``name`` is not on the list.
    """
    if name not in _SCHEDULERS:
        raise CheckpointError(
            f"scheduler '{name}' is not supported: the network must have been trained with discrete "
            f"timesteps and alphas_cumprod ({', '.join(_SCHEDULERS)})"
        )
