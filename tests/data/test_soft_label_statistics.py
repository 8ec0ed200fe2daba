"""Running statistics against the same numbers computed at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.data.soft_label_statistics import MAX_RATIOS, SoftLabelStatistics


def draw(count, classes, ratios, seed=0):
    rng = np.random.default_rng(seed)
    soft = rng.dirichlet(np.ones(classes), count).astype(np.float32)
    first = rng.integers(0, classes, count)
    estimates = np.where(rng.random(count) < 0.2, np.nan, rng.normal(0.5, 0.3, count))
    return soft, first, ratios(rng, count), estimates, {"residual": rng.random(count)}


def grid(rng, count):
    return rng.choice(np.linspace(0, 1, 8, dtype=np.float32), count)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_batches_add_up(seed, sizes):
    soft, first, ratios, estimates, quality = draw(sum(sizes), 4, grid, seed)
    running = SoftLabelStatistics(4)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        running.update(
            soft[rows],
            first[rows],
            ratios[rows],
            estimates[rows],
            {"residual": quality["residual"][rows]},
        )
        start += size
    found = running.summary()
    labels = soft.astype(np.float64)
    assert found["images"] == sum(sizes)
    assert found["images_per_class"] == np.bincount(labels.argmax(1), minlength=4).tolist()
    np.testing.assert_allclose(found["mass_per_class"], labels.sum(0), atol=1e-6)
    means = found["means"]
    assert means["residual"] == pytest.approx(quality["residual"].mean(), abs=1e-6)
    assert means["top_probability"] == pytest.approx(labels.max(1).mean(), abs=1e-6)
    two = np.sort(labels, axis=1)[:, -2:].sum(1).mean()
    assert means["top_two_probability"] == pytest.approx(two, abs=1e-6)
    assert [row["ratio"] for row in found["ratios"]] == sorted(
        round(float(value), 6) for value in np.unique(ratios)
    )
    for row, value in zip(found["ratios"], np.unique(ratios), strict=True):
        here = ratios == value
        known = estimates[here & ~np.isnan(estimates)]
        assert (row["images"], row["estimates"]) == (here.sum(), len(known))
        if len(known):
            assert row["estimate_mean"] == pytest.approx(known.mean(), abs=1e-6)
            assert row["estimate_sd"] == pytest.approx(known.std(), abs=1e-5)
        else:
            assert row["estimate_mean"] is None
        own = labels[np.flatnonzero(here), first[here]]
        assert row["first_class_probability"] == pytest.approx(own.mean(), abs=1e-6)


def test_entropy_in_nats_and_nothing_of_nothing():
    running = SoftLabelStatistics(2)
    nothing = np.array([np.nan, np.nan])
    soft = np.array([[0.5, 0.5], [1.0, 0.0]], np.float32)
    running.update(soft, np.array([0, 0]), np.array([0.5, 1.0]), nothing, {"residual": nothing})
    found = running.summary()
    assert found["means"]["entropy"] == pytest.approx(np.log(2) / 2, abs=1e-6)
    assert found["means"]["residual"] is None
    assert [row["entropy"] for row in found["ratios"]] == [pytest.approx(np.log(2), abs=1e-6), 0.0]


def test_continuous_ratios_are_gathered_in_tenths():
    soft, first, ratios, estimates, quality = draw(400, 3, lambda rng, n: rng.random(n))
    ratios[:2] = 1.0, 0.1
    running = SoftLabelStatistics(3)
    for rows in (slice(0, 20), slice(20, 400)):
        running.update(
            soft[rows],
            first[rows],
            ratios[rows],
            estimates[rows],
            {"residual": quality["residual"][rows]},
        )
    found = running.summary()
    assert found["ratio_rows"] == "tenths"
    assert len(found["ratios"]) == 10 < MAX_RATIOS
    counts, _ = np.histogram(ratios, np.linspace(0, 1, 11))
    assert [row["images"] for row in found["ratios"]] == counts.tolist()
