"""Proper scores (log score, Brier score) and what calibration and refinement contribute to them."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.binning import Scheme, bin_sums
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.temperature import fit_temperature
from diffcal.errors import ConfigError

__all__ = [
    "BrierDecomposition",
    "LogDecomposition",
    "TemperatureDecomposition",
    "brier_decomposition",
    "brier_score",
    "brier_top_label",
    "log_decomposition",
    "mean_entropy",
    "negative_log_likelihood",
    "temperature_decomposition",
]


def negative_log_likelihood(predictions: Predictions) -> float:
    """Mean cross-entropy of label and prediction, in nats; infinite if an impossible class occurred.

    For soft labels ``-Σ_k q_k log p_k``, whose least value is the entropy of the labels.
    """
    return predictions.mean_log_score


def brier_score(
    predictions: Predictions, reduction: Literal["sum", "mean_over_classes"] = "sum"
) -> float:
    """Mean squared distance of the prediction and the (one-hot or soft) label, in [0, 2].

    ``mean_over_classes`` divides by the number of classes, as the calibration benchmark does. For
    soft labels it is the distance to the distribution; the expected Brier score of a label drawn
    from it is larger by ``1 - Σ_k q_k²`` whatever the prediction.

    Source: Brier 1950; arXiv:2308.11838 for the division by k.
    """
    value = predictions.mean_brier
    if reduction == "sum":
        return value
    if reduction == "mean_over_classes":
        return value / predictions.classes
    raise ConfigError(f"reduction must be 'sum' or 'mean_over_classes', got '{reduction}'")


def brier_top_label(scores: Confidences) -> float:
    """Mean squared gap of confidence and outcome of the top label, in [0, 1]."""
    return scores.moments["residual"]


def mean_entropy(predictions: Predictions) -> float:
    """Mean entropy of the predicted distributions, in nats."""

    def make() -> float:
        total = 0.0
        for rows in predictions.row_blocks():
            total += float(torch.special.entr(predictions.probs(rows)).sum())
        return total / len(predictions)

    return predictions.cached("mean entropy", make)


@dataclass(frozen=True)
class BrierDecomposition:
    """Parts of the top-label Brier score over bins; they add up exactly.

    ``brier = reliability - resolution + uncertainty + within_bin_variance - within_bin_covariance``
    """

    brier: float
    reliability: float
    """Weighted squared gap of confidence and accuracy: the calibration part."""
    resolution: float
    """How far bin accuracies lie from the overall one."""
    uncertainty: float
    """Variance of the outcomes; accuracy·(1 - accuracy) for hard labels."""
    within_bin_variance: float
    """Variance of the confidences inside bins."""
    within_bin_covariance: float
    """Twice the covariance of confidences and outcomes inside bins."""

    @property
    def refinement(self) -> float:
        """Uncertainty minus resolution: what recalibration of these bins cannot remove."""
        return self.uncertainty - self.resolution


def brier_decomposition(
    scores: Confidences, n_bins: int = 15, scheme: Scheme = "width"
) -> BrierDecomposition:
    """Reliability, resolution and uncertainty of the top-label Brier score, exact over bins.

    Source: Murphy 1973; the within-bin terms from Stephenson et al. 2008 (their equation 5).
    """
    sums = bin_sums(scores, n_bins, scheme).filled
    means = scores.moments
    accuracy = means["t"]
    # means of products over everything minus products of bin means: sums within bins
    variance = means["cc"] - (sums.weight * sums.mean_confidence.square()).sum()
    covariance = means["ct"] - (sums.weight * sums.mean_confidence * sums.mean_outcome).sum()
    return BrierDecomposition(
        brier=brier_top_label(scores),
        reliability=float((sums.weight * sums.gap.square()).sum()),
        resolution=float((sums.weight * (sums.mean_outcome - accuracy).square()).sum()),
        uncertainty=means["tt"] - accuracy**2,
        within_bin_variance=float(variance),
        within_bin_covariance=2 * float(covariance),
    )


@dataclass(frozen=True)
class LogDecomposition:
    """Parts of the log score (nats) of the top label being right; they add up exactly.

    ``log_loss = reliability - resolution + uncertainty + within_bin``
    """

    log_loss: float
    reliability: float
    """Weighted relative entropy of bin accuracy from bin confidence."""
    resolution: float
    """Weighted relative entropy of bin accuracy from the overall accuracy."""
    uncertainty: float
    """Entropy of the overall accuracy."""
    within_bin: float
    """What replacing confidences by their bin means changes."""

    @property
    def refinement(self) -> float:
        """Uncertainty minus resolution."""
        return self.uncertainty - self.resolution


def log_decomposition(
    scores: Confidences, n_bins: int = 15, scheme: Scheme = "width"
) -> LogDecomposition:
    """Reliability, resolution and uncertainty of the top-label log score over bins.

    Infinite if a confidence of exactly 1 was wrong (or of 0 was right).

    Source: Bröcker 2009 (Q. J. R. Meteorol. Soc. 135), the decomposition of proper scores.
    """
    c, t = scores.confidence, scores.outcome
    sums = bin_sums(scores, n_bins, scheme).filled
    weight, conf, acc = sums.weight, sums.mean_confidence, sums.mean_outcome
    overall = t.mean()
    loss = _cross_entropy(t, c).mean()
    reliability = (weight * (_cross_entropy(acc, conf) - _cross_entropy(acc, acc))).sum()
    uncertainty = _cross_entropy(overall, overall)
    resolution = uncertainty - (weight * _cross_entropy(acc, acc)).sum()
    return LogDecomposition(
        log_loss=float(loss),
        reliability=float(reliability),
        resolution=float(resolution),
        uncertainty=float(uncertainty),
        within_bin=float(loss - reliability + resolution - uncertainty),
    )


@dataclass(frozen=True)
class TemperatureDecomposition:
    """The log score split by the best temperature on the same data."""

    nll: float
    temperature: float
    calibration: float
    """What the best single temperature would remove, nats; non-negative."""
    refinement: float
    """NLL at that temperature, nats."""


def temperature_decomposition(predictions: Predictions) -> TemperatureDecomposition:
    """NLL as calibration (removable by one temperature) plus refinement (the rest).

    The temperature is fitted on these very data, which for one parameter costs about 1/(2N) nats.

    Source: Berta et al. 2025 (arXiv:2501.19195), calibration and refinement errors of a proper loss,
    with temperatures as the class of recalibrations.
    """
    nll = negative_log_likelihood(predictions)
    fit = fit_temperature(predictions)
    refinement = min(fit.loss, nll)
    return TemperatureDecomposition(
        nll=nll, temperature=fit.temperature, calibration=nll - refinement, refinement=refinement
    )


def _cross_entropy(t: Float[Tensor, "*n"], c: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return -torch.special.xlogy(t, c) - torch.special.xlogy(1 - t, 1 - c)
