"""Coefficients of multistep solvers: one network evaluation for each step, earlier ones reused.

In the variance exploding form the probability-flow equation ``dx/dsigma = (x - D) / sigma`` has, with
``lambda = -ln sigma`` and ``h`` the step in lambda, the solution

    x(lambda + h) = e^-h x(lambda) + e^-h integral_0^h e^u D(lambda + u) du.

A solver replaces ``D`` by a polynomial through values that it knows, so that every step is
``decay * x + sum_j weights[j] * D_j``. The numbers depend on the noise levels alone: they are worked
out in float64 before sampling starts.

Sources: Lu et al. 2022 (DPM-Solver++, arXiv:2211.01095), section 4; Zhao et al. 2023 (UniPC,
arXiv:2302.04867), section 3. Both are written for the variance preserving form; dividing their
``x_t`` by ``alpha_t`` gives this one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["MultistepSolver", "Step", "Update", "multistep_plan"]

MultistepSolver = Literal["euler", "dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3"]

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(24)


@dataclass(frozen=True)
class Update:
    """``decay * x + sum_j weights[j] * D_j``, the newest ``D`` first."""

    decay: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """What is done at one noise level, once the network was evaluated there (``D_0``)."""

    correct: Update | None
    """Improves the state at this level, starting from the state one level before."""
    predict: Update
    """The state at the next level, starting from the state at this level."""


def multistep_plan(solver: MultistepSolver, sigmas: Sequence[float]) -> list[Step]:
    """Steps through falling ``sigmas`` that end with 0: one for each positive level.

    - ``euler``: ``D`` is constant in every step (the same numbers as Euler's method in sigma).
    - ``dpmpp_2m``: DPM-Solver++(2M).
    - ``dpmpp_3m``: the parabola through the last three values, integrated exactly. (Published
      programs weight its curvature by one half, which costs the third order.)
    - ``unipc_2``, ``unipc_3``: the two methods above as predictors, followed by the corrector of
      the same order: the polynomial through the evaluation at the predicted state and 1 or 2
      earlier ones. The evaluation serves the next step too, so that the corrector is free. With the
      paper's ``B_2(h) = e^h - 1`` where its equations leave a choice.

    Until enough values are known the order is lower. The step to noise level 0 is ``x = D_0``.
    """
    order = {"euler": 1, "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc_2": 2, "unipc_3": 3}[solver]
    times = [-math.log(sigma) for sigma in sigmas[:-1]]
    steps = []
    for i, now in enumerate(times):
        correct = None
        if solver.startswith("unipc") and i > 0:
            # Points: the new value, then the ones that the prediction was made from.
            known = times[max(0, i - min(order, i)) : i + 1][::-1]
            correct = _corrector(times[i - 1], now, known)
        if i + 1 == len(times):
            predict = Update(0.0, (1.0,))
        else:
            known = times[max(0, i - order + 1) : i + 1][::-1]
            predict = _predictor(now, times[i + 1], known)
        steps.append(Step(correct, predict))
    return steps


def _predictor(start: float, end: float, known: Sequence[float]) -> Update:
    if len(known) != 2:
        return _exact_update(start, end, known)
    # DPM-Solver++(2M): the slope enters with half the step. To second order that is the exact
    # integral of the line; at large steps it extrapolates less and is the more robust of the two.
    decay, gain = math.exp(start - end), -math.expm1(start - end)
    slope = gain * (end - start) / (2 * (known[0] - known[1]))
    return Update(decay, (gain + slope, -slope))


def _corrector(start: float, end: float, known: Sequence[float]) -> Update:
    if len(known) != 2:
        return _exact_update(start, end, known)
    gain = -math.expm1(start - end)
    return Update(math.exp(start - end), (gain / 2, gain / 2))


def _exact_update(start: float, end: float, known: Sequence[float]) -> Update:
    """Integral with ``D`` the polynomial in lambda that has given values at the times ``known``."""
    h = end - start
    times = start + h * (_NODES + 1) / 2
    density = h / 2 * _NODE_WEIGHTS * np.exp(times - end)
    weights = []
    for j, own in enumerate(known):
        others = [time for k, time in enumerate(known) if k != j]
        basis = np.prod([(times - t) / (own - t) for t in others], axis=0)
        weights.append(float((density * basis).sum()))
    return Update(math.exp(-h), tuple(weights))
