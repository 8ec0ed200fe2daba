"""Calibrators made of maps from one probability to another: per class, or of the top label."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.posthoc.calibrator import Calibrator, FitData

__all__ = ["EventMap", "MapScheme", "ProbabilityMap", "normalised", "with_top"]

MapScheme = Literal["one_vs_rest", "top_label"]


@dataclass(kw_only=True, eq=False)
class EventMap(Calibrator):
    """One map [0, 1] → [0, 1] for each class, or one for the confidence of the top label.

    ``scheme="one_vs_rest"`` maps each class's probability by the map of that class and divides rows
    by their sums (a row of zeros becomes uniform). ``scheme="top_label"`` maps the confidence and
    rescales the other classes to fill 1 - confidence, so that another class may come out on top.
    """

    scheme: MapScheme = "one_vs_rest"

    @property
    def preserves_argmax(self) -> bool:
        """False: maps differ between classes and may have equal values."""
        return False

    @abstractmethod
    def _fit_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Fit one map to each pair of scores and outcomes in [0, 1]."""

    @abstractmethod
    def map_value(self, probs: Float[Tensor, " b"], index: int = 0) -> Float[Tensor, " b"]:
        """Probabilities mapped by the map of class ``index`` (0 for the top label)."""

    def _fit(self, data: FitData) -> None:
        p = data.predictions
        if self.scheme == "top_label":
            pairs = [(p.confidence.cpu(), p.outcome.cpu())]
        else:
            probs, targets = data.log_probs.exp().cpu(), data.targets.cpu()
            pairs = [(probs[:, k], targets[:, k]) for k in range(data.classes)]
        self._fit_pairs([(scores.contiguous(), t.contiguous()) for scores, t in pairs])

    def _probs(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        p = z.softmax(dim=1)
        if self.scheme == "top_label":
            top, index = p.max(dim=1)
            return with_top(p, index, self.map_value(top))
        return normalised(self._mapped(p))

    def _mapped(self, p: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        columns = [self.map_value(p[:, k], k) for k in range(p.shape[1])]
        return torch.stack(columns, dim=1)


@dataclass(kw_only=True, eq=False)
class ProbabilityMap(EventMap):
    """An :class:`EventMap` whose maps are tables of knots and values.

    Between knots a map is a step (``constant``) or a line.
    """

    STATE: ClassVar = ("knots_", "values_", "ends_")
    constant: ClassVar[bool]
    """Whether value i holds on (knot i-1, knot i]; else values are joined by lines."""

    @abstractmethod
    def _fit_map(
        self, scores: Float[Tensor, " n"], outcomes: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        """Knots (rising) and values of the map fitted to scores with outcomes in [0, 1]."""

    def _fit_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._store([self._fit_map(scores, outcomes) for scores, outcomes in pairs])

    def _store(self, tables: list[tuple[Tensor, Tensor]]) -> None:
        self.knots_ = torch.cat([knots for knots, _ in tables])
        self.values_ = torch.cat([values for _, values in tables]).clamp(0, 1)
        self.ends_ = torch.tensor([len(knots) for knots, _ in tables]).cumsum(0)

    def map_value(self, probs: Float[Tensor, " b"], index: int = 0) -> Float[Tensor, " b"]:
        """Probabilities mapped by the map of class ``index`` (0 for the top label)."""
        stop = int(self.ends_[index])
        start = int(self.ends_[index - 1]) if index else 0
        x = self.knots_[start:stop].to(probs)
        y = self.values_[start:stop].to(probs)
        if self.constant:
            return y[torch.searchsorted(x, probs.contiguous()).clamp(max=len(x) - 1)]
        if len(x) == 1:
            return y.expand(len(probs)).clone()
        right = torch.searchsorted(x, probs.contiguous()).clamp(1, len(x) - 1)
        x0, x1 = x[right - 1], x[right]
        share = ((probs - x0) / (x1 - x0)).clamp(0, 1)
        return y[right - 1] + share * (y[right] - y[right - 1])


def normalised(values: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Rows divided by their sums; rows of zeros become uniform."""
    total = values.sum(dim=1, keepdim=True)
    return torch.where(total > 0, values / total.clamp(min=1e-300), 1 / values.shape[1])


def with_top(
    p: Float[Tensor, "b k"], index: Tensor, confidence: Float[Tensor, " b"]
) -> Float[Tensor, "b k"]:
    """Rows whose entry at ``index`` is ``confidence``, the others rescaled to sum to the rest.

    Others that sum to 0 share the rest equally.
    """
    at = index[:, None]
    rest = p.scatter(1, at, 0.0)
    total = rest.sum(dim=1, keepdim=True)
    share = torch.where(total > 0, rest / total.clamp(min=1e-300), 1 / (p.shape[1] - 1))
    return (share * (1 - confidence)[:, None]).scatter(1, at, confidence[:, None])
