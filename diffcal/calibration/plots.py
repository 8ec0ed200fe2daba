"""Figures of calibration: reliability, confidence, classes, selective risk, before and after.

Every function returns a matplotlib ``Figure`` (draw it in a notebook, or turn it into bytes with
``figure_to_png`` and ``figure_to_svg``); nothing touches pyplot's state.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffcal.calibration.metrics.binning import Scheme
from diffcal.calibration.metrics.classwise import class_width_sums
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.selective import (
    area_under_risk_coverage,
    risk_coverage_curve,
)
from diffcal.calibration.plot_style import (
    BLUE,
    CORAL,
    INK,
    MUTED,
    PALETTE,
    figure_to_png,
    figure_to_svg,
    new_figure,
    plot_style,
    soften,
)
from diffcal.calibration.reliability_axes import (
    IntervalKind,
    Kind,
    draw_distribution,
    draw_reliability,
)
from diffcal.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "class_heat_map",
    "confidence_histogram",
    "figure_to_png",
    "figure_to_svg",
    "measure_intervals",
    "reliability_comparison",
    "reliability_diagram",
    "risk_coverage",
]


def reliability_diagram(
    scores: Confidences,
    n_bins: int = 15,
    scheme: Scheme = "width",
    kind: Kind = "binned",
    interval: IntervalKind = "wilson",
    level: float = 0.95,
    title: str = "",
    seed: int = 0,
) -> "Figure":
    """Accuracy against confidence, with the distribution of confidences below.

    ``binned``: accuracy bars, the gap to the mean confidence of each bin, and intervals of the
    accuracy (Wilson or bootstrap). ``smooth``: kernel regression at the bandwidth of the smooth ECE,
    thick where there is data, with a bootstrap band.

    Raises:
        ConfigError: unknown ``kind`` or ``interval``.
    """
    with plot_style():
        figure = new_figure(4.3, 5.15)
        top, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4.2, 1]})
        draw_reliability(top, scores, n_bins, scheme, kind, interval, level, seed)
        top.set_title(title or "Reliability")
        top.set_ylabel("accuracy")
        draw_distribution(below, scores)
        below.set_xlabel("confidence")
        return figure


def reliability_comparison(
    models: Mapping[str, Confidences],
    n_bins: int = 15,
    scheme: Scheme = "width",
    kind: Kind = "binned",
    interval: IntervalKind = "wilson",
) -> "Figure":
    """Reliability diagrams side by side on the same axes: before and after, or several models."""
    _require_models(models)
    with plot_style():
        columns = min(len(models), 4)
        rows = -(-len(models) // columns)
        figure = new_figure(3.1 * columns + 0.45, 4.25 * rows)
        grid = figure.subplots(
            2 * rows,
            columns,
            sharex=True,
            squeeze=False,
            gridspec_kw={"height_ratios": [4.2, 1] * rows},
        )
        for index, (name, scores) in enumerate(models.items()):
            row, column = divmod(index, columns)
            top, below = grid[2 * row, column], grid[2 * row + 1, column]
            draw_reliability(
                top, scores, n_bins, scheme, kind, interval, 0.95, 0, legend=index == 0
            )
            top.set_title(name)
            draw_distribution(below, scores)
            below.set_xlabel("confidence")
            if column == 0:
                top.set_ylabel("accuracy")
            else:
                top.set_yticklabels([])
        for index in range(len(models), rows * columns):
            row, column = divmod(index, columns)
            grid[2 * row, column].set_axis_off()
            grid[2 * row + 1, column].set_axis_off()
        return figure


def confidence_histogram(scores: Confidences, bins: int = 40, title: str = "") -> "Figure":
    """How often each confidence occurs, right and wrong predictions stacked."""
    with plot_style():
        figure = new_figure(4.6, 3.2)
        axes = figure.subplots()
        c, t = scores.confidence.cpu().numpy(), scores.outcome.cpu().numpy()
        edges = np.linspace(0, 1, bins + 1)
        right = np.histogram(c, edges, weights=t)[0] / len(c)
        wrong = np.histogram(c, edges, weights=1 - t)[0] / len(c)
        width = 0.86 / bins
        centre = (edges[1:] + edges[:-1]) / 2
        axes.bar(centre, right, width, color=BLUE, label="right")
        axes.bar(centre, wrong, width, bottom=right, color=CORAL, label="wrong")
        marks = (("accuracy", scores.mean_outcome, "-"), ("mean confidence", c.mean(), (0, (4, 2))))
        for name, value, style in marks:
            axes.axvline(
                value, ymax=0.79, color=INK, linewidth=1.1, linestyle=style,
                label=f"{name} {value:.3f}",
            )  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_ylim(0, float((right + wrong).max()) * 1.27)  # room for the legend
        axes.set_xlabel("confidence")
        axes.set_ylabel("share of examples")
        axes.set_title(title or "Confidences")
        axes.legend(loc="upper left", ncols=2, borderaxespad=0.2, columnspacing=1.4)
        soften(axes, "y")
        return figure


def class_heat_map(
    predictions: Predictions,
    n_bins: int = 15,
    class_names: Sequence[str] | None = None,
    max_classes: int = 24,
    title: str = "",
) -> "Figure":
    """Gap between probability and frequency of each class (rows) and probability bin (columns).

    Classes are ordered by their calibration error, the worst first; above ``max_classes`` only the
    worst are shown. Cells with fewer than five examples stay empty.
    """
    count, mass, hits = (part.cpu() for part in class_width_sums(predictions, n_bins))
    errors = (mass - hits).abs().sum(dim=1) / len(predictions)
    order = errors.argsort(descending=True)[:max_classes]
    gap = torch.where(count >= 5, (mass - hits) / count.clamp(min=1), torch.nan)[order].numpy()
    names = class_names or [str(index) for index in range(predictions.classes)]
    with plot_style():
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.ticker import MaxNLocator

        rows = len(order)
        figure = new_figure(6.4, 1.5 + 0.23 * rows)
        left, right = figure.subplots(1, 2, width_ratios=[4, 1.15], sharey=True)
        bound = max(0.05, float(np.nanmax(np.abs(gap), initial=0.0)))
        colours = LinearSegmentedColormap.from_list("gap", [BLUE, "#f7f5f2", CORAL])
        colours = colours.with_extremes(bad="#eef1f4")
        extent = (0.0, 1.0, rows - 0.5, -0.5)
        image = left.imshow(
            gap, aspect="auto", cmap=colours, vmin=-bound, vmax=bound, extent=extent
        )
        left.set_yticks(range(rows), [names[int(index)] for index in order])
        left.set_xlabel("predicted probability of the class")
        shown = "" if rows == predictions.classes else f", {rows} worst of {predictions.classes}"
        left.set_title(title or f"Classes{shown}")
        for edge in np.linspace(0, 1, n_bins + 1)[1:-1]:
            left.axvline(edge, color="white", linewidth=0.7)
        for edge in range(1, rows):
            left.axhline(edge - 0.5, color="white", linewidth=0.7)
        left.grid(False)
        right.barh(range(rows), errors[order].numpy() * 100, height=0.62, color=MUTED)
        right.set_xlabel("class-wise ECE (%)")
        right.tick_params(labelleft=False)
        soften(right, "x")
        bar = figure.colorbar(
            image,
            ax=[left, right],
            location="bottom",
            shrink=0.55,
            aspect=38,
            ticks=MaxNLocator(5),  # more do not fit beside one another
        )
        bar.set_label("probability − frequency   (red: over-confident)")
        bar.outline.set_visible(False)  # type: ignore[operator]
        return figure


def risk_coverage(models: Mapping[str, Confidences], title: str = "") -> "Figure":
    """Share of errors among the most confident examples against how many are kept.

    The dashed line of each model is the best that any ranking of its predictions could do.
    """
    _require_models(models)
    with plot_style():
        figure = new_figure(4.8, 3.5)
        axes = figure.subplots()
        highest = 0.0
        for colour, (name, scores) in zip(_colours(len(models)), models.items(), strict=True):
            curve = risk_coverage_curve(scores)
            coverage, risk = curve.coverage.cpu().numpy(), curve.risk.cpu().numpy()
            kept = coverage >= min(1.0, 20 / len(scores))  # a handful of examples is noise
            coverage, risk = _thin(coverage[kept], risk[kept])
            area = area_under_risk_coverage(scores)
            axes.plot(coverage, risk, color=colour, label=f"{name}   AURC {area:.4f}")
            ideal = np.linspace(0.001, 1, 400)
            best = np.maximum(0, ideal - scores.mean_outcome) / ideal
            axes.plot(ideal, best, color=colour, linewidth=1, linestyle=(0, (3, 2)), alpha=0.75)
            highest = max(highest, float(risk.max()))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, highest * 1.08 + 1e-3)
        axes.set_xlabel("coverage")
        axes.set_ylabel("risk (share of errors)")
        axes.set_title(title or "Risk and coverage")
        axes.legend(loc="upper left")
        return figure


def measure_intervals(
    values: Mapping[str, tuple[float, float | None, float | None]],
    title: str = "",
    floor: float | None = None,
    percent: bool = True,
) -> "Figure":
    """One measure of several models as points with intervals, on a common axis from 0.

    Args:
        values: Value, lower and upper end (None where there is no interval) of each model.
        floor: Drawn as a line: what a perfect model would show.
    """
    _require_models(values)
    scale = 100 if percent else 1
    with plot_style():
        figure = new_figure(4.8, 0.95 + 0.34 * len(values))
        axes = figure.subplots()
        colours = _colours(len(values))
        for row, (value, low, high) in enumerate(values.values()):
            if low is not None and high is not None:
                axes.plot(
                    [low * scale, high * scale], [row, row], color=colours[row], alpha=0.45, lw=4
                )
            axes.plot(value * scale, row, "o", color=colours[row], markersize=6)
            text = f"{value * scale:.2f}"
            axes.annotate(
                text,
                (max(value, high or 0.0) * scale, row),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        if floor is not None:
            axes.axvline(floor * scale, color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
            axes.annotate(
                "perfect model",
                (floor * scale, 0),
                xycoords=("data", "axes fraction"),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=7.5,
                color=MUTED,
            )
        axes.set_yticks(range(len(values)), list(values), color=INK)
        axes.set_ylim(len(values) - (0.2 if floor is not None else 0.4), -0.6)
        axes.set_xlim(left=min(0.0, *(low or 0.0 for _, low, _ in values.values())) * scale)
        axes.margins(x=0.14)
        axes.set_title(title + (" (%)" if percent else ""))
        soften(axes, "x")
        return figure


def _colours(count: int) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def _thin(x: np.ndarray, y: np.ndarray, points: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """At most about ``points`` of a curve: files stay small."""
    if len(x) <= points:
        return x, y
    kept = np.unique(np.linspace(0, len(x) - 1, points).astype(int))
    return x[kept], y[kept]


def _require_models(models: Mapping[str, object]) -> None:
    if not models:
        raise ConfigError("nothing to draw: pass at least one model")
