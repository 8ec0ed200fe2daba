"""SMART: a small network chooses each row's temperature from the gap between its top two logits."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffcal.calibration.metrics.temperature import fit_temperature
from diffcal.calibration.posthoc.calibrator import Calibrator, FitData
from diffcal.calibration.posthoc.parameterized_temperature import (
    initial_parameters,
    network_output,
    train_parameters,
    unpack_layers,
)
from diffcal.core.rng import item_generator
from diffcal.errors import ConfigError

__all__ = ["GapTemperatureScaling", "soft_binned_error"]

LOWEST = 1e-2
"""Smallest temperature, as for a single one."""

SHARPNESS = 0.01
"""Width of the soft edges between bins of :func:`soft_binned_error`."""


@dataclass(kw_only=True, eq=False)
class GapTemperatureScaling(Calibrator):
    """``softmax(z / T(g))`` with ``g = z_(1) - z_(2)`` and T a network of one hidden layer.

    The gap says how close a row is to the decision boundary in one number, with none of the noise of
    the other logits. ``T = softplus(network(g / scale))``, at least 0.01, with the median validation
    gap as scale; the last layer starts at the best single temperature. ``criterion="soft_ece"``
    trains on :func:`soft_binned_error`, as published; ``nll`` and ``mse`` on the labels.

    The published width, number of steps and bins could not be read: 16 units, 500 steps of Adam at
    0.01 and 15 bins are ours.

    Source: Guo et al. 2025 (arXiv:2506.23492), abstract and the definition of the gap.
    """

    hidden: int = 16
    criterion: Literal["soft_ece", "nll", "mse"] = "soft_ece"
    n_bins: int = 15
    steps: int = 500
    batch_size: int = 5000
    learning_rate: float = 0.01
    seed: int = 0

    STATE: ClassVar = ("parameters_", "scale_")
    gives_logits: ClassVar = True

    def _check_settings(self) -> None:
        for name in ("hidden", "n_bins", "steps", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def preserves_argmax(self) -> bool:
        """True: a row is divided by one positive number."""
        return True

    def temperatures(self, gaps: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Temperature at each gap of the top two logits."""
        self._require_fitted()
        return self._of_gaps(gaps / float(self.scale_), self.parameters_.to(gaps))

    def _of_gaps(self, scaled: Tensor, parameters: Tensor) -> Tensor:
        layers = unpack_layers(parameters, [1, self.hidden, 1])
        return F.softplus(network_output(scaled[:, None], layers)).clamp(min=LOWEST)

    def _fit(self, data: FitData) -> None:
        z, q = data.logits.cpu(), data.targets.cpu()
        gaps = _gaps(z)
        scale = gaps.median().clamp(min=1e-12)
        outcome = q.gather(1, z.argmax(dim=1, keepdim=True))[:, 0]
        start = fit_temperature(data.predictions, bounds=(0.05, 20.0)).temperature
        generator = item_generator(self.seed, "gap-temperature", 0)
        inverse = start + math.log(-math.expm1(-start))  # softplus of it is the start
        initial = initial_parameters([1, self.hidden, 1], inverse, generator)

        def loss(parameters: Tensor, rows: Tensor) -> Tensor:
            t = self._of_gaps(gaps[rows] / scale, parameters)
            log_p = (z[rows] / t[:, None]).log_softmax(dim=1)
            if self.criterion == "nll":
                return -(q[rows] * log_p).sum(dim=1).mean()
            if self.criterion == "mse":
                return (log_p.exp() - q[rows]).square().sum(dim=1).mean()
            return soft_binned_error(log_p.amax(dim=1).exp(), outcome[rows], self.n_bins)

        self.parameters_ = train_parameters(
            initial,
            loss,
            len(z),
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            generator=generator,
        )
        self.scale_ = scale

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        return z / self._of_gaps(_gaps(z) / float(self.scale_), self.parameters_.to(z))[:, None]


def soft_binned_error(
    confidence: Float[Tensor, " n"], outcome: Float[Tensor, " n"], n_bins: int = 15
) -> Float[Tensor, ""]:
    """Expected calibration error with soft bins, which has a gradient in the confidences.

    An example belongs to bin b in the share ``softmax_b(-(confidence - centre_b)² / 0.01)``; the error
    is ``Σ_b |Σ_i share_ib (outcome_i - confidence_i)| / n``, which is the ECE where shares are 0 or 1.

    Source: Karandikar et al. 2021 (arXiv:2108.00106), the soft-binned ECE of order 1.
    """
    centres = (torch.arange(n_bins).to(confidence) + 0.5) / n_bins
    share = (-(confidence[:, None] - centres).square() / SHARPNESS).softmax(dim=1)
    return (share * (outcome - confidence)[:, None]).sum(dim=0).abs().sum() / len(confidence)


def _gaps(z: Tensor) -> Tensor:
    top = z.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]
