"""Every measure by name, with what a table or the command line has to know about it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics import binned, classwise, estimators, kernel, proper, selective
from diffcal.calibration.metrics import smooth as smooth_ece
from diffcal.calibration.metrics.binning import BinSums
from diffcal.calibration.metrics.divergences import SOFT_MEASURES, soft_label_divergences
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.profile import Profile

__all__ = ["MEASURES", "Measure", "harmonic_calibration_score"]

INFINITY = math.inf


@dataclass(frozen=True)
class Measure:
    """A measure and how to read it."""

    compute: Callable[..., float]
    """``compute(predictions, **options)``."""
    title: str
    better: Literal["lower", "higher", "zero", ""] = "lower"
    bounds: tuple[float, float] = (0.0, 1.0)
    options: tuple[str, ...] = ()
    needs: Literal["confidences", "classes", "soft labels"] = "confidences"
    """``confidences`` also work on :class:`Confidences`, for a single event."""
    of_sums: Callable[[BinSums], Float[Tensor, "*r"]] | None = None
    """The same on ready bin sums, for intervals."""
    scheme: str = "width"
    of_profile: Callable[[Profile], Float[Tensor, "*r"]] | None = None
    """The same on a profile, for intervals."""
    of_rows: Callable[[Predictions], Float[Tensor, " n"]] | None = None
    """Values per example whose mean it is, for intervals."""


def accuracy(scores: Confidences) -> float:
    """Share of right predictions; with soft labels the mean probability of being right."""
    return scores.mean_outcome


def mean_confidence(scores: Confidences) -> float:
    """Mean confidence of the predictions."""
    return float(scores.confidence.mean())


def correct_confidence(scores: Confidences) -> float:
    """Mean confidence of right predictions (weighted by outcome); NaN if there are none."""
    right = float(scores.outcome.sum())
    return float((scores.confidence * scores.outcome).sum()) / right if right > 0 else math.nan


def incorrect_confidence(scores: Confidences) -> float:
    """Mean confidence of wrong predictions; NaN if there are none."""
    wrong = float((1 - scores.outcome).sum())
    return (
        float((scores.confidence * (1 - scores.outcome)).sum()) / wrong if wrong > 0 else math.nan
    )


def harmonic_calibration_score(accuracy: float, ece: float, beta: float = 1.0) -> float:
    """HCS: weighted harmonic mean of accuracy and 1 - ECE, in [0, 1]; higher is better.

    ``(1 + β) acc (1 - ECE) / (β acc + (1 - ECE))``. At β = 1 it is almost a function of accuracy
    alone. 0 if both parts are 0.

    Source: Tao et al. 2024 (arXiv:2308.11838).
    """
    calibrated = 1 - ece
    denominator = beta * accuracy + calibrated
    return (1 + beta) * accuracy * calibrated / denominator if denominator > 0 else 0.0


def _hcs(scores: Confidences, n_bins: int = 15, beta: float = 1.0) -> float:
    ece = binned.expected_calibration_error(scores, n_bins)
    return harmonic_calibration_score(scores.mean_outcome, ece, beta)


def _mass(compute: Callable[..., float]) -> Callable[..., float]:
    return partial(compute, scheme="mass")


def _sweep(scores: Confidences, norm: float = 1.0) -> float:
    return estimators.sweep_calibration_error(scores, norm).value


def _part(split: Callable[..., Any], name: str, scores: Confidences, n_bins: int = 15) -> float:
    return float(getattr(split(scores, n_bins), name))


def _divergence(name: str, predictions: Predictions) -> float:
    return soft_label_divergences(predictions)[name]


def _root(sums: BinSums) -> Float[Tensor, "*r"]:
    return estimators.debiased_square_of_sums(sums).clamp(min=0).sqrt()


def _mean_confidence_of_profile(profile: Profile) -> Float[Tensor, "*r"]:
    return (profile.count * profile.confidence).sum(dim=-1) / profile.total


def _accuracy_of_profile(profile: Profile) -> Float[Tensor, "*r"]:
    return profile.hits.sum(dim=-1) / profile.total


def _gap_of_profile(profile: Profile) -> Float[Tensor, "*r"]:
    return profile.residual.sum(dim=-1) / profile.total


def _excess_of_profile(profile: Profile) -> Float[Tensor, "*r"]:
    return selective.aurc_of_profile(profile) - selective.optimal_aurc_of_profile(profile)


_BINS = ("n_bins", "scheme")

MEASURES: dict[str, Measure] = {
    # how right, how sure
    "accuracy": Measure(accuracy, "Accuracy", "higher", of_profile=_accuracy_of_profile),
    "confidence": Measure(
        mean_confidence, "Mean confidence", "", of_profile=_mean_confidence_of_profile
    ),
    "correct_confidence": Measure(correct_confidence, "Confidence where right", ""),
    "incorrect_confidence": Measure(incorrect_confidence, "Confidence where wrong", "lower"),
    "calibration_gap": Measure(
        binned.calibration_gap,
        "Confidence − accuracy",
        "zero",
        (-1.0, 1.0),
        of_profile=_gap_of_profile,
    ),
    # proper scores
    "nll": Measure(
        proper.negative_log_likelihood,
        "NLL (nats)",
        bounds=(0.0, INFINITY),
        needs="classes",
        of_rows=lambda predictions: predictions.log_score,
    ),
    "brier": Measure(
        proper.brier_score,
        "Brier score",
        bounds=(0.0, 2.0),
        needs="classes",
        of_rows=lambda predictions: predictions.brier,
    ),
    "brier_mean": Measure(
        partial(proper.brier_score, reduction="mean_over_classes"),
        "Brier score / k",
        needs="classes",
        of_rows=lambda predictions: predictions.brier / predictions.classes,
    ),
    "brier_top": Measure(
        proper.brier_top_label,
        "Brier, top label",
        of_rows=lambda scores: (scores.confidence - scores.outcome).square(),
    ),
    "brier_reliability": Measure(
        partial(_part, proper.brier_decomposition, "reliability"),
        "Reliability (Brier)",
        options=("n_bins",),
        of_sums=lambda sums: (
            ((sums.confidence - sums.outcome).square() / sums.count.clamp(min=1)).sum(dim=-1)
            / sums.total
        ),
    ),
    "brier_refinement": Measure(
        partial(_part, proper.brier_decomposition, "refinement"),
        "Refinement (Brier)",
        options=("n_bins",),
    ),
    "nll_reliability": Measure(
        partial(_part, proper.log_decomposition, "reliability"),
        "Reliability (log score)",
        bounds=(0.0, INFINITY),
        options=("n_bins",),
    ),
    "entropy": Measure(
        proper.mean_entropy, "Entropy of predictions", "", (0.0, INFINITY), needs="classes"
    ),
    # binned
    "ece": Measure(
        binned.expected_calibration_error,
        "ECE",
        options=(*_BINS, "norm", "compat"),
        of_sums=binned.ece_of_sums,
    ),
    "ece_mass": Measure(
        _mass(binned.expected_calibration_error),
        "Adaptive ECE (equal mass)",
        options=("n_bins", "norm", "compat"),
        of_sums=binned.ece_of_sums,
        scheme="mass",
    ),
    "rmsce": Measure(
        binned.root_mean_square_calibration_error,
        "RMS calibration error",
        options=(*_BINS, "compat"),
        of_sums=partial(binned.ece_of_sums, norm=2.0),
    ),
    "mce": Measure(
        binned.maximum_calibration_error,
        "Maximum calibration error",
        options=(*_BINS, "min_count", "compat"),
        of_sums=binned.mce_of_sums,
    ),
    "average_ce": Measure(
        binned.average_calibration_error,
        "Average calibration error",
        options=(*_BINS, "compat"),
        of_sums=binned.average_of_sums,
    ),
    "over_part": Measure(
        binned.over_confidence_part,
        "ECE, over-confident part",
        options=(*_BINS, "compat"),
        of_sums=binned.over_part_of_sums,
    ),
    "under_part": Measure(
        binned.under_confidence_part,
        "ECE, under-confident part",
        options=(*_BINS, "compat"),
        of_sums=binned.under_part_of_sums,
    ),
    "over_confidence_error": Measure(
        binned.over_confidence_error, "Over-confidence error", options=(*_BINS, "compat")
    ),
    "under_confidence_error": Measure(
        binned.under_confidence_error, "Under-confidence error", options=(*_BINS, "compat")
    ),
    "debiased_ce": Measure(
        estimators.debiased_calibration_error,
        "Debiased calibration error (L2)",
        options=_BINS,
        of_sums=_root,
        scheme="mass",
    ),
    "sweep_ece": Measure(_sweep, "Sweep ECE", options=("norm",)),
    "noise_floor": Measure(
        estimators.ece_noise_floor,
        "ECE of a perfect model (noise floor)",
        "",
        options=(*_BINS, "n_resamples", "seed"),
    ),
    # without bins
    "smece": Measure(
        smooth_ece.smooth_calibration_error,
        "Smooth ECE",
        options=("cells",),
        of_profile=smooth_ece.smooth_errors_of_profile,
    ),
    "ks": Measure(
        kernel.ks_calibration_error, "Kolmogorov-Smirnov error", of_profile=kernel.ks_errors
    ),
    "kde_ce": Measure(
        kernel.kernel_density_calibration_error,
        "Kernel density ECE",
        options=("points", "quirk"),
        of_profile=partial(kernel.kernel_density_errors, points=1024),
    ),
    "mmce": Measure(
        kernel.maximum_mean_calibration_error,
        "Maximum mean calibration error",
        of_profile=kernel.mmce_errors,
    ),
    "skce": Measure(
        kernel.squared_kernel_calibration_error,
        "Squared kernel error, unbiased",
        "zero",
        (-1.0, 1.0),
    ),
    # all classes
    "cw_ece": Measure(
        classwise.classwise_calibration_error,
        "Class-wise ECE",
        options=(*_BINS, "norm"),
        needs="classes",
    ),
    "cw_ece_mass": Measure(
        _mass(classwise.classwise_calibration_error),
        "Class-wise ECE (equal mass)",
        options=("n_bins", "norm"),
        needs="classes",
    ),
    "cw_ks": Measure(
        kernel.classwise_ks_error, "Class-wise Kolmogorov-Smirnov error", needs="classes"
    ),
    "ace": Measure(
        classwise.adaptive_calibration_error,
        "Adaptive calibration error (Nixon)",
        options=("n_bins", "threshold"),
        needs="classes",
    ),
    "tace": Measure(
        partial(classwise.adaptive_calibration_error, threshold=1e-3),
        "Thresholded adaptive calibration error",
        options=("n_bins", "threshold"),
        needs="classes",
    ),
    "top_label_ce": Measure(
        classwise.top_label_calibration_error,
        "ECE within predicted classes",
        options=(*_BINS, "norm", "min_count"),
        needs="classes",
    ),
    "debiased_cw_ce": Measure(
        estimators.debiased_classwise_error,
        "Debiased class-wise error (L2)",
        options=_BINS,
        needs="classes",
    ),
    # ranking
    "aurc": Measure(
        selective.area_under_risk_coverage,
        "Area under risk-coverage",
        of_profile=selective.aurc_of_profile,
    ),
    "e_aurc": Measure(
        selective.excess_area_under_risk_coverage,
        "Excess area under risk-coverage",
        options=("geifman",),
        of_profile=_excess_of_profile,
    ),
    "augrc": Measure(
        selective.area_under_generalised_risk_coverage,
        "Area under generalised risk-coverage",
        of_profile=selective.augrc_of_profile,
    ),
    "auroc": Measure(
        selective.auroc_of_confidence,
        "AUROC of confidence for being right",
        "higher",
        of_profile=selective.auroc_of_profile,
    ),
    "hcs": Measure(_hcs, "Harmonic calibration score", "higher", options=("n_bins", "beta")),
    # soft labels
    **{
        name: Measure(
            partial(_divergence, name),
            title,
            better,  # type: ignore[arg-type]
            (0.0, bound),
            needs="soft labels",
        )
        for name, title, better, bound in (
            ("cross_entropy", "Cross-entropy with soft labels (nats)", "lower", INFINITY),
            ("kl", "KL(label ‖ prediction) (nats)", "lower", INFINITY),
            ("reverse_kl", "KL(prediction ‖ label) (nats)", "lower", INFINITY),
            ("js", "Jensen-Shannon divergence (nats)", "lower", math.log(2)),
            ("total_variation", "Total variation", "lower", 1.0),
            ("squared_distance", "Squared distance to soft labels", "lower", 2.0),
            ("hellinger", "Hellinger distance", "lower", 1.0),
            ("label_entropy", "Entropy of soft labels (nats)", "", INFINITY),
            ("prediction_entropy", "Entropy of predictions (nats)", "", INFINITY),
            ("top1_agreement", "Argmax agreement", "higher", 1.0),
        )
    },
}

assert set(SOFT_MEASURES) <= set(MEASURES)
