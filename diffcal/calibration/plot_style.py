"""The common look of our figures, and their bytes."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "CORAL",
    "INK",
    "MUTED",
    "PALE",
    "PALETTE",
    "TEAL",
    "figure_to_png",
    "figure_to_svg",
    "new_figure",
    "plot_style",
    "soften",
]

BLUE = "#2f6db3"
CORAL = "#e4694a"
TEAL = "#1f9d84"
INK = "#1d2733"
MUTED = "#66727f"
PALE = "#e3e8ee"
PALETTE = (BLUE, "#d9822b", TEAL, "#a8467f", "#6c63c7", "#7d8b2f", "#4aa3c7", "#8a5a44")

NOTEBOOK_DPI = 80

OTHER_SCRIPTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "PingFang SC", "Heiti SC"),
    *("Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Noto Sans CJK KR", "Apple SD Gothic Neo", "Malgun Gothic", "NanumGothic"),
    *("Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Nirmala UI"),
    *("Noto Sans Thai", "Leelawadee UI", "Noto Sans Ethiopic", "Arial Unicode MS", "Unifont"),
)
"""Usual fonts of Linux, macOS and Windows for scripts that DejaVu Sans, our own, does not have."""

_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#aab4bf",
    "axes.linewidth": 0.8,
    "axes.facecolor": "white",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": PALE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "diffcal",  # the same figure gives the same bytes
}


@contextmanager
def plot_style() -> Iterator[None]:
    """Matplotlib settings of our figures, for the duration of a ``with``."""
    import matplotlib

    def is_news(record: logging.LogRecord) -> bool:
        # Many fonts of other scripts have one weight, and a title in it is no news.
        return "find font weight" not in str(record.msg)

    log = logging.getLogger("matplotlib.font_manager")
    log.addFilter(is_news)
    try:
        style = _STYLE | {"font.family": _families()}
        with matplotlib.rc_context(style):  # type: ignore[arg-type]
            yield
    finally:
        log.removeFilter(is_news)


def _families() -> list[str]:
    """Where a glyph is looked for: our font, then the installed ones of other scripts.

    Only installed ones, since Matplotlib warns of every family that it does not find.
    """
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["sans-serif", *(name for name in OTHER_SCRIPTS if name in installed)]


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure in inches that needs no window system and no pyplot state, and that a notebook
    shows as it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Drawing(Figure):
        def _repr_png_(self) -> bytes:
            return figure_to_png(self, NOTEBOOK_DPI)

    figure = Drawing(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def soften(axes: "Axes", grid: str = "both") -> None:
    """Keep the grid of one axis only, or none."""
    axes.grid(False)
    if grid != "none":
        axes.grid(True, axis=grid)  # type: ignore[arg-type]


def figure_to_png(figure: "Figure", dpi: int = 160) -> bytes:
    """PNG bytes of a figure."""
    buffer = io.BytesIO()
    with plot_style():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def figure_to_svg(figure: "Figure") -> bytes:
    """SVG bytes of a figure, the same for the same figure (no date, fixed ids)."""
    buffer = io.BytesIO()
    with plot_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
