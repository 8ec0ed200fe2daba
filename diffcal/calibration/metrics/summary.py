"""Measures by name and many at once: ``measure``, ``evaluate``, ``calibration_summary``."""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.benchmark import (
    OOD_NAMES,
    benchmark_value,
    benchmark_values,
    require_temperature,
)
from diffcal.calibration.metrics.binning import mass_edges, profile_bin_sums, width_edges
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.intervals import (
    Interval,
    IntervalMethod,
    interval_from_draws,
    resample_classwise,
    resample_means,
    resample_predictions,
    resample_statistics,
)
from diffcal.calibration.metrics.ood import OodScore, ood_auroc, ood_scores
from diffcal.calibration.metrics.profile import Profile
from diffcal.calibration.metrics.registry import MEASURES, Measure
from diffcal.errors import ConfigError, DataError

__all__ = [
    "COMMON_MEASURES",
    "Measurement",
    "MetricReport",
    "calibration_summary",
    "confidence_interval",
    "evaluate",
    "measure",
]

COMMON_MEASURES = (
    "accuracy",
    "confidence",
    "calibration_gap",
    "nll",
    "brier",
    "brier_top",
    "brier_reliability",
    "brier_refinement",
    "ece",
    "noise_floor",
    "ece_mass",
    "rmsce",
    "mce",
    "average_ce",
    "over_part",
    "under_part",
    "debiased_ce",
    "sweep_ece",
    "smece",
    "ks",
    "kde_ce",
    "mmce",
    "cw_ece",
    "aurc",
    "e_aurc",
    "augrc",
    "auroc",
)
"""What a summary holds for hard labels, in the order of a table."""

SOFT_COMMON_MEASURES = (
    "kl",
    "js",
    "total_variation",
    "squared_distance",
    "label_entropy",
    "prediction_entropy",
    "top1_agreement",
)
"""What a summary adds for soft labels."""

OF_SCORES = frozenset(("nll", "brier", "brier_mean"))
"""Measures that are means of scores, read together with the confidences where one is asked for."""

CLASSWISE_LIMIT = 2_000_000_000
"""Operations up to which class-wise intervals are computed."""


@dataclass(frozen=True)
class Measurement:
    """A value, its interval if one was asked for and exists, and a remark."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0
    note: str = ""


class MetricReport(Mapping[str, Measurement]):
    """Measurements by name, in the order they were asked for."""

    def __init__(self, entries: dict[str, Measurement], level: float, n_resamples: int) -> None:
        self._entries = entries
        self.level = level
        self.n_resamples = n_resamples

    def __getitem__(self, name: str) -> Measurement:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        """A line for each measure: name, value, interval, remark."""
        width = max(map(len, self._entries), default=0)
        lines = []
        for name, entry in self._entries.items():
            line = f"{name:<{width}}  {entry.value:9.4f}"
            if entry.low is not None and entry.high is not None:
                line += f"  [{entry.low:.4f}, {entry.high:.4f}]"
            lines.append(f"{line}  {entry.note}".rstrip())
        return "\n".join(lines)

    @property
    def values_only(self) -> dict[str, float]:
        """Plain numbers by name."""
        return {name: entry.value for name, entry in self._entries.items()}

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain dict for JSON; NaN and infinity become None and are named in the note."""
        table = {}
        for name, entry in self._entries.items():
            row = asdict(entry)
            if not math.isfinite(entry.value):
                row["value"] = None
                row["note"] = "; ".join(filter(None, (entry.note, _why(entry.value))))
            for end in ("low", "high"):
                if row[end] is not None and not math.isfinite(row[end]):
                    row[end] = None
            table[name] = row
        return table


def measure(
    name: str,
    predictions: Confidences | None = None,
    *,
    logits: Tensor | np.ndarray | None = None,
    probs: Tensor | np.ndarray | None = None,
    labels: Tensor | np.ndarray | None = None,
    soft_labels: Tensor | np.ndarray | None = None,
    temperature: float | None = None,
    ood_logits: Tensor | np.ndarray | None = None,
    ood_score: OodScore = "confidence",
    **options: Any,
) -> float:
    """One measure by name, from predictions or from raw outputs.

    Names are the keys of ``MEASURES`` (``ece``, ``smece``, ...) and the benchmark's: ``ECE_15``,
    ``cwCE_em_50``, ``KSCE``, with ``pre_`` (the same) or ``post_`` (after division by
    ``temperature``), ``auc_svhn`` and ``auc_cifar10c`` (AUROC against ``ood_logits``).

    Raises:
        ConfigError: unknown name (near ones are listed) or option.
        DataError: bad input, or input that the measure needs is missing.
    """
    made = _gather(predictions, logits, probs, labels, soft_labels)
    if name in MEASURES:
        return _compute(name, made, **options)
    if not isinstance(made, Predictions):
        raise DataError(f"'{name}' needs the probabilities of all classes: pass Predictions")
    if name in OOD_NAMES:
        if ood_logits is None:
            raise DataError(f"'{name}' compares with another data set: pass ood_logits=")
        logits, probs = (made.scores, None) if made.is_logits else (None, made.scores)
        inside = ood_scores(logits=logits, probs=probs, score=ood_score)
        return ood_auroc(inside, ood_scores(logits=ood_logits, score=ood_score))
    state, _, rest = name.partition("_")
    if state == "post":
        return benchmark_value(rest, made.scaled(require_temperature(name, temperature)))
    try:
        return benchmark_value(rest if state == "pre" else name, made)
    except ConfigError as error:
        raise ConfigError(_unknown(name)) from error


