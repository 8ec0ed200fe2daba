"""Spline calibration: the derivative of the smoothed cumulative calibration error."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from scipy.interpolate import CubicSpline
from torch import Tensor

from diffcal.calibration.posthoc.probability_map import MapScheme, ProbabilityMap
from diffcal.errors import ConfigError, DataError

__all__ = ["SplineCalibration"]

TABLE = 2048
"""Most entries of the kept table of scores and calibrated values."""


@dataclass(kw_only=True, eq=False)
class SplineCalibration(ProbabilityMap):
    """A probability plus the slope of the cumulative calibration error at its rank.

    Sorted by score s, the curve ``h(i/N) = Σ_{j≤i} (outcome_j - s_j) / N`` is fitted by a natural
    cubic spline with ``knots`` equally spaced knots in least squares; ``s + h'`` is the event's rate
    at s. Between validation scores values are joined by lines; results are clipped to [0, 1].

    The default is the top label, as published; ``one_vs_rest`` fits each class and normalises.

    Source: Gupta et al. 2021 (arXiv:2006.12800), section 4. Written anew: the released
    interpolation swaps its two weights.
    """

    scheme: MapScheme = "top_label"
    knots: int = 6

    constant: ClassVar = False

    def _check_settings(self) -> None:
        if self.knots < 3:
            raise ConfigError(f"knots must be at least 3, got {self.knots}")

    def _fit_map(
        self, scores: Float[Tensor, " n"], outcomes: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        n = len(scores)
        if n < self.knots:
            raise DataError(f"a spline of {self.knots} knots needs as many examples, got {n}")
        s, order = (a.numpy() for a in scores.sort(stable=True))
        y = outcomes.numpy()[order]
        distinct, first, inverse = np.unique(s, return_index=True, return_inverse=True)
        last = np.append(first[1:], n) - 1
        # equal scores count as one step, so that their order cannot matter
        rank = (np.arange(1, n + 1) / n)[last]
        curve = (np.cumsum(y - s) / n)[last]
        places = np.linspace(0, 1, self.knots)
        basis = CubicSpline(places, np.eye(self.knots), bc_type="natural")
        weight = np.sqrt(np.bincount(inverse))[:, None]
        design = weight * np.asarray(basis(rank))
        coefficients = np.linalg.lstsq(design, weight[:, 0] * curve, rcond=None)[0]
        slope = np.asarray(basis(rank, 1)) @ coefficients
        values = np.clip(distinct + slope, 0, 1)
        if len(distinct) > TABLE:
            kept = np.unique(np.linspace(0, len(distinct) - 1, TABLE).round().astype(int))
            distinct, values = distinct[kept], values[kept]
        return torch.from_numpy(distinct.copy()), torch.from_numpy(values.copy())
