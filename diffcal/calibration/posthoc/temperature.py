"""Temperature scaling: one number that divides all logits."""

import logging
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.temperature import fit_temperature
from diffcal.calibration.posthoc.calibrator import Calibrator, FitData
from diffcal.errors import ConfigError

__all__ = ["TemperatureScaling"]

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class TemperatureScaling(Calibrator):
    """``softmax(z / T)`` with the T that fits validation labels best.

    By default T is the zero of the slope of the NLL (convex in 1/T), found by a safeguarded Newton
    iteration to machine precision. ``search="grid"`` tries 0.1, 0.2, ..., 10.0 and keeps the first
    minimum, as the released code of the focal-loss family does with ``criterion="ece"``.

    Attributes:
        temperature: The fitted T, in [0.01, 100]; a warning is logged at an end of that range, which
            separable (all right) or hopeless data reach.

    Source: Guo et al. 2017 (arXiv:1706.04599), section 4.2.
    """

    criterion: Literal["nll", "ece"] = "nll"
    search: Literal["exact", "grid"] = "exact"
    n_bins: int = 15

    STATE: ClassVar = ("temperature_",)
    gives_logits: ClassVar = True
    single_precision: ClassVar = True

    def _check_settings(self) -> None:
        if self.criterion == "ece" and self.search == "exact":
            raise ConfigError("the ECE has no slope to follow: use search='grid' with it")
        if self.n_bins < 1:
            raise ConfigError(f"n_bins must be at least 1, got {self.n_bins}")

    @property
    def temperature(self) -> float:
        """Fitted temperature."""
        self._require_fitted()
        return float(self.temperature_)

    @property
    def preserves_argmax(self) -> bool:
        """True: dividing by a positive number keeps the order."""
        return True

    def _fit(self, data: FitData) -> None:
        found = fit_temperature(
            data.predictions, self.criterion, self.search, self.n_bins, bounds=(0.01, 100.0)
        )
        if found.note:
            log.warning(
                "temperature %.4g lies at the end of [0.01, 100]: the data do not bound it",
                found.temperature,
            )
        self.temperature_ = torch.tensor(found.temperature, dtype=torch.float64)

    def last_layer(
        self,
        features: Float[Tensor, "n d"],
        weight: Float[Tensor, "k d"],
        bias: Float[Tensor, " k"],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Weight and bias divided by the temperature."""
        self._require_fitted()
        return features, weight / self.temperature, bias / self.temperature

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        return z / float(self.temperature_)
