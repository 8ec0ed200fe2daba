"""Damped Newton iteration for small smooth convex problems."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["minimise_newton"]

RIDGE = 1e-12
"""Added to the Hessian's diagonal, relative to its largest entry: a direction that changes nothing
(a common shift of all biases) makes the Hessian singular."""

Objective = Callable[[Float[Tensor, " p"]], tuple[float, Float[Tensor, " p"], Float[Tensor, "p p"]]]


def minimise_newton(
    objective: Objective,
    start: Float[Tensor, " p"],
    *,
    value: Callable[[Float[Tensor, " p"]], float],
    steps: int = 100,
    tolerance: float = 1e-13,
) -> Float[Tensor, " p"]:
    """Minimiser of a convex function, by Newton steps that are halved until the value falls.

    Args:
        objective: Value, gradient and Hessian at a point, float64.
        start: First point.
        value: The value alone, for the line search.
        steps: Most iterations; data that push parameters to infinity stop here.
        tolerance: Largest gradient entry at which to stop. A step that promises less than rounding
            of the value ends the iteration as well.
    """
    x = start.clone()
    for _ in range(steps):
        here, gradient, hessian = objective(x)
        if float(gradient.abs().max()) < tolerance:
            break
        ridge = RIDGE * float(hessian.diagonal().abs().max()) + 1e-300
        eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
        step = torch.linalg.solve(hessian + ridge * eye, gradient)
        descent = float(gradient @ step)
        if not descent > 1e-15 * abs(here):
            break
        scale = 1.0
        while value(x - scale * step) > here - 1e-4 * scale * descent and scale > 1e-10:
            scale /= 2
        if scale <= 1e-10:  # rounding: no lower value can be told apart
            x = x - step if _gradient_falls(objective, x, step, gradient) else x
            break
        x = x - scale * step
    return x


def _gradient_falls(objective: Objective, x: Tensor, step: Tensor, gradient: Tensor) -> bool:
    return float(objective(x - step)[1].abs().max()) < float(gradient.abs().max())
