"""Bootstrap: the vectorised resamples against plain resampling, and what the intervals cover."""

import math

import pytest
import torch

from diffcal.calibration.metrics import intervals
from diffcal.calibration.metrics.binned import expected_calibration_error
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.intervals import (
    interval_from_draws,
    resample_classwise,
    resample_means,
    resample_predictions,
    resample_profile,
)
from diffcal.calibration.metrics.registry import MEASURES
from diffcal.calibration.metrics.summary import confidence_interval, evaluate
from diffcal.errors import ConfigError


def model(n=600, k=4, factor=1.6, seed=0, soft=False):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, generator=generator, dtype=torch.float64) * 1.5
    if soft:
        return Predictions(logits=logits * factor, soft_labels=logits.softmax(1))
    y = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return Predictions(logits=logits * factor, labels=y)


VECTORISED = [
    name
    for name, entry in MEASURES.items()
    if entry.of_profile or entry.of_sums or entry.of_rows or name == "cw_ece"
]


@pytest.mark.parametrize("soft", [False, True])
def test_vectorised_resamples_have_the_distribution_of_plain_ones(soft):
    p, r = model(soft=soft), 400
    fast = evaluate(p, measures=VECTORISED, n_resamples=r, method="percentile", level=0.8)
    # vectorised resamples keep the bins of the data
    names = [n for n in VECTORISED if n != "ece_mass" and MEASURES[n].scheme != "mass"]
    drawn = {name: [] for name in names}

    def measure_all(resample):  # every measure of the same resample, which shares its work
        for name in names:
            drawn[name].append(float(MEASURES[name].compute(resample)))
        return 0.0

    resample_predictions(p, measure_all, 120, seed=1)
    for name in names:
        plain = torch.tensor(drawn[name], dtype=torch.float64)
        low, high = plain.quantile(0.1), plain.quantile(0.9)
        spread = float(plain.std())
        # quantiles of 120 draws: standard error about 0.16 standard deviations
        # interval ends are widened to hold the value, so only compare where that did not bind
        entry = fast[name]
        assert min(float(low), entry.value) == pytest.approx(entry.low, abs=0.7 * spread + 1e-3), (
            name
        )
        assert max(float(high), entry.value) == pytest.approx(
            entry.high, abs=0.7 * spread + 1e-3
        ), name


def test_joined_atoms_agree_with_single_examples(monkeypatch):
    p = model(n=9000)
    names = ["accuracy", "ece", "mce", "smece", "ks", "mmce", "aurc", "auroc", "nll", "brier"]
    joined = evaluate(p, measures=names, n_resamples=400)
    monkeypatch.setattr(intervals, "EXACT_ROWS", 10_000)
    single = evaluate(model(n=9000), measures=names, n_resamples=400)
    for name in names:
        a, b = joined[name], single[name]
        width = b.high - b.low
        assert a.low == pytest.approx(b.low, abs=0.25 * width), name
        assert a.high == pytest.approx(b.high, abs=0.25 * width), name


def test_accuracy_interval_is_that_of_a_proportion():
    hits = torch.zeros(2000, dtype=torch.float64)
    hits[:500] = 1
    scores = Confidences(torch.full((2000,), 0.3, dtype=torch.float64), hits)
    interval = confidence_interval("accuracy", scores, n_resamples=2000)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 2000)
    assert interval.low == pytest.approx(0.25 - half, abs=0.1 * half)
    assert interval.high == pytest.approx(0.25 + half, abs=0.1 * half)


def coverage(factor, truth, methods=("basic", "percentile"), seeds=40):
    covered = dict.fromkeys(methods, 0)
    for seed in range(seeds):
        p = model(n=500, factor=factor, seed=seed)
        for method in methods:
            interval = confidence_interval("ece", p, n_resamples=200, method=method)
            covered[method] += interval.low <= truth <= interval.high
    return {method: count / seeds for method, count in covered.items()}


def test_basic_intervals_of_a_small_ece_cover_it_far_more_often_than_percentiles():
    # in 200 repetitions: calibrated 0.51 against 0.00, confidences times 1.3 0.89 against 0.68;
    # 40 repetitions have a standard error of at most 0.08
    calibrated = coverage(1.0, 0.0)
    assert 0.25 < calibrated["basic"] < 0.75
    assert calibrated["percentile"] < 0.05
    logits = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(9)).double() * 1.5
    confidence, chosen = (logits * 1.3).softmax(1).max(dim=1)
    right = logits.softmax(1).gather(1, chosen[:, None])[:, 0]
    truth = expected_calibration_error(Confidences(confidence, right))
    sharp = coverage(1.3, truth)
    assert sharp["basic"] > 0.75
    assert sharp["percentile"] < sharp["basic"]


def test_same_seed_same_interval_and_other_seed_another():
    p = model()
    one, two, other = (confidence_interval("ece", p, n_resamples=50, seed=s) for s in (3, 3, 4))
    assert one == two
    assert one.low != other.low


def test_any_function_can_be_resampled():
    p = model(n=100)
    interval = confidence_interval(expected_calibration_error, p, n_resamples=20)
    assert interval.low <= interval.value <= interval.high
    slow = confidence_interval("sweep_ece", p, n_resamples=20)
    assert slow.low <= slow.value <= slow.high


def test_resampled_ties_stay_blocks():
    c = torch.tensor([0.5] * 10 + [0.7] * 10, dtype=torch.float64)
    t = (torch.arange(20) % 2).double()
    profile = resample_profile(Confidences(c, t), 7, seed=0)
    assert profile.confidence.tolist() == [0.5, 0.7]
    assert profile.count.shape == (7, 2)
    torch.testing.assert_close(profile.count.sum(dim=1), torch.full((7,), 20.0).double())


def test_resampled_means_and_classes_centre_on_the_value():
    p = model(n=3000)
    means = resample_means(p.log_score, 400, seed=0)
    error = float(p.log_score.std()) / math.sqrt(3000)
    assert float(means.mean()) == pytest.approx(float(p.log_score.mean()), abs=0.25 * error)
    assert float(means.std()) == pytest.approx(error, rel=0.15)
    assert bool(resample_means(torch.tensor([1.0, math.inf]).double(), 5, 0).isnan().all())
    draws = resample_classwise(p, 15, 50, seed=0)
    assert float(draws.min()) > 0


def test_bad_settings_are_refused():
    draws = torch.rand(10, dtype=torch.float64)
    with pytest.raises(ConfigError, match="level"):
        interval_from_draws(0.5, draws, level=1.0)
    with pytest.raises(ConfigError, match="n_resamples"):
        confidence_interval("ece", model(50), n_resamples=0)
    nothing = interval_from_draws(math.nan, draws)
    assert math.isnan(nothing.low)


def test_a_report_reads_as_a_table():
    report = evaluate(model(n=300), measures=["accuracy", "ece"], n_resamples=50)
    lines = repr(report).splitlines()
    assert [line.split()[0] for line in lines] == ["accuracy", "ece"]
    ece = report["ece"]
    assert lines[1].split()[1:] == [f"{ece.value:.4f}", f"[{ece.low:.4f},", f"{ece.high:.4f}]"]
    assert "[" not in repr(evaluate(model(n=300), measures=["ece"]))
