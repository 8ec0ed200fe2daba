"""Logistic regression on one number: slope and offset by Newton's method, with or without shrinkage."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from diffcal.errors import DataError

__all__ = ["fit_logistic", "fit_logistic_slope", "fit_logistics"]

STEPS = 100
HALVINGS = 20
TOLERANCE = 1e-13
"""Largest change of a parameter, relative to its size, at which the iteration has ended."""
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
        slope: See :func:`fit_logistics`.
        strength: See :func:`fit_logistics`.

    Raises:
        DataError: no maximum exists, because x separates the classes or there is only one.
    """
    weight = torch.ones_like(x) if weight is None else weight
    slopes, offsets = fit_logistics(
        x[None], target[None], weight[None], slope=slope, strength=strength
    )
    return float(slopes[0]), float(offsets[0])


def fit_logistics(
    x: Float[Tensor, "p n"],
    target: Float[Tensor, "p n"],
    weight: Float[Tensor, "p n"],
    *,
    slope: float = 0.0,
    strength: float = 0.0,
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Slopes and offsets of p regressions at once, float64.

    Args:
        x: Regressors, one row for each regression.
        target: Shares in [0, 1].
        weight: Of each observation; 0 leaves it out.
        slope: Where slopes are drawn to; used only with ``strength``.
        strength: Adds ``strength / 2 ((a / slope - 1)² + b²)`` to each negative log-likelihood, in
            observations. 0 is plain maximum likelihood.

    Raises:
        DataError: no maximum exists, because x separates the classes or there is only one; never
            with ``strength``.

    Source: Platt 1999, without his target smoothing.
    """
    x, target, weight = x.double(), target.double(), weight.double()
    ridge = (strength / slope**2 if strength else 0.0, strength)
    total = weight.sum(dim=1).clamp(min=1e-300)
    mean = (weight * x).sum(dim=1) / total
    spread = ((weight * (x - mean[:, None]).square()).sum(dim=1) / total).sqrt()
    a, b = torch.full_like(total, slope), torch.zeros_like(total)

    def loss(a: Tensor, b: Tensor, rows: Tensor) -> Tensor:
        z = a[:, None] * x[rows] + b[:, None]
        likelihood = (weight[rows] * (softplus(z) - target[rows] * z)).sum(dim=1)
        return likelihood + (ridge[0] * (a - slope).square() + ridge[1] * b.square()) / 2

    open_rows = torch.arange(len(x))
    current = loss(a, b, open_rows)
    for _ in range(STEPS):
        xs, ws = x[open_rows], weight[open_rows]
        p = torch.sigmoid(a[open_rows][:, None] * xs + b[open_rows][:, None])
        error, curve = ws * (p - target[open_rows]), ws * p * (1 - p)
        slope_a = (error * xs).sum(dim=1) + ridge[0] * (a[open_rows] - slope)
        slope_b = error.sum(dim=1) + ridge[1] * b[open_rows]
        aa = (curve * xs.square()).sum(dim=1) + ridge[0]
        ab = (curve * xs).sum(dim=1)
        bb = curve.sum(dim=1) + ridge[1]
        determinant = aa * bb - ab.square()
        step_a = (bb * slope_a - ab * slope_b) / determinant
        step_b = (aa * slope_b - ab * slope_a) / determinant
        lost = ~(step_a.isfinite() & step_b.isfinite()) | (determinant <= 0)
        scale = torch.ones_like(step_a)
        for _ in range(HALVINGS):
            after = loss(a[open_rows] - scale * step_a, b[open_rows] - scale * step_b, open_rows)
            worse = after > current[open_rows] + 1e-12 * current[open_rows].abs()
            if not bool(worse.any()):
                break
            scale = torch.where(worse, scale / 2, scale)
        a[open_rows] -= scale * step_a
        b[open_rows] -= scale * step_b
        current[open_rows] = loss(a[open_rows], b[open_rows], open_rows)
        if not strength:
            lost |= a[open_rows].abs() * spread[open_rows] > STEEPEST
        if bool(lost.any()):
            raise DataError(
                "a logistic slope has no finite best value: the two classes are separated "
                "perfectly, or there are too few images; add held-out images or shrinkage"
            )
        size = 1 + torch.maximum(a[open_rows].abs(), b[open_rows].abs())
        change = scale * torch.maximum(step_a.abs(), step_b.abs())
        open_rows = open_rows[change > TOLERANCE * size]
        if len(open_rows) == 0:
            break
    return a, b


def fit_logistic_slope(
    x: Float[Tensor, " n"],
    target: Float[Tensor, " n"],
    weight: Float[Tensor, " n"],
    *,
    strength: float = 0.0,
) -> float:
    """Positive slope a of ``sigmoid(a x)`` of greatest likelihood, within [1e-3, 1e3].

    ``strength`` adds ``strength / 2 (a - 1)²`` to the negative log-likelihood, in observations: data
    that x separates perfectly say nothing about how steep the slope is, only that it is steep.
    """
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        slope = float((weight * x) @ (torch.sigmoid(middle * x) - target))
        falling = slope + strength * (middle - 1) < 0
        low, high = (middle, high) if falling else (low, middle)
    return (low * high) ** 0.5
