"""Beta calibration: a map with three parameters that fits scores of two Beta distributions."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.posthoc.logistic import fit_logistic, log_odds_columns
from diffcal.calibration.posthoc.probability_map import EventMap

__all__ = ["BetaCalibration"]


@dataclass(kw_only=True, eq=False)
class BetaCalibration(EventMap):
    """``sigmoid(a ln s - b ln(1 - s) + c)`` with a, b ≥ 0, fitted by NLL.

    Contains the identity (a = b = 1, c = 0), unlike logistic calibration, and maps that are flat or
    steep at either end. A coefficient that comes out negative is set to 0 and the rest fitted again,
    as the authors do; maps never fall. A weak pull to the identity (weight 1e-5 in the summed NLL)
    keeps separable data finite.

    One map per class with normalised rows, or one of the top label. netcal's multi-class form is
    another model, a multinomial regression on all classes' logarithms.

    Attributes:
        parameters: a, b, c of each map, ``[m, 3]``.

    Source: Kull, Silva Filho and Flach 2017, "Beta calibration", equation 7 and section 4.
    """

    STATE: ClassVar = ("parameters_",)

    @property
    def parameters(self) -> Float[Tensor, "m 3"]:
        """Fitted a, b and c of each map."""
        self._require_fitted()
        return self.parameters_

    def _fit_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.parameters_ = torch.stack([_fit_beta(scores, y) for scores, y in pairs])

    def map_value(self, probs: Float[Tensor, " b"], index: int = 0) -> Float[Tensor, " b"]:
        """Probabilities mapped by the map of class ``index`` (0 for the top label)."""
        a, b, c = self.parameters_[index].to(probs)
        log_s, log_rest = log_odds_columns(probs)
        return (a * log_s - b * log_rest + c).sigmoid()


def _fit_beta(scores: Float[Tensor, " n"], outcomes: Float[Tensor, " n"]) -> Float[Tensor, " 3"]:
    log_s, log_rest = log_odds_columns(scores)
    columns = torch.stack([log_s, -log_rest, torch.ones_like(log_s)], dim=1)
    found = scores.new_tensor([1.0, 1.0, 0.0])
    kept = [0, 1, 2]
    while True:
        part = fit_logistic(columns[:, kept], outcomes, found[kept])
        negative = [k for k, w in zip(kept, part.tolist(), strict=True) if k < 2 and w < 0]
        if not negative:
            found[kept] = part
            return found
        dropped = min(negative, key=lambda k: float(part[kept.index(k)]))
        found[dropped] = 0.0
        kept.remove(dropped)
