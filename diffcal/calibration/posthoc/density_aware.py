"""DAC: temperatures that grow with the distance from the data a network knows."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from diffcal.calibration.metrics.temperature import fit_temperature
from diffcal.calibration.posthoc.calibrator import Calibrator, FitData
from diffcal.errors import ConfigError, DataError

__all__ = ["DensityAwareCalibration", "neighbour_distances"]

LOWEST = 1e-2
"""Smallest temperature, as for a single one."""


def neighbour_distances(
    features: Float[Tensor, "b d"] | None, reference: Float[Tensor, "n d"], neighbours: int
) -> Float[Tensor, " b"]:
    """Euclidean distance of each feature to its ``neighbours``-th nearest reference feature.

    ``features=None`` gives those of the reference itself, each without itself.
    """
    search = NearestNeighbors(n_neighbors=neighbours).fit(reference.cpu().numpy())
    queries = None if features is None else features.cpu().numpy()
    distances = search.kneighbors(queries)[0][:, -1]
    return torch.from_numpy(distances).to(reference)


@dataclass(kw_only=True, eq=False)
class DensityAwareCalibration(Calibrator):
    """``softmax(z / T(x))`` with ``T = w_0 + Σ_l w_l s_l``, w ≥ 0, s_l distances in layers of features.

    ``s_l`` is the distance to the ``neighbours``-th nearest known example in layer l, in units of its
    mean on validation data. ``layers`` gives the number of feature columns of each layer, as they
    stand side by side; by default all columns are one layer. Weights minimise the squared error of
    validation probabilities (or their NLL), from the best single temperature.

    Known examples are the training set's if :meth:`with_reference` names its features, else the
    validation examples (each without itself while fitting). Combine it with a second method as
    ``dac+temperature`` or ``dac+isotonic``; it keeps predictions.

    Source: Tomani et al. 2023 (arXiv:2302.05118), the scaling factor S(x, w); the unit of distance of
    each layer is ours.
    """

    neighbours: int = 10
    layers: tuple[int, ...] = ()
    criterion: Literal["mse", "nll"] = "mse"

    STATE: ClassVar = ("reference_", "units_", "weights_")
    needs_features: ClassVar = True
    gives_logits: ClassVar = True

    def _check_settings(self) -> None:
        self._known: Tensor | None = None
        if self.neighbours < 1:
            raise ConfigError(f"neighbours must be at least 1, got {self.neighbours}")
        if any(width < 1 for width in self.layers):
            raise ConfigError(f"layers are numbers of columns, at least 1, got {self.layers}")

    def with_reference(self, features: Float[Tensor, "n d"]) -> "DensityAwareCalibration":
        """The calibrator itself, knowing features of the training set."""
        self._known = features.detach().double().cpu()
        return self

    @property
    def preserves_argmax(self) -> bool:
        """True: a row is divided by one positive number."""
        return True

    @property
    def weights(self) -> Float[Tensor, " m"]:
        """w_0 and the weight of each layer, per mean distance."""
        self._require_fitted()
        return self.weights_

    def _fit(self, data: FitData) -> None:
        h = data.require_features()
        if self.layers and sum(self.layers) != h.shape[1]:
            raise DataError(f"layers hold {sum(self.layers)} columns, features {h.shape[1]}")
        own = self._known is None
        reference = h if self._known is None else self._known.to(h)
        if reference.shape[1] != h.shape[1]:
            raise DataError(
                f"reference features have {reference.shape[1]} columns, those of the fit {h.shape[1]}"
            )
        if len(reference) < self.neighbours + own:
            raise DataError(
                f"needs at least {self.neighbours + own} examples, got {len(reference)}"
            )
        raw = self._distances(None if own else h, reference)
        units = raw.mean(dim=0).clamp(min=1e-300)
        s = torch.cat([torch.ones_like(raw[:, :1]), raw / units], dim=1)
        z, q = data.logits, data.targets

        def both(w: np.ndarray) -> tuple[float, np.ndarray]:
            weights = torch.from_numpy(w).to(z).requires_grad_()
            log_p = (z / (s @ weights).clamp(min=LOWEST)[:, None]).log_softmax(dim=1)
            if self.criterion == "mse":
                loss = (log_p.exp() - q).square().sum(dim=1).mean()
            else:
                loss = -(q * log_p).sum(dim=1).mean()
            (gradient,) = torch.autograd.grad(loss, weights)
            return loss.item(), gradient.cpu().numpy()

        start = np.zeros(s.shape[1])
        start[0] = fit_temperature(data.predictions, bounds=(0.05, 20.0)).temperature
        options = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10}
        bounds = [(0.0, None)] * len(start)
        found = minimize(both, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        self.reference_, self.units_ = reference.cpu(), units.cpu()
        self.weights_ = torch.from_numpy(found.x)

    def _distances(self, h: Tensor | None, reference: Tensor) -> Tensor:
        widths = list(self.layers) or [reference.shape[1]]
        known = reference.split(widths, dim=1)
        parts = [None] * len(widths) if h is None else h.split(widths, dim=1)
        pairs = zip(parts, known, strict=True)
        return torch.stack(
            [neighbour_distances(part, layer, self.neighbours) for part, layer in pairs], dim=1
        )

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        assert features is not None
        s = self._distances(features, self.reference_.to(features)) / self.units_.to(features)
        w = self.weights_.to(s)
        return z / (w[0] + s @ w[1:]).clamp(min=LOWEST).to(z)[:, None]
