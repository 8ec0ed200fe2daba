"""Pictures of a soft-labelled data set: ladders, ratios, class balance. PNG bytes."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray
from PIL import Image

from diffcal.calibration.plot_style import (
    BLUE,
    CORAL,
    INK,
    MUTED,
    PALE,
    PALETTE,
    figure_to_png,
    new_figure,
    plot_style,
    soften,
)
from diffcal.data.images import decode_image
from diffcal.data.ladders import Ladder, LadderStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_class_balance", "draw_ladder", "draw_ratios"]

DPI = 160
IMAGE = 160  # pixels; a multiple of the usual sides, so that every pixel becomes an equal square
CELL = 1.18  # inches
MARGIN = 0.22
HEADER = 0.44
LINE = 0.145
FOOTER = 0.55  # and a line for each further entry of the soft label
OTHER = "#c3ccd6"
NAMED_CLASSES = 40
"""Classes up to which the balance names each."""


def draw_ladder(ladder: Ladder) -> bytes:
    """The images in a row, enlarged without smoothing, with ratios and soft label under each.

    Under an image stand λ (requested), λ̂ (re-estimated), a bar of the soft label (first class blue,
    second orange, classes that were not mixed grey) and its largest entries.
    """
    columns = len(ladder.steps)
    width = 2 * MARGIN + columns * CELL
    lines = max(len(step.top) for step in ladder.steps)
    height = HEADER + IMAGE / DPI + FOOTER + LINE * (lines - 1)
    with plot_style():
        figure = new_figure(width, height)
        figure.set_layout_engine("none")
        figure.set_dpi(DPI)
        colours = [BLUE, CORAL, *PALETTE[2:]]
        _draw_header(figure, ladder, colours, width, height)
        for column, step in enumerate(ladder.steps):
            left = MARGIN + column * CELL + (CELL - IMAGE / DPI) / 2
            _draw_step(figure, ladder, step, colours, left, width, height)
        return figure_to_png(figure, dpi=DPI)


def draw_ratios(statistics: dict[str, Any], bisected: bool = False) -> bytes:
    """Re-estimated against requested ratio (mean, one standard deviation), and the label it led to.

    Args:
        statistics: Summary of :class:`~diffcal.data.soft_label_statistics.SoftLabelStatistics` with at
            least one re-estimated ratio.
        bisected: Every group was asked for the ratios of its own passage. The points then hold
            different groups and are not joined.
    """
    line = "none" if bisected else "-"
    rows = [row for row in statistics["ratios"] if row["estimates"]]
    ratio = np.array([row["ratio"] for row in rows])
    mean = np.array([row["estimate_mean"] for row in rows])
    spread = np.array([row["estimate_sd"] for row in rows])
    label = np.array([row["first_class_probability"] for row in rows])
    entropy = np.array([row["entropy"] for row in rows])
    with plot_style():
        figure = new_figure(7.6, 3.1)
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        if bisected:
            left.errorbar(ratio, mean, spread, color=BLUE, alpha=0.3, linestyle="none")
        else:
            low, high = mean - spread, mean + spread
            left.fill_between(ratio, low, high, color=BLUE, alpha=0.15, linewidth=0)
        left.plot(ratio, mean, color=BLUE, marker="o", markersize=4, linestyle=line)
        left.set(xlabel="requested λ", ylabel=r"re-estimated $\hat\lambda$", xlim=(-0.03, 1.03))
        left.set_title("What the images show")
        right.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for values, colour, marker, name in (
            (label, CORAL, "o", "label of first class"),
            (entropy, PALETTE[2], "s", "entropy (nats)"),
        ):
            right.plot(
                ratio, values, color=colour, marker=marker, markersize=4, linestyle=line, label=name
            )
        right.set(xlabel="requested λ", xlim=(-0.03, 1.03), ylim=(-0.03, None))
        right.set_title("What the labels say")
        right.legend(loc="upper left")
        return figure_to_png(figure, dpi=DPI)


def draw_class_balance(statistics: dict[str, Any], class_names: Sequence[str]) -> bytes:
    """Label mass of each class (sum of soft labels) beside the images whose likeliest class it is."""
    mass = np.array(statistics["mass_per_class"])
    images = np.array(statistics["images_per_class"])
    many = len(class_names) > NAMED_CLASSES
    if many:
        order = np.argsort(-mass, kind="stable")
        mass, images = mass[order], images[order]
    place = np.arange(len(mass))
    with plot_style():
        figure = new_figure(max(5.0, min(7.6, 1.6 + 0.46 * len(mass))), 2.7)
        axes = figure.subplots()
        if many:
            axes.fill_between(place, mass, color=BLUE, alpha=0.25, linewidth=0, step="mid")
            axes.plot(
                place, images, ".", color=CORAL, markersize=3, label="images (likeliest class)"
            )
            axes.plot(place, mass, color=BLUE, drawstyle="steps-mid", label="label mass")
            axes.set_xlabel(f"{len(mass)} classes, by label mass")
        else:
            axes.bar(place - 0.2, mass, 0.38, color=BLUE, label="label mass")
            axes.bar(place + 0.2, images, 0.38, color=CORAL, label="images (likeliest class)")
            long = max(map(len, class_names)) > 4 and len(mass) > 6
            axes.set_xticks(
                place,
                [_short(name, 14) for name in class_names],
                rotation=35 if long else 0,
                ha="right" if long else "center",
                rotation_mode="anchor",
            )
        soften(axes, "y")
        axes.set_ylim(0, 1.22 * max(float(mass.max()), float(images.max())))
        axes.legend(loc="upper right", ncols=2)
        return figure_to_png(figure, dpi=DPI)


def _draw_header(
    figure: "Figure", ladder: Ladder, colours: list[str], width: float, height: float
) -> None:
    y = 1 - 0.5 * HEADER / height
    if len(ladder.names) == 2:
        first, second = (_short(name, 24) for name in ladder.names)
        inset = MARGIN + (CELL - IMAGE / DPI) / 2
        common: dict[str, Any] = {"va": "center", "fontsize": 11, "fontweight": "bold"}
        figure.text(inset / width, y, first, color=colours[0], ha="left", **common)
        figure.text(1 - inset / width, y, second, color=colours[1], ha="right", **common)
        taken = 0.11 * np.array([len(first), len(second)]) + inset + 0.15
        start, end = taken[0] / width, 1 - taken[1] / width
        if end > start:
            _draw_fade(figure, start, end, y, colours)
    else:
        x = (MARGIN + (CELL - IMAGE / DPI) / 2) / width
        for name, colour in zip(ladder.names, colours, strict=False):
            text = _short(name, 20)
            figure.text(
                x, y, text, color=colour, ha="left", va="center", fontsize=11, fontweight="bold"
            )
            x += (0.11 * len(text) + 0.2) / width


def _draw_fade(figure: "Figure", start: float, end: float, y: float, colours: list[str]) -> None:
    """A thin line that turns from the first colour into the second."""
    from matplotlib.colors import LinearSegmentedColormap

    axes = figure.add_axes((start, y - 0.004, end - start, 0.008))
    fade = LinearSegmentedColormap.from_list("fade", [colours[0], PALE, colours[1]])
    axes.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=fade)
    axes.set_axis_off()


def _draw_step(
    figure: "Figure",
    ladder: Ladder,
    step: LadderStep,
    colours: list[str],
    left: float,
    width: float,
    height: float,
) -> None:
    from matplotlib.patches import Rectangle

    pixels = _enlarged(step.image)
    side = IMAGE / DPI
    bottom = height - HEADER - side
    figure.figimage(  # raw pixels: nothing is resampled
        pixels,
        round(left * DPI) + (IMAGE - pixels.shape[1]) // 2,
        round(bottom * DPI) + (IMAGE - pixels.shape[0]) // 2,
        origin="upper",
    )

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text((left + x) / width, (bottom - y) / height, text, va="baseline", **style)

    small: dict[str, Any] = {"fontsize": 7.4}
    if len(ladder.classes) == 2:
        write(0.0, 0.17, f"λ {step.weights[0]:.2f}", color=MUTED, ha="left", **small)
        if step.lambda_hat is not None:
            text = rf"$\hat\lambda$ {step.lambda_hat:.2f}".replace("-", "−")
            write(side, 0.17, text, color=INK, ha="right", **small)
    else:
        text = " · ".join(f"{weight:.2f}" for weight in step.weights)
        write(side / 2, 0.17, text, color=MUTED, ha="center", **small)
    shares = [step.soft_label[index] for index in ladder.classes]
    shares.append(max(0.0, 1 - sum(shares)))
    fills = [*colours[: len(ladder.classes)], OTHER]
    order = range(len(shares))
    if len(ladder.classes) == 2:
        order = (0, 2, 1)  # what is neither stands between the two
    x = left
    for index in order:
        figure.add_artist(
            Rectangle(
                (x / width, (bottom - 0.3) / height),
                shares[index] * side / width,
                0.075 / height,
                facecolor=fills[index],
                linewidth=0,
                transform=figure.transFigure,
            )
        )
        x += shares[index] * side
    for line, (name, probability) in enumerate(step.top):
        y = 0.45 + LINE * line
        weight = "bold" if line == 0 else "normal"
        colour = INK if line == 0 else MUTED
        write(0.0, y, _short(name, 11), color=colour, ha="left", fontweight=weight, **small)
        write(side, y, f"{probability:.2f}", color=colour, ha="right", fontweight=weight, **small)


def _enlarged(data: bytes) -> ndarray:
    """RGB pixels of at most :data:`IMAGE` on a side, each pixel a square, larger images averaged."""
    pixels = decode_image(data, "preview")
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    longest = max(pixels.shape[:2])
    if longest <= IMAGE:
        scale = IMAGE // longest
        return pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
        small.thumbnail((IMAGE, IMAGE), Image.Resampling.LANCZOS)
        return np.array(small)


def _short(text: str, length: int) -> str:
    text = text.replace("$", r"\$")
    return text if len(text) <= length else text[: length - 1] + "…"