def evaluate(
    predictions: Confidences | None = None,
    *,
    logits: Tensor | np.ndarray | None = None,
    probs: Tensor | np.ndarray | None = None,
    labels: Tensor | np.ndarray | None = None,
    soft_labels: Tensor | np.ndarray | None = None,
    measures: str | Sequence[str] = "common",
    n_bins: int = 15,
    n_resamples: int = 0,
    level: float = 0.95,
    method: IntervalMethod = "basic",
    seed: int = 0,
) -> MetricReport:
    """Many measures in one go, with bootstrap intervals if ``n_resamples`` > 0.

    Args:
        measures: ``"common"``, ``"all"``, ``"benchmark"`` (the 50 of one state) or names.
        n_bins: Number of bins of every binned measure.

    Returns:
        A mapping from name to :class:`Measurement`. Values that are undefined are NaN and say so.
    """
    with_scores = isinstance(measures, str) or not OF_SCORES.isdisjoint(measures)
    made = _gather(predictions, logits, probs, labels, soft_labels, with_scores)
    if measures == "benchmark":
        if not isinstance(made, Predictions):
            raise DataError("the benchmark's measures need the probabilities of all classes")
        values = benchmark_values(made)
        entries = {name: Measurement(value, n=len(made)) for name, value in values.items()}
        return MetricReport(entries, level, 0)
    names = _names(measures, made)
    values = {}
    for name in names:
        options = {"n_bins": n_bins} if "n_bins" in _entry(name).options else {}
        values[name] = _compute(name, made, **options)
    draws: dict[str, Tensor] = {}
    remarks: dict[str, str] = {}
    if n_resamples > 0:
        draws, remarks = _draws(names, made, n_resamples, seed, n_bins)
    entries = {}
    for name, value in values.items():
        low = high = None
        if name in draws:
            interval = interval_from_draws(value, draws[name], level, method, MEASURES[name].bounds)
            low, high = interval.low, interval.high
        note = remarks.get(name, "") if math.isfinite(value) else _why(value)
        entries[name] = Measurement(value, low, high, len(made), note)
    return MetricReport(entries, level, n_resamples)


def calibration_summary(
    predictions: Confidences | None = None,
    *,
    logits: Tensor | np.ndarray | None = None,
    probs: Tensor | np.ndarray | None = None,
    labels: Tensor | np.ndarray | None = None,
    soft_labels: Tensor | np.ndarray | None = None,
    n_bins: int = 15,
) -> dict[str, float]:
    """All common measures as plain numbers, from one pass over the rows and one sort.

    Adds ``n`` and, for soft labels, divergences from them. Keys are those of ``MEASURES``.

    Raises:
        DataError: NaN or infinity, labels out of range, probabilities that do not sum to 1, ...
    """
    made = _gather(predictions, logits, probs, labels, soft_labels)
    return {"n": float(len(made)), **evaluate(made, n_bins=n_bins).values_only}


def confidence_interval(
    metric: str | Callable[[Predictions], float],
    predictions: Confidences | None = None,
    *,
    logits: Tensor | np.ndarray | None = None,
    probs: Tensor | np.ndarray | None = None,
    labels: Tensor | np.ndarray | None = None,
    soft_labels: Tensor | np.ndarray | None = None,
    n_resamples: int = 1000,
    level: float = 0.95,
    method: IntervalMethod = "basic",
    seed: int = 0,
    n_bins: int = 15,
) -> Interval:
    """Bootstrap interval of a measure by name, or of any function of predictions.

    Binned, kernel, ranking and mean measures are resampled all at once through counts; what has no
    such form (and functions) is computed anew for every resample. See
    :func:`~diffcal.calibration.metrics.intervals.interval_from_draws` for the methods.

    Raises:
        ConfigError: unknown measure, method or level.
    """
    made = _gather(predictions, logits, probs, labels, soft_labels)
    if not isinstance(metric, str):
        if not isinstance(made, Predictions):
            raise DataError("an interval of a function needs Predictions")
        draws = resample_predictions(made, metric, n_resamples, seed)
        return interval_from_draws(float(metric(made)), draws, level, method)
    entry = _entry(metric)
    options = {"n_bins": n_bins} if "n_bins" in entry.options else {}
    value = _compute(metric, made, **options)
    draws = _draws([metric], made, n_resamples, seed, n_bins)[0].get(metric)
    if draws is None:
        if not isinstance(made, Predictions):
            raise DataError(f"an interval of '{metric}' needs Predictions")
        draws = resample_predictions(
            made, lambda part: entry.compute(part, **options), n_resamples, seed
        )
    return interval_from_draws(value, draws, level, method, entry.bounds)


