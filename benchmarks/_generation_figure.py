"""The result of ``generation_quality.py`` as one figure."""

from pathlib import Path
from typing import Any

import torch
from _generation_images import MEMBERS, Bench

from diffcal.calibration.plot_style import (
    BLUE,
    CORAL,
    INK,
    MUTED,
    PALETTE,
    TEAL,
    figure_to_png,
    new_figure,
    plot_style,
    soften,
)
from diffcal.core.runs import write_atomic

SAMPLERS = {"fast": ("fast, 13 evaluations", BLUE), "edm-18": ("Heun, 35 evaluations", CORAL)}
SHIFT = {"fast": -0.02, "edm-18": 0.02}
"""So that intervals at the same guidance scale lie beside each other."""


def draw_figure(result: dict[str, Any], bench: Bench, path: Path) -> None:
    """Three panels on single classes, two on ladders, and one ladder of each kind."""
    with plot_style():
        figure = new_figure(12.5, 7.6)
        grid = figure.subplots(2, 3)
        _against_guidance(grid[0, 0], result, "fidelity", 100)
        accuracy = 100 * result["real"]["accuracy"][0]
        _level(grid[0, 0], accuracy, "held-out real images")
        grid[0, 0].set_title("Recognised as the asked class, %")
        _against_guidance(grid[0, 1], result, "frechet", 1)
        _level(grid[0, 1], result["real"]["frechet_floor"][0], "real training images (floor)")
        grid[0, 1].set_title("Fréchet distance to held-out images")
        grid[0, 1].set_ylim(bottom=0)
        _near(grid[0, 2], result)
        _curve(grid[1, 0], result)
        _bars(grid[1, 1], result)
        _examples(grid[1, 2], result, bench)
        png = figure_to_png(figure, 110)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(png))


def _against_guidance(axes: Any, result: dict[str, Any], name: str, scale: float) -> None:
    for preset, (label, colour) in SAMPLERS.items():
        rows = [row for row in result["pure"] if row["preset"] == preset]
        places = [row["scale"] + SHIFT[preset] for row in rows]
        values = [row[name] for row in rows]
        _points(axes, places, values, scale, label, colour)
    axes.set_xlabel("guidance scale")
    axes.legend()


def _points(
    axes: Any, places: list[float], values: list[list[float]], scale: float, label: str, colour: str
) -> None:
    middle = [scale * value[0] for value in values]
    below = [max(scale * (value[0] - value[1]), 0.0) for value in values]
    above = [max(scale * (value[2] - value[0]), 0.0) for value in values]
    axes.errorbar(
        places, middle, yerr=[below, above], marker="o", markersize=4, color=colour, label=label
    )


def _level(axes: Any, value: float, label: str) -> None:
    axes.axhline(value, color=MUTED, linestyle="--", linewidth=1.2, label=label)
    axes.legend()


def _near(axes: Any, result: dict[str, Any]) -> None:
    copies = result["copies"]
    for preset, (label, colour) in SAMPLERS.items():
        rows = [row for row in copies["settings"] if row["preset"] == preset]
        places = [row["scale"] + SHIFT[preset] for row in rows]
        _points(axes, places, [row["alike"] for row in rows], 100, label, colour)
    _level(axes, 100 * copies["held_out"]["alike"][0], "held-out real images")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("guidance scale")
    axes.set_title("Alike to a training image, %")


def _curve(axes: Any, result: dict[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1)
    for (name, kind), colour in zip(result["ladders"]["kinds"].items(), PALETTE, strict=False):
        if "bisected" in name:
            continue  # its ratios tell where the passage of each group is
        points = kind["curves"]["classifier/projection"]
        places = [point["lambda"] for point in points]
        axes.plot(places, [point["median"] for point in points], color=colour, label=name)
        if name == "label":
            low, high = ([point[q] for point in points] for q in ("q10", "q90"))
            axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_ylim(-0.4, 1.4)
    axes.set_xlabel("requested λ")
    axes.set_title("λ̂ by projection: median (label: 10–90 %)")
    axes.legend()


def _bars(axes: Any, result: dict[str, Any]) -> None:
    kinds = result["ladders"]["kinds"]
    for shift, name, label, colour in (
        (-0.2, "classifier/projection/between", "images with λ̂ in [0.1, 0.9]", BLUE),
        (0.2, "largest_step", "largest step / whole passage", TEAL),
    ):
        values = [kind["measures"][name] for kind in kinds.values()]
        axes.barh(
            [place + shift for place in range(len(values))],
            [value[0] for value in values],
            height=0.36,
            color=colour,
            label=label,
            xerr=[[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]],
            error_kw={"ecolor": INK, "elinewidth": 0.9},
        )
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.set_ylim(len(kinds) + 0.5, -0.6)
    axes.set_title("Between the classes, and how evenly")
    axes.legend(loc="lower right")
    soften(axes, "x")


def _examples(axes: Any, result: dict[str, Any], bench: Bench) -> None:
    """The ladder of one group in every kind."""
    blocks, names = [], list(result["ladders"]["kinds"])
    group = bench.set_up.groups * 2 // 5
    gap = max(1, bench.denoiser.sample_shape[1] // 8)
    for name in names:
        images = bench.ladder(name).images[group * MEMBERS : (group + 1) * MEMBERS]
        row = torch.cat([*images.unbind(0)], dim=1)
        blocks += [row, torch.full_like(row[:gap], 255)]
    picture = torch.cat(blocks[:-1]).numpy()
    shade = picture[..., 0] if picture.shape[2] == 1 else picture
    axes.imshow(shade, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    height = bench.denoiser.sample_shape[1]
    axes.set_yticks([(height + gap) * i + height / 2 - 0.5 for i in range(len(names))], names)
    axes.set_xticks([])
    first, second = bench.ladder(names[0]).tensors["classes"][group].tolist()
    classes = bench.denoiser.class_names
    axes.set_title(f"One group: {classes[second]} to {classes[first]}")
    for side in axes.spines.values():
        side.set_visible(False)
    soften(axes, "none")
