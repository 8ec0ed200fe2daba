"""Histogram binning and Bayesian binning into quantiles (BBQ)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.binning import assign_bins, mass_edges_of_values, width_edges
from diffcal.calibration.posthoc.probability_map import ProbabilityMap
from diffcal.errors import ConfigError

__all__ = ["BayesianBinning", "HistogramBinning"]


@dataclass(kw_only=True, eq=False)
class HistogramBinning(ProbabilityMap):
    """A probability becomes the rate of the event in its bin on validation data.

    Bins are equal intervals (lower, upper]; an empty bin gives its centre. Equals netcal's
    ``HistogramBinning`` for one versus rest.

    Source: Zadrozny and Elkan 2001.
    """

    n_bins: int = 15

    constant: ClassVar = True

    def _check_settings(self) -> None:
        if self.n_bins < 1:
            raise ConfigError(f"n_bins must be at least 1, got {self.n_bins}")

    def _fit_map(
        self, scores: Float[Tensor, " n"], outcomes: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        edges = width_edges(self.n_bins)
        count, hits = _counts(scores, outcomes, edges)
        centre = (edges[1:] + edges[:-1]) / 2
        return edges[1:], torch.where(count > 0, hits / count.clamp(min=1e-300), centre)


@dataclass(kw_only=True, eq=False)
class BayesianBinning(ProbabilityMap):
    """BBQ: the average of equal-mass histograms of many sizes, weighted by their evidence.

    Numbers of bins B run from N^(1/3)/``spread`` to ``spread``·N^(1/3). The rate of each bin has a
    Beta prior of strength ``strength/B`` whose mean is the bin's midpoint; a histogram counts by its
    marginal likelihood, and a bin gives its posterior mean. The average of step functions is one
    step function, which is what is kept.

    Source: Naeini, Cooper and Hauskrecht 2015, equations 3 to 6, with their prior strength N' = 2
    per bin (``strength=None`` sets 2B).
    """

    spread: float = 10.0
    strength: float | None = None

    constant: ClassVar = True

    def _check_settings(self) -> None:
        if self.spread < 1:
            raise ConfigError(f"spread must be at least 1, got {self.spread}")
        if self.strength is not None and self.strength <= 0:
            raise ConfigError(f"strength must be positive, got {self.strength}")

    def bin_numbers(self, n: int) -> range:
        """Numbers of bins that are averaged for ``n`` examples."""
        root = n ** (1 / 3)
        low = max(1, int(root / self.spread))
        return range(low, max(low, min(-(-n // 5), int(root * self.spread))) + 1)

    def _fit_map(
        self, scores: Float[Tensor, " n"], outcomes: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        models = []
        for bins in self.bin_numbers(len(scores)):
            edges = mass_edges_of_values(scores, bins)
            models.append((edges, *self._posterior(scores, outcomes, edges)))
        evidence = torch.stack([score for _, _, score in models])
        weights = evidence.softmax(dim=0)
        knots = torch.cat([edges[1:] for edges, _, _ in models]).unique()
        total = torch.zeros_like(knots)
        for weight, (edges, rate, _) in zip(weights, models, strict=True):
            total += weight * rate[torch.searchsorted(edges[1:].contiguous(), knots)]
        return knots, total

    def _posterior(self, scores: Tensor, outcomes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean of each bin's rate, and the log marginal likelihood."""
        count, hits = _counts(scores, outcomes, edges)
        bins = len(count)
        strength = 2.0 if self.strength is None else self.strength / bins
        centre = ((edges[1:] + edges[:-1]) / 2).clamp(1e-6, 1 - 1e-6)
        alpha, beta = strength * centre, strength * (1 - centre)
        both = torch.full_like(alpha, strength)
        score = (
            both.lgamma()
            - (count + both).lgamma()
            + (hits + alpha).lgamma()
            - alpha.lgamma()
            + (count - hits + beta).lgamma()
            - beta.lgamma()
        ).sum()
        return (hits + alpha) / (count + strength), score


def _counts(scores: Tensor, outcomes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    index = assign_bins(scores.clamp(0, 1), edges)
    bins = len(edges) - 1
    hits = torch.bincount(index, weights=outcomes, minlength=bins)
    return torch.bincount(index, minlength=bins).double(), hits
