"""Logistic regression of an event on a few columns, for maps with a handful of parameters."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffcal.calibration.posthoc.newton import minimise_newton

__all__ = ["fit_logistic", "log_odds_columns"]

PRIOR = 1e-5
"""Weight of the squared distance from the start in the summed NLL: data that a line separates, or a
class that never occurs, would push parameters to infinity."""


def log_odds_columns(
    probs: Float[Tensor, " n"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """``ln p`` and ``ln(1 - p)``, kept finite."""
    tiny = torch.finfo(probs.dtype).tiny
    return probs.clamp(min=tiny).log(), (1 - probs).clamp(min=tiny).log()


def fit_logistic(
    columns: Float[Tensor, "n p"], outcomes: Float[Tensor, " n"], start: Float[Tensor, " p"]
) -> Float[Tensor, " p"]:
    """Weights w that minimise the NLL of ``sigmoid(columns @ w)`` plus a weak pull to ``start``.

    Args:
        columns: Regressors, one of them constant for an intercept; float64.
        outcomes: Rates in [0, 1].
        start: Weights in whose direction a weight of 1e-5 pulls.
    """
    n = len(columns)

    def value(w: Tensor) -> float:
        z = columns @ w
        nll = F.softplus(z).sum() - outcomes @ z
        return float(nll + PRIOR / 2 * (w - start).square().sum()) / n

    def objective(w: Tensor) -> tuple[float, Tensor, Tensor]:
        p = (columns @ w).sigmoid()
        gradient = columns.T @ (p - outcomes) + PRIOR * (w - start)
        hessian = columns.T @ (columns * (p * (1 - p))[:, None])
        hessian.diagonal().add_(PRIOR)
        return value(w), gradient / n, hessian / n

    return minimise_newton(objective, start, value=value)
