"""Logistic regression on one number: slope and offset by Newton's method, with or without shrinkage."""

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.errors import DataError

__all__ = ["fit_logistic", "fit_logistic_slope"]

STEPS = 100
TOLERANCE = 1e-13
"""Largest change of a log-odds value, relative to its size, at which the iteration has ended."""
STEEPEST = 1e4
"""Slope (in units of the regressor's spread) that only separable data reach."""


def fit_logistic(
    x: Float[Tensor, " n"],
    target: Float[Tensor, " n"],
    weight: Float[Tensor, " n"] | None = None,
    *,
    slope: float = 0.0,
    strength: float = 0.0,
) -> tuple[float, float]:
    """Slope a and offset b of ``P(target) = sigmoid(a x + b)`` of greatest likelihood.

    Args:
        x: Regressor.
        target: Shares in [0, 1] (0 and 1 for hard labels).
        weight: Weight of each observation, 1 if None.
        slope: Where the slope is drawn to; used only with ``strength``.
        strength: Adds ``strength / 2 ((a / slope - 1)² + b²)`` to the negative log-likelihood, in
            observations. 0 is plain maximum likelihood.

    Raises:
        DataError: no maximum exists, because x separates the classes or there is only one.

    Source: Platt 1999, without his target smoothing.
    """
    x, y = x.double(), target.double()
    w = torch.ones_like(x) if weight is None else weight.double()
    design = torch.stack([x, torch.ones_like(x)], dim=1)
    centre = torch.tensor([slope, 0.0], dtype=torch.float64)
    ridge = torch.tensor([strength / slope**2 if strength else 0.0, strength], dtype=torch.float64)
    spread = float(x.std(correction=0)) if len(x) else 0.0
    theta = centre.clone()

    def loss(value: Tensor) -> float:
        z = design @ value
        likelihood = w @ (torch.nn.functional.softplus(z) - y * z)
        return float(likelihood + (ridge * (value - centre).square()).sum() / 2)

    current = loss(theta)
    for _ in range(STEPS):
        p = torch.sigmoid(design @ theta)
        gradient = design.T @ (w * (p - y)) + ridge * (theta - centre)
        hessian = design.T @ ((w * p * (1 - p))[:, None] * design) + torch.diag(ridge)
        step, info = torch.linalg.solve_ex(hessian, gradient)
        if int(info) or not bool(step.isfinite().all()):
            break
        scale = 1.0
        while scale > 1e-6 and loss(theta - scale * step) > current + 1e-12 * abs(current):
            scale /= 2
        theta = theta - scale * step
        current = loss(theta)
        if abs(float(theta[0])) * spread > STEEPEST:
            break
        if float((scale * step).abs().max()) <= TOLERANCE * (1 + float(theta.abs().max())):
            return float(theta[0]), float(theta[1])
    else:
        return float(theta[0]), float(theta[1])
    raise DataError(
        "a logistic slope has no finite best value: the two classes are separated perfectly, or "
        "there are too few images; add held-out images or shrinkage"
    )


def fit_logistic_slope(
    x: Float[Tensor, " n"], target: Float[Tensor, " n"], weight: Float[Tensor, " n"]
) -> float:
    """Non-negative slope a of ``sigmoid(a x)`` of greatest likelihood, within [1e-3, 1e3]."""
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        falling = float((weight * x) @ (torch.sigmoid(middle * x) - target)) < 0
        low, high = (middle, high) if falling else (low, middle)
    return (low * high) ** 0.5
