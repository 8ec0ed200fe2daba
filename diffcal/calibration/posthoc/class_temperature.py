"""Class-based temperature scaling: one temperature for each class."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.temperature import fit_temperature
from diffcal.calibration.posthoc.calibrator import Calibrator, FitData, criterion_value
from diffcal.calibration.posthoc.newton import minimise_newton
from diffcal.errors import ConfigError

__all__ = ["ClassTemperatureScaling", "divide_by_class"]

LOWEST, HIGHEST = 0.01, 100.0
SWEEPS = 5
GRID = tuple(round(0.5 + 0.1 * i, 1) for i in range(46))  # 0.5 .. 5.0

Unit = Literal["predicted", "logit"]


@dataclass(kw_only=True, eq=False)
class ClassTemperatureScaling(Calibrator):
    """A temperature for each class, of the row by its predicted class or of each logit column.

    ``per="predicted"`` divides a row by the temperature of the class it predicts and keeps every
    prediction; ``per="logit"`` divides logit j by T_j, as released code does, and can change
    predictions.

    With ``criterion="nll"`` the fit is exact: for ``predicted`` the problem falls apart into one
    convex search per predicted class; a class predicted fewer than ``min_count`` times, or whose
    rows do not bound a temperature, takes the common one. For ``logit`` it is convex in 1/T; factors
    are kept within [0.01, 100]. With ``criterion="ece"`` it is the released greedy search: from the
    common temperature, five sweeps over classes and 0.5, 0.6, ..., 5.0, taking a value only if the
    15-bin ECE falls and the accuracy does not.

    Source: Frenkel and Goldberger 2021, "Network calibration by class-based temperature scaling".
    """

    per: Unit = "predicted"
    criterion: Literal["nll", "ece"] = "nll"
    min_count: int = 20
    n_bins: int = 15

    STATE: ClassVar = ("temperatures_",)
    gives_logits: ClassVar = True

    def _check_settings(self) -> None:
        if self.min_count < 1 or self.n_bins < 1:
            raise ConfigError("min_count and n_bins must be at least 1")

    @property
    def preserves_argmax(self) -> bool:
        """True for ``per="predicted"``."""
        return self.per == "predicted"

    def _fit(self, data: FitData) -> None:
        common = fit_temperature(data.predictions, bounds=(LOWEST, HIGHEST)).temperature
        start = torch.full((data.classes,), common, dtype=torch.float64)
        if self.criterion == "ece":
            found = self._greedy(data, start)
        elif self.per == "predicted":
            found = self._by_group(data, start)
        else:
            found = _by_column(data, start)
        self.temperatures_ = found

    def _by_group(self, data: FitData, temperatures: Tensor) -> Tensor:
        predicted = data.predictions.predicted
        for k in range(data.classes):
            rows = (predicted == k).nonzero()[:, 0]
            if len(rows) < self.min_count:
                continue
            found = fit_temperature(data.predictions.select(rows), bounds=(LOWEST, HIGHEST))
            if not found.note:
                temperatures[k] = found.temperature
        return temperatures

    def _greedy(self, data: FitData, temperatures: Tensor) -> Tensor:
        z = data.logits
        p = data.predictions

        def score(candidate: Tensor) -> tuple[float, float]:
            log_p = divide_by_class(z, candidate, self.per).log_softmax(dim=1)
            top = log_p.argmax(dim=1)
            right = p.targets().gather(1, top[:, None]).mean()
            return criterion_value(data, log_p, "ece", self.n_bins), float(right)

        best, accuracy = score(temperatures)
        for _ in range(SWEEPS):
            changed = False
            for k in range(data.classes):
                for value in GRID:
                    candidate = temperatures.clone()
                    candidate[k] = value
                    ece, right = score(candidate)
                    if ece < best and right >= accuracy:
                        temperatures, best, accuracy, changed = candidate, ece, right, True
            if not changed:
                break
        return temperatures

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        return divide_by_class(z, self.temperatures_, self.per)


def divide_by_class(
    logits: Float[Tensor, "b k"], temperatures: Float[Tensor, " k"], per: Unit
) -> Float[Tensor, "b k"]:
    """Logits divided by the temperature of the predicted class, or column by column."""
    t = temperatures.to(logits)
    return logits / (t if per == "logit" else t[logits.argmax(dim=1), None])


def _by_column(data: FitData, start: Tensor) -> Tensor:
    x, q = data.logits, data.targets
    n = len(x)

    def value(w: Tensor) -> float:
        return -float((q * (x * w).log_softmax(dim=1)).sum()) / n

    def objective(w: Tensor) -> tuple[float, Tensor, Tensor]:
        log_p = (x * w).log_softmax(dim=1)
        px = log_p.exp() * x
        gradient = (px - q * x).sum(0) / n
        hessian = (torch.diag((px * x).sum(0)) - px.T @ px) / n
        return -float((q * log_p).sum()) / n, gradient, hessian

    w = minimise_newton(objective, (1 / start).to(x), value=value)
    return (1 / w.clamp(min=1 / HIGHEST, max=1 / LOWEST)).cpu()
