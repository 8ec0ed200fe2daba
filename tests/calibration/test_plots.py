"""Figures: what they draw for ordinary, soft, tiny and extreme data; same data, same bytes."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from diffcal.calibration import plots
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.reliability import (
    reliability_curve,
    smooth_reliability_curve,
    wilson_interval,
)
from diffcal.calibration.plot_style import figure_to_png, figure_to_svg
from diffcal.errors import ConfigError


def test_a_notebook_shows_a_figure_without_pyplot():
    figure = plots.confidence_histogram(model())
    picture = figure._repr_png_()
    assert picture.startswith(b"\x89PNG")
    width = int.from_bytes(picture[16:20], "big")
    assert width == round(80 * figure.get_size_inches()[0])


def model(n=800, k=4, factor=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, k, generator=generator) * 1.5
    y = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    return Predictions(logits=z * factor, labels=y)


def soft():
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    return Predictions(logits=z * 2, soft_labels=z.softmax(1))


@pytest.mark.parametrize("kind", ["binned", "smooth"])
@pytest.mark.parametrize("scheme", ["width", "mass"])
@pytest.mark.parametrize("interval", ["wilson", "bootstrap", "none"])
def test_reliability_diagram_bars_are_the_curve(kind, scheme, interval):
    p = model()
    figure = plots.reliability_diagram(p, 10, scheme, kind, interval)
    axes = figure.axes[0]
    if kind == "binned":
        curve = reliability_curve(p, 10, scheme)
        accuracy = curve.accuracy[curve.count > 0].numpy()
        tops = np.array([bar.get_y() + bar.get_height() for bar in axes.patches])
        for value in accuracy:  # blue up to the accuracy, or teal on top of blue
            assert np.abs(tops - value).min() < 1e-9
    assert figure_to_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "p",
    [
        soft(),
        model(n=3),
        Predictions(logits=torch.zeros(9, 3), labels=torch.arange(9) % 3),
        Predictions(logits=torch.eye(3) * 900, labels=torch.tensor([0, 1, 2])),
        Predictions(logits=torch.eye(3) * 900, labels=torch.tensor([1, 2, 0])),
    ],
    ids=["soft", "three", "constant", "all right", "all wrong"],
)
def test_extreme_data_are_drawn(p):
    for figure in (
        plots.reliability_diagram(p, kind="binned"),
        plots.reliability_diagram(p, kind="binned", scheme="mass"),
        plots.reliability_diagram(p, kind="smooth"),
        plots.confidence_histogram(p),
        plots.class_heat_map(p),
        plots.risk_coverage({"a": p}),
    ):
        assert b"<svg" in figure_to_svg(figure)


def test_comparisons_draw_every_model():
    models = {"before": model(), "after": model(factor=1.0), "third": soft()}
    figure = plots.reliability_comparison(models)
    titles = {axes.get_title(loc="left") for axes in figure.axes} - {""}
    assert titles == set(models)
    risk = plots.risk_coverage(models)
    labels = [text.get_text() for text in risk.axes[0].get_legend().get_texts()]
    assert [label.split()[0] for label in labels] == list(models)
    points = plots.measure_intervals({"a": (0.1, 0.05, 0.12), "b": (0.2, None, None)}, "ECE", 0.01)
    assert [label.get_text() for label in points.axes[0].get_yticklabels()] == ["a", "b"]
    five = plots.reliability_comparison({str(index): model(n=50) for index in range(5)})
    assert b"<svg" in figure_to_svg(five)


def test_heat_map_orders_classes_by_error_and_names_them():
    figure = plots.class_heat_map(model(), class_names=["a", "b", "c", "d"], max_classes=2)
    assert len(figure.axes[0].get_yticklabels()) == 2
    assert {text.get_text() for text in figure.axes[0].get_yticklabels()} < set("abcd")


def test_same_figure_same_bytes_and_no_pyplot_state():
    import matplotlib

    before = dict(matplotlib.rcParams)
    one, two = (figure_to_svg(plots.reliability_diagram(model())) for _ in range(2))
    assert one == two
    assert dict(matplotlib.rcParams) == before


def test_names_in_another_script_are_drawn_with_an_installed_font(monkeypatch, caplog):
    from matplotlib.font_manager import FontEntry, fontManager, get_font

    def draw(names):
        return figure_to_png(plots.reliability_comparison({name: model(n=50) for name in names}))

    ours = [font for font in fontManager.ttflist if font.name == "DejaVu Sans"]
    # A font that comes with Matplotlib, under the name of one that may not be installed here.
    (path,) = {
        f.fname
        for f in fontManager.ttflist
        if f.name == "STIXNonUnicode" and f.weight == 400 and f.style == "normal"
    }
    other = FontEntry(fname=path, name="Unifont", style="normal", weight=400, size="scalable")
    missing = sorted(set(get_font(path).get_charmap()) - set(get_font(ours[0].fname).get_charmap()))
    names = [chr(missing[0]), chr(missing[1])]

    monkeypatch.setattr(fontManager, "ttflist", ours)
    with pytest.warns(UserWarning, match="missing from"):
        boxes = draw(names)
    plain = draw("ab")
    monkeypatch.setattr(fontManager, "ttflist", [*ours, other])
    assert draw(names) != boxes
    assert draw("ab") == plain
    assert not caplog.records  # names stand in bold titles, which this font does not have


def test_nothing_to_draw_is_refused():
    with pytest.raises(ConfigError, match="at least one model"):
        plots.risk_coverage({})


def test_wilson_interval_of_known_proportions():
    # 8 of 10: the textbook interval (0.490, 0.943)
    low, high = wilson_interval(torch.tensor([8.0]).double(), torch.tensor([10.0]).double())
    assert float(low) == pytest.approx(0.4902, abs=1e-4)
    assert float(high) == pytest.approx(0.9433, abs=1e-4)
    low, high = wilson_interval(torch.zeros(1).double(), torch.zeros(1).double())
    assert bool(low.isnan().all())
    assert bool(high.isnan().all())


def test_smooth_curve_of_a_known_accuracy():
    generator = torch.Generator().manual_seed(0)
    c = torch.rand(200_000, generator=generator, dtype=torch.float64)
    hits = torch.rand(200_000, generator=generator, dtype=torch.float64) < c**2
    curve = smooth_reliability_curve(Confidences(c, hits), sigma=0.02, n_resamples=50)
    inner = (curve.grid > 0.1) & (curve.grid < 0.9)
    expected = curve.grid[inner] ** 2
    torch.testing.assert_close(curve.accuracy[inner], expected, rtol=0, atol=0.02)
    assert bool((curve.low[inner] <= curve.accuracy[inner] + 0.01).all())
    total = torch.trapezoid(curve.density, curve.grid)
    assert float(total) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("gap", [0.05, 0.07, 0.09, 0.111, 0.2, 0.45])
def test_the_numbers_of_the_heat_map_s_scale_stand_apart(gap):
    """Between two of them at least about a letter is free."""
    first = torch.full((40,), 1 - gap, dtype=torch.float64)
    probs = torch.stack([first, 1 - first], dim=1)
    figure = plots.class_heat_map(Predictions(probs=probs, labels=torch.zeros(40).long()))
    figure.canvas.draw()
    scale = figure.axes[-1]
    boxes = [label.get_window_extent() for label in scale.get_xticklabels() if label.get_text()]
    boxes = sorted((box.x0, box.x1) for box in boxes)
    assert len(boxes) >= 3
    letter = (boxes[-1][1] - boxes[-1][0]) / 5
    assert all(one[1] + letter < other[0] for one, other in pairwise(boxes))
