"""Isotonic regression of probabilities, by scikit-learn."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from diffcal.calibration.posthoc.calibrator import FitData
from diffcal.calibration.posthoc.probability_map import ProbabilityMap, normalised

__all__ = ["IsotonicCalibration"]

TIE_BREAK = 1e-9
"""Share of the probability itself that the pooled map adds, so that its steps keep the order."""


@dataclass(kw_only=True, eq=False)
class IsotonicCalibration(ProbabilityMap):
    """The non-decreasing map of a probability that fits outcomes best in squared error.

    ``one_vs_rest`` and ``top_label`` as for every :class:`ProbabilityMap`; ``pooled`` fits a single
    map to all n·k pairs of probability and outcome and keeps every prediction, since all classes
    share it and ties are broken by 1e-9 of the probability. Rows are normalised in all three (the
    released pooled code leaves them as they are). Values are joined by lines and clipped outside.

    Source: Zadrozny and Elkan 2002; pooled: Zhang, Kailkhura and Han 2020 (arXiv:2003.07329), IRM.
    """

    scheme: Literal["one_vs_rest", "top_label", "pooled"] = "one_vs_rest"  # type: ignore[assignment]

    constant: ClassVar = False

    @property
    def preserves_argmax(self) -> bool:
        """True for the pooled map."""
        return self.scheme == "pooled"

    def _fit(self, data: FitData) -> None:
        if self.scheme != "pooled":
            super()._fit(data)
            return
        probs, targets = data.log_probs.exp().cpu(), data.targets.cpu()
        self._store([self._fit_map(probs.flatten(), targets.flatten())])

    def _fit_map(
        self, scores: Float[Tensor, " n"], outcomes: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        made = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        made.fit(scores.numpy(), outcomes.numpy())
        knots = torch.as_tensor(made.X_thresholds_, dtype=torch.float64)
        return knots, torch.as_tensor(made.y_thresholds_, dtype=torch.float64)

    def _probs(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        if self.scheme != "pooled":
            return super()._probs(z, features)
        p = z.softmax(dim=1)
        return normalised(self.map_value(p.flatten()).reshape(p.shape) + TIE_BREAK * p)
