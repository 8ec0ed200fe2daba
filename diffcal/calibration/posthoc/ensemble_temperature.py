"""Ensemble temperature scaling: a mixture of scaled, plain and uniform predictions."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from diffcal.calibration.metrics.temperature import fit_temperature
from diffcal.calibration.posthoc.calibrator import Calibrator, FitData
from diffcal.calibration.posthoc.newton import minimise_newton
from diffcal.errors import ConfigError

__all__ = ["EnsembleTemperatureScaling", "simplex_least_squares"]


@dataclass(kw_only=True, eq=False)
class EnsembleTemperatureScaling(Calibrator):
    """``w₁ softmax(z/T) + w₂ softmax(z) + w₃/k`` with w on the simplex.

    T is fitted first, then w, both by the squared error (``mse``, as published and released) or both
    by cross-entropy (``nll``). The weight problem is convex and solved exactly, by trying which
    weights are zero.

    Source: Zhang, Kailkhura and Han 2020 (arXiv:2003.07329), section 4.2. The squared error of the
    temperature need not be convex; the best of a grid of 80 temperatures is refined.
    """

    criterion: Literal["mse", "nll"] = "mse"
    lowest: float = 0.05
    highest: float = 5.0

    STATE: ClassVar = ("temperature_", "weights_")

    def _check_settings(self) -> None:
        if not 0 < self.lowest < self.highest:
            raise ConfigError(f"need 0 < lowest < highest, got {self.lowest} and {self.highest}")

    @property
    def preserves_argmax(self) -> bool:
        """True unless all weight lies on the uniform part."""
        return not self.is_fitted or float(self.weights_[:2].sum()) > 0

    def _fit(self, data: FitData) -> None:
        z, q = data.logits, data.targets
        bounds = (self.lowest, self.highest)
        if self.criterion == "nll":
            t = fit_temperature(data.predictions, bounds=bounds).temperature
        else:
            t = _least_squares_temperature(z, q, bounds)
        parts = self._parts(z, t)
        if self.criterion == "mse":
            weights = simplex_least_squares(parts, q)
        else:
            weights = _mixture_weights(parts, q)
        self.temperature_ = torch.tensor(t, dtype=torch.float64)
        self.weights_ = weights.cpu()

    @staticmethod
    def _parts(z: Float[Tensor, "b k"], temperature: float) -> Float[Tensor, "3 b k"]:
        z = z - z.amax(dim=1, keepdim=True)
        uniform = torch.full_like(z, 1 / z.shape[1])
        return torch.stack([(z / temperature).softmax(dim=1), z.softmax(dim=1), uniform])

    def _probs(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        parts = self._parts(z, float(self.temperature_))
        return torch.einsum("wbk,w->bk", parts, self.weights_.to(z))


def simplex_least_squares(
    parts: Float[Tensor, "w b k"], targets: Float[Tensor, "b k"]
) -> Float[Tensor, " w"]:
    """Weights on the simplex that minimise ``|Σ w_i part_i - target|²``, exactly.

    For each set of non-zero weights the equality-constrained problem has a linear solution; the best
    feasible one is the optimum.
    """
    flat = parts.flatten(1)
    gram, right = flat @ flat.T, flat @ targets.flatten()
    count = len(parts)
    best, best_value = None, float("inf")
    for size in range(1, count + 1):
        for support in itertools.combinations(range(count), size):
            i = torch.tensor(support, device=parts.device)
            system = gram.new_zeros(size + 1, size + 1)
            system[:size, :size] = gram[i][:, i]
            system[:size, size] = system[size, :size] = 1
            solution = torch.linalg.lstsq(
                system.cpu(),
                torch.cat([right[i], right.new_ones(1)]).cpu()[:, None],
                driver="gelsd",
            ).solution[:size, 0]
            if bool((solution < 0).any()):
                continue
            weights = gram.new_zeros(count)
            weights[i] = (solution / solution.sum()).to(gram)
            value = float(weights @ gram @ weights - 2 * weights @ right)
            if value < best_value:
                best, best_value = weights, value
    assert best is not None  # single weights are always feasible
    return best


def _least_squares_temperature(z: Tensor, q: Tensor, bounds: tuple[float, float]) -> float:
    z = z - z.amax(dim=1, keepdim=True)

    def loss(log_t: float) -> float:
        return float(((z * torch.tensor(-log_t).exp()).softmax(dim=1) - q).square().mean())

    low, high = (float(torch.tensor(b, dtype=torch.float64).log()) for b in bounds)
    grid = torch.linspace(low, high, 80, dtype=torch.float64)
    values = torch.tensor([loss(t) for t in grid.tolist()])
    i = int(values.argmin())
    ends = (float(grid[max(i - 1, 0)]), float(grid[min(i + 1, 79)]))
    found = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-10})
    best = float(found.x) if found.fun <= float(values[i]) else float(grid[i])  # type: ignore[attr-defined]
    return float(torch.tensor(best, dtype=torch.float64).exp())


def _mixture_weights(parts: Float[Tensor, "w b k"], q: Float[Tensor, "b k"]) -> Tensor:
    """Weights on the simplex that minimise the cross-entropy of the mixture, exactly.

    Convex: for each set of non-zero weights by Newton steps within their plane; the best feasible
    solution is the optimum.
    """
    count, n = len(parts), len(q)
    best, best_value = parts.new_full((count,), 1 / count), math.inf
    for size in range(1, count + 1):
        for support in itertools.combinations(range(count), size):
            i = torch.tensor(support, device=parts.device)
            inside = parts[i]
            along = inside[:-1] - inside[-1]  # raise one weight, lower the last

            def mixture(v: Tensor, inside: Tensor = inside, along: Tensor = along) -> Tensor:
                return inside.mean(dim=0) + torch.einsum("vbk,v->bk", along, v)

            def value(v: Tensor, mixture: Any = mixture) -> float:
                mixed = mixture(v)
                if bool(((mixed <= 0) & (q > 0)).any()):
                    return math.inf
                return -float(torch.special.xlogy(q, mixed).sum()) / n

            def objective(
                v: Tensor, mixture: Any = mixture, along: Tensor = along, value: Any = value
            ) -> tuple[float, Tensor, Tensor]:
                ratio = torch.where(q > 0, along / mixture(v), 0)
                gradient = -torch.einsum("vbk,bk->v", ratio, q) / n
                return value(v), gradient, torch.einsum("vbk,wbk,bk->vw", ratio, ratio, q) / n

            v = parts.new_zeros(size - 1)
            if size > 1:
                v = minimise_newton(objective, v, value=value)
            weights = parts.new_zeros(count)
            weights[i] = 1 / size + torch.cat([v, -v.sum(dim=0, keepdim=True)])
            reached = value(v)
            # a larger set must win by more than rounding, so that zeros come out as zeros
            if bool((weights >= 0).all()) and reached < best_value - 1e-13:
                best, best_value = weights, reached
    return best
