"""Attribution as one picture: queries with the training images behind them and beside them."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from diffcal.calibration.plot_style import (
    INK,
    MUTED,
    figure_to_png,
    new_figure,
    plot_style,
)
from diffcal.errors import ConfigError
from diffcal.workflows.das_report import Explanation

__all__ = ["draw_gallery"]

DPI = 130
SIDE = 0.72  # inches of a picture
CELL = (0.86, 1.2)  # inches of a picture with its words
GAP = 0.35  # between the query, what it owes itself to, and what resembles it
MARGIN, HEADER = 0.15, 0.32


def draw_gallery(items: Sequence[Explanation], *, top: int = 5, nearest: int = 3) -> bytes:
    """PNG of one row for each query: itself, its contributors, the images that resemble it most.

    Under a contributor stand its number, class, share of all attribution and likeness (cosine).

    Args:
        items: From :func:`~diffcal.workflows.das_report.load_explanations`.
        top, nearest: Training images of either kind; fewer where the scores list fewer.

    Raises:
        ConfigError: no queries.
    """
    if not items:
        raise ConfigError("a gallery needs at least one query")
    wide, high = CELL
    top = min(top, max(len(item.top) for item in items))
    nearest = min(nearest, max(len(item.nearest) for item in items))
    starts = {"query": MARGIN, "owes": MARGIN + wide + GAP}
    starts["like"] = starts["owes"] + top * wide + (GAP if nearest else 0)
    width = starts["like"] + nearest * wide + MARGIN
    height = HEADER + len(items) * high + MARGIN
    with plot_style():
        figure = new_figure(width, height)
        figure.set_layout_engine("none")

        def write(x: float, y: float, text: str, **style: object) -> None:
            text = text.replace("$", r"\$")
            figure.text(x / width, 1 - y / height, text, va="top", **style)  # type: ignore[arg-type]

        def place(x: float, y: float, picture: bytes, words: str) -> None:
            axes = figure.add_axes(
                (x / width, 1 - (y + SIDE) / height, SIDE / width, SIDE / height)
            )
            pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
            axes.imshow(pixels, interpolation="nearest")
            axes.set_axis_off()
            write(x, y + SIDE + 0.04, words, fontsize=6, color=MUTED, linespacing=1.15)

        titles = [("query", "Query"), ("owes", "Owes itself to")]
        titles += [("like", "Looks like")] if nearest else []
        for name, title in titles:
            write(starts[name], 0.1, title, fontsize=8.5, color=INK, fontweight="bold")
        for row, item in enumerate(items):
            y = HEADER + row * high
            facts = f"{item.facts['contributors']:.0f} contributors"
            words = "\n".join(filter(None, (str(item.query), item.caption, facts)))
            place(starts["query"], y, item.image, words)
            for name, pictures in (("owes", item.top[:top]), ("like", item.nearest[:nearest])):
                for column, (picture, text) in enumerate(pictures):
                    place(starts[name] + column * wide, y, picture, _lines(text))
        return figure_to_png(figure, DPI)


def _lines(words: str) -> str:
    """Words of an explanation, one part a line; inside a part blanks do not break."""
    return words.replace(" ", "\n").replace("\u00a0", " ")
