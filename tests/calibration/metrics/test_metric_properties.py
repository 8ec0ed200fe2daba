"""Laws that hold for any data: invariances, bounds, and what calibrated data must give."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.calibration.metrics import inputs as inputs_module
from diffcal.calibration.metrics import profile as profile_module
from diffcal.calibration.metrics import smooth as smooth_module
from diffcal.calibration.metrics.binned import (
    calibration_gap,
    expected_calibration_error,
    maximum_calibration_error,
    root_mean_square_calibration_error,
)
from diffcal.calibration.metrics.classwise import (
    classwise_calibration_error,
    group_calibration_errors,
    top_label_calibration_error,
)
from diffcal.calibration.metrics.divergences import soft_label_divergences
from diffcal.calibration.metrics.estimators import (
    debiased_squared_error,
    ece_noise_floor,
    noise_floor_draws,
)
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.kernel import (
    kernel_density_calibration_error,
    ks_calibration_error,
    maximum_mean_calibration_error,
)
from diffcal.calibration.metrics.proper import (
    brier_decomposition,
    log_decomposition,
    temperature_decomposition,
)
from diffcal.calibration.metrics.registry import MEASURES, harmonic_calibration_score
from diffcal.calibration.metrics.selective import (
    area_under_risk_coverage,
    optimal_area_under_risk_coverage,
)
from diffcal.calibration.metrics.smooth import smooth_calibration_error, smooth_error_at
from diffcal.calibration.metrics.summary import evaluate
from diffcal.calibration.metrics.temperature import fit_temperature

ORDERED = {"sweep_ece", "ace", "tace"}  # groups of exactly equal size: ties are in given order


@st.composite
def data(draw, soft=False):
    n, k = draw(st.integers(2, 60)), draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=(n, k)) * draw(st.sampled_from([0.1, 1.0, 4.0]))
    if draw(st.booleans()):
        logits = logits.round(0)  # many ties
    if soft:
        q = rng.dirichlet(np.ones(k), size=n)
        return torch.from_numpy(logits), torch.from_numpy(q)
    return torch.from_numpy(logits), torch.from_numpy(rng.integers(0, k, n))


@st.composite
def either(draw):
    if draw(st.booleans()):
        logits, q = draw(data(soft=True))
        return {"logits": logits, "soft_labels": q}
    logits, y = draw(data())
    return {"logits": logits, "labels": y}


@given(either(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_order_of_examples_changes_nothing(inputs, seed):
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs["logits"])))
    names = [
        name
        for name, entry in MEASURES.items()
        if name not in ORDERED and (entry.needs != "soft labels" or "soft_labels" in inputs)
    ]
    one = evaluate(**inputs, measures=names).values_only
    two = evaluate(**{key: v[order] for key, v in inputs.items()}, measures=names).values_only
    for name in names:
        assert one[name] == pytest.approx(two[name], abs=1e-9, nan_ok=True), name


@given(data())
@settings(deadline=None, max_examples=25)
def test_one_hot_soft_labels_equal_hard_labels(pair):
    logits, y = pair
    hard = evaluate(logits=logits, labels=y, measures="all").values_only
    one_hot = torch.nn.functional.one_hot(y, logits.shape[1]).double()
    soft = evaluate(logits=logits, soft_labels=one_hot, measures="all").values_only
    for name, value in hard.items():
        assert value == pytest.approx(soft[name], abs=1e-9, nan_ok=True), name
    assert soft["kl"] == pytest.approx(hard["nll"], abs=1e-9)
    assert soft["squared_distance"] == pytest.approx(hard["brier"], abs=1e-9)


@given(either())
@settings(deadline=None, max_examples=25)
def test_blocks_and_kind_of_input_change_nothing(inputs):
    one = evaluate(**inputs, measures="all").values_only
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BLOCK_ELEMENTS", "PASS_ELEMENTS", "PIECE"):
            patch.setattr(inputs_module, name, 8)
        for module in (profile_module, smooth_module):
            patch.setattr(module, "PIECE", 8)
        two = evaluate(**inputs, measures="all").values_only
    given_probs = {**inputs, "probs": inputs["logits"].softmax(dim=1)}
    del given_probs["logits"]
    three = evaluate(**given_probs, measures=[name for name in one if name not in ORDERED])
    for name, value in one.items():
        assert value == pytest.approx(two[name], abs=1e-12, nan_ok=True), name
    # rounding may part confidences that were tied, so only measures that vary smoothly
    for name in ("nll", "brier", "accuracy", "confidence", "smece", "mmce", "brier_top", "entropy"):
        assert one[name] == pytest.approx(three[name].value, abs=1e-9), name


@given(either(), st.integers(1, 30))
@settings(deadline=None, max_examples=50)
def test_bounds_and_order_of_errors(inputs, bins):
    p = Predictions(**inputs)
    residual = float((p.confidence - p.outcome).abs().mean())
    gap, ece = abs(calibration_gap(p)), expected_calibration_error(p, bins)
    tiny = 1e-12
    assert expected_calibration_error(p, 1) == pytest.approx(gap, abs=1e-12)
    assert gap - tiny <= ece <= residual + tiny
    assert expected_calibration_error(p, 5) <= expected_calibration_error(p, 25) + tiny
    assert ece <= root_mean_square_calibration_error(p, bins) + tiny
    assert ece <= maximum_calibration_error(p, bins) + tiny
    assert gap - tiny <= ks_calibration_error(p) <= residual + tiny
    assert maximum_mean_calibration_error(p) <= residual + tiny
    assert smooth_calibration_error(p) <= residual + 1e-6
    best = optimal_area_under_risk_coverage(p)
    if not p.is_soft:
        assert best - tiny <= area_under_risk_coverage(p)
    for name, entry in evaluate(p, measures="all").items():
        low, high = MEASURES[name].bounds
        if not math.isnan(entry.value):
            # linear binning of kernels and the value at a grid's end may exceed a bound a little
            slack = 0.05 if name == "kde_ce" else 1e-9
            assert low - slack <= entry.value <= high + slack, name


@given(either(), st.floats(0.2, 8.0))
@settings(deadline=None, max_examples=25)
def test_temperature_keeps_decisions(inputs, temperature):
    p = Predictions(**inputs)
    scaled = p.scaled(temperature)
    torch.testing.assert_close(scaled.predicted, p.predicted)
    assert scaled.mean_outcome == p.mean_outcome


@given(either(), st.integers(1, 20))
@settings(deadline=None, max_examples=50)
def test_decompositions_add_up(inputs, bins):
    p = Predictions(**inputs)
    b = brier_decomposition(p, bins)
    total = b.reliability - b.resolution + b.uncertainty
    total += b.within_bin_variance - b.within_bin_covariance
    assert total == pytest.approx(b.brier, abs=1e-12)
    d = log_decomposition(p, bins)
    if math.isfinite(d.log_loss):
        parts = d.reliability - d.resolution + d.uncertainty + d.within_bin
        assert parts == pytest.approx(d.log_loss, abs=1e-10)


@given(data())
@settings(deadline=None, max_examples=25)
def test_relabelling_classes_keeps_class_wise_error(pair):
    logits, y = pair
    order = torch.arange(logits.shape[1]).flip(0)
    one = classwise_calibration_error(Predictions(logits=logits, labels=y))
    moved = Predictions(logits=logits[:, order], labels=len(order) - 1 - y)
    assert one == pytest.approx(classwise_calibration_error(moved), abs=1e-12)


def calibrated(n=20_000, k=10, sharpness=2.0, factor=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, generator=generator, dtype=torch.float64) * sharpness
    y = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return Predictions(logits=logits * factor, labels=y)


def test_calibrated_data_score_zero_within_sampling_error():
    p = calibrated()
    error = 1 / math.sqrt(len(p))
    assert abs(calibration_gap(p)) < 2 * error
    draws = noise_floor_draws(p, n_resamples=400)
    # the ECE is an ordinary draw of the ECE of a perfect model
    assert draws.min() < expected_calibration_error(p) < draws.quantile(0.999)
    assert abs(debiased_squared_error(p)) < 3e-4
    assert ks_calibration_error(p) < 2.5 * error  # supremum of a bridge-like walk
    assert maximum_mean_calibration_error(p) < 3 * error
    assert kernel_density_calibration_error(p) < 0.02
    # smECE itself is biased upward to about the bandwidth at which noise averages out
    assert smooth_calibration_error(p) < 0.03


def test_noise_floor_agrees_with_redrawn_labels():
    p = calibrated(n=3000)
    floors = []
    generator = torch.Generator().manual_seed(5)
    for _ in range(200):
        hits = torch.rand(3000, generator=generator, dtype=torch.float64) < p.confidence
        floors.append(expected_calibration_error(Confidences(p.confidence, hits)))
    redrawn = torch.tensor(floors)
    spread = 4 * float(redrawn.std()) / math.sqrt(200)
    assert ece_noise_floor(p) == pytest.approx(float(redrawn.mean()), abs=2 * spread)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_over_and_under_confident_data_give_their_temperature_back(factor):
    p = calibrated(factor=factor)
    fit = fit_temperature(p)
    assert fit.temperature == pytest.approx(factor, rel=0.03)
    split = temperature_decomposition(p)
    assert split.calibration >= 0
    assert split.calibration + split.refinement == pytest.approx(split.nll, abs=1e-12)


def test_soft_labels_equal_to_predictions_score_exactly_zero():
    p = calibrated(n=500)
    exact = Predictions(logits=p.scores, soft_labels=p.probs())
    assert expected_calibration_error(exact) < 1e-15
    assert smooth_calibration_error(exact) < 1e-14
    assert float(exact.brier.max()) < 1e-28
    distances = soft_label_divergences(exact)
    for name in ("kl", "reverse_kl", "js", "total_variation", "hellinger"):
        assert abs(distances[name]) < 1e-9
    assert distances["top1_agreement"] == 1


def test_constant_networks_are_not_an_error():
    p = Predictions(logits=torch.zeros(20, 10), labels=torch.arange(20) % 10)
    fit = fit_temperature(p)
    assert fit.note == "bound"
    assert expected_calibration_error(p) < 1e-15
    assert ks_calibration_error(p) < 1e-15
    assert math.isnan(kernel_density_calibration_error(p))


def test_smooth_error_against_direct_summation():
    generator = torch.Generator().manual_seed(3)
    c = torch.rand(40, generator=generator, dtype=torch.float64)
    c[:4] = torch.tensor([0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    t = (torch.rand(40, generator=generator) < 0.5).double()
    sigma, grid = 0.07, torch.linspace(0, 1, 20_001, dtype=torch.float64)
    density = torch.zeros_like(grid)
    for shift in range(-2, 3):
        for image in (c, -c):
            z = (grid[:, None] - image[None] - 2 * shift) / sigma
            density += (torch.exp(-(z**2) / 2) / (sigma * math.sqrt(2 * math.pi))) @ (c - t) / 40
    exact = float(torch.trapezoid(density.abs(), grid))
    assert smooth_error_at(Confidences(c, t), sigma) == pytest.approx(exact, abs=1e-6)


def test_exact_ones_keep_their_weight_in_the_smooth_error():
    # half wrong at confidence 1, half right at 0.5: ECE-like mass 0.25 + 0.5
    c = torch.tensor([1.0] * 50 + [0.5] * 50, dtype=torch.float64)
    t = torch.tensor([0.0] * 50 + [1.0] * 50, dtype=torch.float64)
    assert smooth_error_at(Confidences(c, t), 1e-2) == pytest.approx(0.75, abs=1e-6)


def test_mmce_against_the_double_sum():
    p = calibrated(n=200)
    c, r = p.confidence, p.confidence - p.outcome
    double = (r[:, None] * r[None] * torch.exp(-2.5 * (c[:, None] - c[None]).abs())).sum()
    expected = math.sqrt(float(double)) / 200
    assert maximum_mean_calibration_error(p) == pytest.approx(expected, abs=1e-12)


def test_groups_and_classes_within_predictions():
    p = calibrated(n=2000, k=3)
    table = group_calibration_errors(p, "predicted")
    weighted = sum(row["count"] * row["ece"] for row in table.values()) / 2000
    assert top_label_calibration_error(p) == pytest.approx(weighted, abs=1e-12)
    assert sum(row["count"] for row in group_calibration_errors(p, "label").values()) == 2000
    halves = group_calibration_errors(p, torch.arange(2000) % 2)
    assert set(halves) == {0, 1}


def test_harmonic_score_of_perfection():
    assert harmonic_calibration_score(1.0, 0.0) == 1.0
    assert harmonic_calibration_score(0.0, 1.0) == 0.0


def test_kernel_density_error_does_not_count_gaps():
    """A few confidences close together: narrow kernels, with nothing between them to integrate."""
    confidence = torch.tensor([0.1757, 0.1780, 0.1783, 0.1906, 0.2131], dtype=torch.float64)
    outcome = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    scores = Confidences(confidence, outcome)
    plain = kernel_density_calibration_error(scores)
    finer = kernel_density_calibration_error(scores, 2**17)
    assert plain == pytest.approx(finer, rel=1e-3)
    assert plain <= 1
    assert kernel_density_calibration_error(scores, quirk=True) > plain