def _draws(
    names: Sequence[str], scores: Confidences, n_resamples: int, seed: int, n_bins: int
) -> tuple[dict[str, Float[Tensor, " r"]], dict[str, str]]:
    """Vectorised resamples of the measures that have them, and remarks on some that have none."""
    statistics, draws, remarks = {}, {}, {}
    for name in names:
        entry = MEASURES[name]
        if entry.of_profile is not None:
            statistics[name] = entry.of_profile
        elif entry.of_sums is not None:
            statistics[name] = _binned_statistic(entry, scores, n_bins)
        elif entry.of_rows is not None:
            rows = entry.of_rows(scores)  # type: ignore[arg-type]
            draws[name] = resample_means(rows, n_resamples, seed)
        elif name == "cw_ece" and isinstance(scores, Predictions):
            work = len(scores) * scores.classes * n_resamples
            if work <= CLASSWISE_LIMIT:
                draws[name] = resample_classwise(scores, n_bins, n_resamples, seed)
            else:
                remarks[name] = f"no interval: it would take {work:.0e} operations"
    if statistics:
        draws |= resample_statistics(scores, statistics, n_resamples, seed)
    return draws, remarks


def _binned_statistic(
    entry: Measure, scores: Confidences, n_bins: int
) -> Callable[[Profile], Tensor]:
    of_sums = entry.of_sums
    assert of_sums is not None
    if entry.scheme == "width":
        edges = width_edges(n_bins, scores.confidence.device)
    else:
        edges = mass_edges(scores.profile, n_bins)
    return lambda profile: of_sums(profile_bin_sums(profile, edges))


def _gather(
    predictions: Confidences | None,
    logits: Tensor | np.ndarray | None,
    probs: Tensor | np.ndarray | None,
    labels: Tensor | np.ndarray | None,
    soft_labels: Tensor | np.ndarray | None,
    with_scores: bool = True,
) -> Confidences:
    raw = (logits, probs, labels, soft_labels)
    if predictions is None:
        return Predictions(
            logits=logits,
            probs=probs,
            labels=labels,
            soft_labels=soft_labels,
            with_scores=with_scores,
        )
    if any(value is not None for value in raw):
        raise DataError("give either predictions or logits/probs with labels, not both")
    return predictions


def _names(measures: str | Sequence[str], scores: Confidences) -> list[str]:
    if not isinstance(measures, str):
        return list(measures)
    if measures not in ("common", "all"):
        raise ConfigError(
            f"measures must be 'common', 'all', 'benchmark' or names, not {measures!r}"
        )
    names = list(COMMON_MEASURES if measures == "common" else MEASURES)
    soft = isinstance(scores, Predictions) and scores.is_soft
    if measures == "common" and soft:
        # the floor is what drawing labels adds, and soft labels are not drawn
        names = [name for name in names if name != "noise_floor"] + list(SOFT_COMMON_MEASURES)
    allowed = {"confidences"}
    allowed |= {"classes"} if isinstance(scores, Predictions) else set()
    allowed |= {"soft labels"} if soft else set()
    return [name for name in names if MEASURES[name].needs in allowed]


def _entry(name: str) -> Measure:
    if name not in MEASURES:
        raise ConfigError(_unknown(name))
    return MEASURES[name]


def _compute(name: str, scores: Confidences, **options: Any) -> float:
    entry = _entry(name)
    unknown = sorted(set(options) - set(entry.options))
    if unknown:
        known = ", ".join(entry.options) or "none"
        raise ConfigError(f"measure '{name}' has no option '{unknown[0]}'; its options: {known}")
    if entry.needs != "confidences" and not isinstance(scores, Predictions):
        raise DataError(f"'{name}' needs the probabilities of all classes: pass Predictions")
    return entry.compute(scores, **options)


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, MEASURES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(MEASURES)}"
    return f"unknown measure '{name}'; {hint}"


def _why(value: float) -> str:
    return "undefined for these data" if math.isnan(value) else "infinite"
