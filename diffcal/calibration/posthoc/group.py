"""Group calibration: a calibrator within each of several learned groups, averaged over partitions."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from diffcal.calibration.metrics.temperature import fit_temperature
from diffcal.calibration.posthoc.calibrator import Calibrator, FitData
from diffcal.core.rng import item_generator
from diffcal.errors import ConfigError

__all__ = ["GroupCalibration", "soft_group_log_probs"]

BOUNDS = (0.01, 100.0)


@dataclass(kw_only=True, eq=False)
class GroupCalibration(Calibrator):
    """Temperatures of learned groups of inputs, averaged over several random partitions.

    For each of ``partitions`` random starts a linear group network on the features and a temperature
    per group are fitted together (:func:`soft_group_log_probs`, by L-BFGS, penalty
    ``weight_decay`` times the mean squared weight). Examples then belong to their likeliest group,
    within which a temperature is fitted by NLL; a group with fewer than ``min_count`` validation
    examples, or one that does not bound a temperature, takes the common one. The probabilities of
    all partitions are averaged.

    Source: Yang, Zhan and Gan 2023 (arXiv:2306.04985), algorithm 1, with temperature scaling within
    groups.
    """

    partitions: int = 20
    groups: int = 2
    weight_decay: float = 0.1
    steps: int = 100
    min_count: int = 20
    seed: int = 0

    STATE: ClassVar = ("partition_weights_", "temperatures_")
    needs_features: ClassVar = True

    def _check_settings(self) -> None:
        for name in ("partitions", "groups", "steps", "min_count"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay must not be negative, got {self.weight_decay}")

    @property
    def preserves_argmax(self) -> bool:
        """True: every member of the average divides a row by one number."""
        return True

    def _fit(self, data: FitData) -> None:
        h, z, q = data.require_features(), data.logits, data.targets
        weights = []
        for index in range(self.partitions):
            generator = item_generator(self.seed, "group-calibration", index)
            start = torch.randn(self.groups, h.shape[1], generator=generator) / h.shape[1] ** 0.5
            weights.append(self._partition(h, z, q, start.to(h)))
        self.fit_groups(data, torch.stack(weights))

    def fit_groups(self, data: FitData, weights: Float[Tensor, "u g d"]) -> "GroupCalibration":
        """The calibrator itself with given partitions and temperatures fitted within their groups."""
        h = data.require_features()
        common = fit_temperature(data.predictions, bounds=BOUNDS).temperature
        temperatures = torch.full(weights.shape[:2], common, dtype=torch.float64)
        for u, w in enumerate(weights.to(h)):
            member = (h @ w.T).argmax(dim=1)
            for g in range(len(w)):
                rows = (member == g).nonzero()[:, 0]
                if len(rows) < self.min_count:
                    continue
                found = fit_temperature(data.predictions.select(rows), bounds=BOUNDS)
                if not found.note:
                    temperatures[u, g] = found.temperature
        self.partition_weights_, self.temperatures_ = weights.cpu(), temperatures
        self._classes, self._features = data.classes, h.shape[1]
        return self

    def _partition(self, h: Tensor, z: Tensor, q: Tensor, start: Tensor) -> Tensor:
        size = start.numel()

        def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
            flat = torch.from_numpy(x).to(h).requires_grad_()
            w, tau = flat[:size].reshape(start.shape), flat[size:]
            log_p = soft_group_log_probs(h, z, w, tau)
            loss = -(q * log_p).sum(dim=1).mean() + self.weight_decay * w.square().mean()
            (gradient,) = torch.autograd.grad(loss, flat)
            return float(loss.detach()), gradient.cpu().numpy()

        x = torch.cat([start.flatten(), start.new_full((self.groups,), 1.5)]).cpu().numpy()
        bounds = [(None, None)] * size + [BOUNDS] * self.groups
        options = {"maxiter": self.steps}
        found = minimize(objective, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return torch.from_numpy(found.x[:size]).reshape(start.shape).to(h)

    def _probs(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        assert features is not None
        total = torch.zeros_like(z)
        for w, temperatures in zip(self.partition_weights_, self.temperatures_, strict=True):
            t = temperatures.to(z)[(features @ w.to(features).T).argmax(dim=1)]
            total += (z / t[:, None]).softmax(dim=1)
        return total / len(self.partition_weights_)


def soft_group_log_probs(
    features: Float[Tensor, "b d"],
    logits: Float[Tensor, "b k"],
    weights: Float[Tensor, "g d"],
    temperatures: Float[Tensor, " g"],
) -> Float[Tensor, "b k"]:
    """``log Σ_g softmax(W h)_g softmax(z / τ_g)``: what partitions are trained on.

    Source: Yang, Zhan and Gan 2023 (arXiv:2306.04985), section 4.2.
    """
    group = (features @ weights.T).log_softmax(dim=1)
    scaled = (logits[:, None, :] / temperatures[:, None]).log_softmax(dim=2)
    return torch.logsumexp(group[:, :, None] + scaled, dim=1)
