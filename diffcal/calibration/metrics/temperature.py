"""The temperature under which predictions fit their labels best, as metrics need it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from diffcal.calibration.metrics.binned import expected_calibration_error
from diffcal.calibration.metrics.inputs import Predictions
from diffcal.errors import ConfigError, DataError

__all__ = ["TemperatureFit", "fit_temperature"]

LOWEST, HIGHEST = 0.05, 20.0


@dataclass(frozen=True)
class TemperatureFit:
    """A fitted temperature."""

    temperature: float
    loss: float
    """The objective at ``temperature``, on the data of the fit."""
    note: str = ""
    """``"bound"`` if the optimum lies outside the bounds, as for constant networks."""


def fit_temperature(
    predictions: Predictions,
    objective: Literal["nll", "ece"] = "nll",
    method: Literal["exact", "grid"] = "exact",
    n_bins: int = 15,
    bounds: tuple[float, float] = (LOWEST, HIGHEST),
) -> TemperatureFit:
    """Temperature T within ``bounds`` that minimises the objective of ``softmax(logits / T)``.

    ``exact`` finds the zero of the slope of the NLL, which is convex in 1/T. ``grid`` tries 0.1,
    0.2, ..., 10.0 and keeps the first minimum; with ``ece`` that is what several released
    evaluations do.

    Raises:
        ConfigError: ``exact`` with ``ece``, which has no slope.
        DataError: probabilities of exactly 0 (pass logits).

    Source: Guo et al. 2017 (arXiv:1706.04599), section 4.2.
    """
    if objective not in ("nll", "ece") or method not in ("exact", "grid"):
        raise ConfigError(f"unknown objective '{objective}' or method '{method}'")
    if method == "grid":
        return _grid(predictions, objective, n_bins)
    if objective == "ece":
        raise ConfigError("the ECE has no slope to follow: use method='grid'")
    if not 0 < bounds[0] < bounds[1]:
        raise ConfigError(f"bounds must be positive and rising, got {bounds}")
    low, high = -math.log(bounds[1]), -math.log(bounds[0])  # of the inverse temperature
    for bound, beyond in ((low, 1), (high, -1)):
        if beyond * _slopes(predictions, math.exp(bound))[0] >= 0:
            inverse = math.exp(bound)
            return TemperatureFit(1 / inverse, _nll(predictions, inverse), "bound")
    u = 0.0 if low < 0 < high else (low + high) / 2
    for _ in range(200):  # Newton, by halves where it would leave the bracket; about six steps
        slope, curvature = _slopes(predictions, math.exp(u))
        low, high = (u, high) if slope < 0 else (low, u)
        step = u - slope / (curvature * math.exp(u)) if curvature > 0 else math.inf
        previous, u = u, step if low < step < high else (low + high) / 2
        if abs(u - previous) < 1e-12:
            break
    inverse = math.exp(u)
    return TemperatureFit(1 / inverse, _nll(predictions, inverse))


def _slopes(predictions: Predictions, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean NLL in the inverse temperature."""
    first = second = 0.0
    for rows in predictions.row_blocks():
        z = _logits(predictions, rows)
        p = (z * inverse).softmax(dim=1)
        mean = (p * z).sum(dim=1)
        first += float((mean - _at_label(predictions, z, rows)).sum())
        second += float(((p * z.square()).sum(dim=1) - mean.square()).sum())
    return first / len(predictions), second / len(predictions)


def _nll(predictions: Predictions, inverse: float) -> float:
    total = 0.0
    for rows in predictions.row_blocks():
        z = _logits(predictions, rows) * inverse
        total += float((z.logsumexp(dim=1) - _at_label(predictions, z, rows)).sum())
    return total / len(predictions)


def _logits(predictions: Predictions, rows: slice) -> torch.Tensor:
    block = predictions.scores[rows].double()
    if predictions.is_logits:
        return block - block.max(dim=1, keepdim=True).values
    if bool((block == 0).any()):
        raise DataError("probabilities of exactly 0 cannot be scaled by a temperature: pass logits")
    return block.log()


def _at_label(predictions: Predictions, z: torch.Tensor, rows: slice) -> torch.Tensor:
    if predictions.labels is not None:
        return z.gather(1, predictions.labels[rows][:, None])[:, 0]
    return (predictions.targets(rows) * z).sum(dim=1)


def _grid(predictions: Predictions, objective: str, n_bins: int) -> TemperatureFit:
    best = TemperatureFit(math.nan, math.inf)
    for step in range(1, 101):
        t = step / 10
        if objective == "nll":
            loss = _nll(predictions, 1 / t)
        else:
            loss = expected_calibration_error(predictions.scaled(t), n_bins)
        if loss < best.loss:
            best = TemperatureFit(t, loss)
    return best
