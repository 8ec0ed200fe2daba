"""Scaling-binning: a smooth map, then the means of its values in bins."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.binning import assign_bins, mass_edges_of_values
from diffcal.calibration.posthoc.logistic import fit_logistic, log_odds_columns
from diffcal.calibration.posthoc.probability_map import MapScheme, ProbabilityMap

__all__ = ["ScalingBinning"]


@dataclass(kw_only=True, eq=False)
class ScalingBinning(ProbabilityMap):
    """A probability becomes the mean of a Platt-scaled probability in its bin.

    First ``g(s) = sigmoid(a ln(s / (1 - s)) + b)`` is fitted by NLL, then ``n_bins`` bins of equal
    mass are laid over validation scores, then each bin gets the mean of g, not of outcomes as in
    histogram binning. So the calibration error of what comes out can be measured, as for
    histograms, and values have the small variance of the smooth map.

    The default is the top label. Maps of single classes (``one_vs_rest``) tie classes whose
    probabilities share a bin, which costs accuracy where bins are few (on digits with 10 classes and
    10 bins a tenth of it went). All three steps see all validation data, as in the authors' released
    package; their theory has a part for each.

    Source: Kumar, Liang and Ma 2019 (arXiv:1909.10155), algorithm 1.
    """

    scheme: MapScheme = "top_label"
    n_bins: int = 10

    constant: ClassVar = True

    def _fit_map(
        self, scores: Float[Tensor, " n"], outcomes: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        log_s, log_rest = log_odds_columns(scores)
        columns = torch.stack([log_s - log_rest, torch.ones_like(log_s)], dim=1)
        scaled = (
            columns @ fit_logistic(columns, outcomes, scores.new_tensor([1.0, 0.0]))
        ).sigmoid()
        edges = mass_edges_of_values(scores, self.n_bins)
        index = assign_bins(scores.clamp(0, 1), edges)
        bins = len(edges) - 1
        count = torch.bincount(index, minlength=bins).double()
        total = torch.bincount(index, weights=scaled, minlength=bins)
        kept = count > 0  # beyond the largest score there is nothing to average
        return edges[1:][kept], total[kept] / count[kept]
