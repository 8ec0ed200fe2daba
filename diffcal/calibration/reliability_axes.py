"""Axes of a reliability diagram: bars or a smooth curve above, the distribution of confidences below."""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from diffcal.calibration.metrics.binned import expected_calibration_error
from diffcal.calibration.metrics.binning import Scheme, profile_bin_sums
from diffcal.calibration.metrics.inputs import Confidences
from diffcal.calibration.metrics.intervals import resample_profile
from diffcal.calibration.metrics.reliability import (
    ReliabilityCurve,
    reliability_curve,
    smooth_reliability_curve,
)
from diffcal.calibration.metrics.smooth import smooth_calibration_error
from diffcal.calibration.plot_style import BLUE, CORAL, INK, MUTED, PALE, TEAL, soften
from diffcal.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["IntervalKind", "Kind", "draw_distribution", "draw_reliability"]

Kind = Literal["binned", "smooth"]
IntervalKind = Literal["wilson", "bootstrap", "none"]
FEW = 10  # examples below which a bin of a diagram is drawn pale


def draw_reliability(
    axes: "Axes",
    scores: Confidences,
    n_bins: int,
    scheme: Scheme,
    kind: str,
    interval: str,
    level: float,
    seed: int,
    legend: bool = True,
) -> None:
    """Accuracy against confidence on ``axes`` with its measure in a box."""
    if interval not in ("wilson", "bootstrap", "none"):
        raise ConfigError(f"interval must be wilson, bootstrap or none, got '{interval}'")
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    if kind == "binned":
        curve = reliability_curve(scores, n_bins, scheme, level)
        handles = _bars(axes, scores, curve, interval, level, seed, scheme == "width")
        value, name = expected_calibration_error(scores, n_bins, scheme), "ECE"
    elif kind == "smooth":
        handles = _smooth(axes, scores, level, seed)
        value, name = smooth_calibration_error(scores), "smooth ECE"
    else:
        raise ConfigError(f"kind must be binned or smooth, got '{kind}'")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    note = f"{name}  {100 * value:.2f} %\naccuracy  {100 * scores.mean_outcome:.2f} %"
    box = {"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": PALE}
    axes.text(
        0.965, 0.05, note, transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5,
        linespacing=1.5, bbox=box, zorder=6,
    )  # fmt: skip
    if legend:
        drawn = axes.legend(
            handles=handles, loc="upper left", handlelength=1.3, frameon=True, borderaxespad=0.3
        )
        drawn.get_frame().set(facecolor="white", edgecolor="none", alpha=0.85)


def _bars(
    axes: "Axes",
    scores: Confidences,
    curve: ReliabilityCurve,
    interval: str,
    level: float,
    seed: int,
    even: bool,
) -> list[Any]:
    from matplotlib.patches import Patch

    filled = (curve.count > 0).cpu().numpy()
    edges = curve.edges.cpu().numpy().copy()
    if not even:  # outer bins reach as far as the data
        edges[0], edges[-1] = (float(end) for end in scores.confidence.aminmax())
        edges[0] = min(edges[0], edges[1] - 1e-3)
        edges[-1] = max(edges[-1], edges[-2] + 1e-3)
    left, width = edges[:-1][filled], np.diff(edges)[filled]
    accuracy = curve.accuracy.cpu().numpy()[filled]
    confidence = curve.confidence.cpu().numpy()[filled]
    gutter = min(0.004, float(width.min()) * 0.1)
    box = {"align": "edge", "width": width - 2 * gutter, "linewidth": 0}
    few = curve.count.cpu().numpy()[filled] < FEW  # such bars are drawn pale
    shared = np.minimum(accuracy, confidence)
    over, under = np.maximum(confidence - accuracy, 0), np.maximum(accuracy - confidence, 0)
    parts = (
        (shared, 0.0, BLUE, 0.85, "accuracy"),
        (over, shared, CORAL, 0.55, "confidence too high"),
        (under, shared, TEAL, 0.55, "confidence too low"),
    )
    handles: list[Any] = []
    for height, bottom, colour, alpha, label in parts:
        drawn = axes.bar(left + gutter, height, bottom=bottom, color=colour, alpha=alpha, **box)
        for bar, pale in zip(drawn, few, strict=True):
            if pale:
                bar.set_alpha(alpha * 0.35)
        if (height > 0.005).any():
            handles.append(Patch(color=colour, alpha=alpha, linewidth=0, label=label))
    if interval != "none":
        low, high = curve.low, curve.high
        if interval == "bootstrap":
            low, high = _bootstrap_accuracy(scores, curve, level, seed)
        low, high = low.cpu().numpy()[filled], high.cpu().numpy()[filled]
        spread = np.clip(np.stack([accuracy - low, high - accuracy]), 0, None)
        bars = axes.errorbar(
            left + width / 2, accuracy, yerr=spread, fmt="none", ecolor=INK, elinewidth=0.9,
            capsize=1.8, capthick=0.9, zorder=4, label=f"{100 * level:.0f} % interval",
        )  # fmt: skip
        handles.append(bars)
    return handles


def _bootstrap_accuracy(
    scores: Confidences, curve: ReliabilityCurve, level: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    sums = profile_bin_sums(resample_profile(scores, 500, seed), curve.edges)
    tail = (1 - level) / 2
    low, high = (sums.mean_outcome.nanquantile(end, dim=0) for end in (tail, 1 - tail))
    return low, high


def _smooth(axes: "Axes", scores: Confidences, level: float, seed: int) -> list[Any]:
    from matplotlib.collections import LineCollection

    curve = smooth_reliability_curve(scores, level=level, seed=seed)
    lowest, highest = (float(end) for end in scores.confidence.aminmax())
    # further than a kernel width from all data is extrapolation
    inside = (curve.grid >= lowest - curve.sigma) & (curve.grid <= highest + curve.sigma)
    known = (curve.accuracy.isfinite() & inside).cpu().numpy()
    x, y = curve.grid.cpu().numpy()[known], curve.accuracy.cpu().numpy()[known]
    density = curve.density.cpu().numpy()[known]
    low, high = curve.low.cpu().numpy()[known], curve.high.cpu().numpy()[known]
    band = axes.fill_between(
        x, low, high, color=BLUE, alpha=0.2, linewidth=0, label=f"{100 * level:.0f} % band"
    )
    points = np.stack([x, y], axis=1)
    segments = np.stack([points[:-1], points[1:]], axis=1)
    thickness = 0.8 + 3.4 * np.sqrt(density / density.max())
    lines = LineCollection(
        list(segments), linewidths=thickness[1:], colors=CORAL, capstyle="round", zorder=4,
        label="smoothed accuracy",
    )  # fmt: skip
    axes.add_collection(lines)
    return [band, lines]


def draw_distribution(axes: "Axes", scores: Confidences) -> None:
    """Histogram of the confidences with their mean, without a vertical scale."""
    c = scores.confidence.cpu().numpy()
    axes.hist(c, bins=50, range=(0, 1), weights=np.full(len(c), 1 / len(c)), color="#9db0c6")
    mean = float(c.mean())
    axes.axvline(mean, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    axes.annotate(
        f"mean {mean:.3f}",
        (mean, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if mean > 0.5 else 4, 0),
        textcoords="offset points",
        ha="right" if mean > 0.5 else "left",
        va="top",
        fontsize=7.5,
        color=MUTED,
    )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.3)  # room for the label
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    soften(axes, "none")
