"""Searches for one positive number on validation data."""

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize_scalar

__all__ = ["coarse_to_fine", "smooth_minimum"]


def smooth_minimum(
    loss: Callable[[float], float],
    low: float,
    high: float,
    points: int = 16,
    tolerance: float = 1e-9,
) -> tuple[float, bool]:
    """Minimiser in [low, high] of a smooth loss, and whether it lies at an end.

    The best of ``points`` values equally spaced in the logarithm is refined between its neighbours,
    to ``tolerance`` relatively.
    """
    grid = np.linspace(math.log(low), math.log(high), points)
    values = [loss(math.exp(g)) for g in grid]
    i = int(np.argmin(values))
    ends = (grid[max(i - 1, 0)], grid[min(i + 1, points - 1)])
    found = minimize_scalar(
        lambda g: loss(math.exp(g)), bounds=ends, method="bounded", options={"xatol": tolerance}
    )
    best = float(found.x) if found.fun < values[i] else float(grid[i])  # type: ignore[attr-defined]
    span = grid[-1] - grid[0]
    at_end = min(best - grid[0], grid[-1] - best) < 1e-4 * span
    return math.exp(best), bool(at_end)


def coarse_to_fine(
    loss: Callable[[float], float], high: float, points: int = 20, rounds: int = 3
) -> tuple[float, bool]:
    """Minimiser in (0, high] of a loss with steps, and whether it lies at the upper end.

    ``points`` equally spaced values, then ``rounds`` times as many around the best one within a
    tenth of the range before, as the released search does on [0, 10].
    """
    grid = np.linspace(high / points, high, points)
    best, best_value, reach = math.nan, math.inf, high / 10
    for _ in range(rounds + 1):
        for g in grid:
            if 0 < g <= high and (value := loss(float(g))) < best_value:
                best, best_value = float(g), value
        grid = np.linspace(best - reach, best + reach, points)
        reach /= 10
    return best, best > high * (1 - 1e-3)
