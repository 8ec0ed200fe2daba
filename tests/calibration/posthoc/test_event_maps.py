"""Beta calibration, ENIR and scaling-binning: closed forms, plain restatements, peers."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from diffcal.calibration.posthoc.beta import BetaCalibration
from diffcal.calibration.posthoc.near_isotonic import NearIsotonicEnsemble, near_isotonic_path
from diffcal.calibration.posthoc.registry import build_calibrator
from diffcal.calibration.posthoc.scaling_binning import ScalingBinning


def binary(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, generator=generator, dtype=torch.float64)
    return torch.stack([torch.zeros_like(z), z], dim=1), generator


def test_beta_recovers_its_own_maps():
    z, _ = binary(500)
    s = z.softmax(1)[:, 1]
    a, b, c = 0.7, 1.6, -0.4
    rate = (a * s.log() - b * (1 - s).log() + c).sigmoid()
    made = BetaCalibration().fit(z, soft_labels=torch.stack([1 - rate, rate], dim=1))
    torch.testing.assert_close(
        made.parameters[1], torch.tensor([a, b, c]).double(), rtol=1e-5, atol=1e-5
    )
    # class 0 sees 1 - s: the same map from the other side, so that rows need no normalising
    torch.testing.assert_close(
        made.parameters[0], torch.tensor([b, a, -c]).double(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(made.predict_proba(z)[:, 1], rate, rtol=1e-5, atol=1e-7)
    # the identity is a beta map: calibrated scores stay
    same = BetaCalibration().fit(z, soft_labels=z.softmax(1))
    torch.testing.assert_close(same.predict_proba(z), z.softmax(1), rtol=1e-6, atol=1e-9)


def test_beta_against_logistic_regression_and_without_negative_slopes():
    z, generator = binary(800, seed=1)
    s = z.softmax(1)[:, 1]
    y = (torch.rand(800, generator=generator, dtype=torch.float64) < (z[:, 1] / 2).sigmoid()).long()
    made = BetaCalibration().fit(z, y)
    columns = np.stack([s.log().numpy(), -(1 - s).log().numpy()], axis=1)
    peer = LogisticRegression(C=1e7, tol=1e-10, max_iter=10_000).fit(columns, y.numpy())
    expected = torch.from_numpy(peer.predict_proba(columns))
    torch.testing.assert_close(made.predict_proba(z), expected, rtol=1e-3, atol=1e-4)
    # outcomes that fall with s near 1: an unconstrained fit has b < 0
    odd = ((s < 0.5) | (torch.rand(800, generator=generator) < 0.3)).long() * (s > 0.1).long()
    found = BetaCalibration(scheme="one_vs_rest").fit(z, odd)
    assert bool((found.parameters[:, :2] >= 0).all())
    assert bool((found.parameters[:, :2] == 0).any())
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert bool((found.map_value(grid, 1).diff() >= -1e-12).all())
    # a class that never occurs and separable data stay finite
    for labels in (torch.zeros(800).long(), (s > 0.5).long()):
        assert bool(BetaCalibration().fit(z, labels).predict_proba(z).isfinite().all())


def test_near_isotonic_path_solves_the_problem_at_every_step():
    """By its dual: β = y - Dᵀu / w with 0 ≤ u ≤ λ."""
    generator = np.random.default_rng(0)
    y, w = generator.normal(size=12), generator.integers(1, 4, 12).astype(float)
    difference = np.zeros((11, 12))
    difference[range(11), range(11)], difference[range(11), range(1, 12)] = 1, -1
    steps = list(near_isotonic_path(y, w))
    assert steps[0][0] == 0.0
    np.testing.assert_array_equal(steps[0][1], y)
    for penalty, values, sizes in steps[1:]:
        root = np.sqrt(w)
        dual = lsq_linear((difference / root).T, root * y, bounds=(0, penalty), tol=1e-14)
        beta = y - difference.T @ dual.x / w
        np.testing.assert_allclose(np.repeat(values, sizes), beta, atol=1e-6)
    assert [penalty for penalty, _, _ in steps] == sorted(penalty for penalty, _, _ in steps)
    last = np.repeat(steps[-1][1], steps[-1][2])
    expected = IsotonicRegression().fit(np.arange(12), y, sample_weight=w).predict(np.arange(12))
    np.testing.assert_allclose(last, expected, atol=1e-10)


def test_enir_is_the_weighted_average_of_the_path():
    generator = torch.Generator().manual_seed(2)
    s = torch.rand(60, generator=generator, dtype=torch.float64)
    y = (torch.rand(60, generator=generator) < s).double()
    order = s.argsort()
    knots, values = NearIsotonicEnsemble()._fit_map(s, y)
    torch.testing.assert_close(knots, s[order], rtol=0, atol=0)
    outcomes = y[order].numpy()
    logs, models = [], []
    for _, group_values, sizes in near_isotonic_path(outcomes, np.ones(60)):
        model = np.repeat(group_values, sizes)
        terms = [math.log(p if o else 1 - p) for p, o in zip(model, outcomes, strict=True)]
        logs.append(sum(terms) - len(sizes) / 2 * math.log(60))
        models.append(model)
    weights = np.exp(np.array(logs) - max(logs))
    expected = weights @ np.array(models) / weights.sum()
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_enir_beside_netcal():
    """Which picks its models by an elbow rule and takes steps: alike on average, not everywhere."""
    peer = pytest.importorskip("netcal.binning")
    generator = torch.Generator().manual_seed(2)
    s = torch.rand(600, generator=generator, dtype=torch.float64)
    y = (torch.rand(600, generator=generator) < s).double()
    knots, values = NearIsotonicEnsemble()._fit_map(s, y)
    theirs = peer.ENIR().fit(s.numpy(), y.numpy().astype(int)).transform(knots.numpy())
    assert np.abs(values.numpy() - theirs).mean() < 0.03
    assert (values - knots).abs().mean() < 0.08


def test_scaling_binning_gives_means_of_the_scaled_scores():
    z, generator = binary(600, seed=3)
    y = (torch.rand(600, generator=generator, dtype=torch.float64) < (z[:, 1] / 2).sigmoid()).long()
    made = ScalingBinning(scheme="one_vs_rest", n_bins=6).fit(z, y)
    peer = LogisticRegression(C=1e7, tol=1e-10).fit(z[:, 1:].numpy(), y.numpy())
    scaled = torch.from_numpy(peer.predict_proba(z[:, 1:].numpy())[:, 1])
    order = z[:, 1].argsort()
    mapped = made.map_value(z.softmax(1)[:, 1], 1)
    for rows in order.split(100):  # six bins of equal mass
        torch.testing.assert_close(
            mapped[rows], scaled[rows].mean().expand(100), rtol=1e-4, atol=1e-5
        )
    # values depend on outcomes through the smooth map only: less noise than a histogram's
    assert made.map_value(torch.tensor([1.0]).double(), 1) <= 1


@pytest.mark.parametrize("method", ["beta", "enir", "scaling_binning"])
@pytest.mark.parametrize("scheme", ["one_vs_rest", "top_label"])
def test_overconfident_data_are_calibrated(method, scheme):
    generator = torch.Generator().manual_seed(5)
    z = 4 * torch.randn(6000, 5, generator=generator, dtype=torch.float64)
    y = torch.multinomial((z / 3).softmax(1), 1, generator=generator)[:, 0]
    made = build_calibrator(method, {method: {"scheme": scheme}}).fit(z[:3000], y[:3000])
    test, top = z[3000:], z[3000:].argmax(1)
    right = (top == y[3000:]).double()

    def worst_gap(p):
        """Largest gap of ten groups of equal size between confidence in the prediction and accuracy."""
        confidence = p.gather(1, top[:, None])[:, 0]
        groups = confidence.argsort().split(300)
        return max(float((confidence[g].mean() - right[g].mean()).abs()) for g in groups)

    assert worst_gap(test.softmax(1)) > 0.25
    # a group's accuracy has a standard error of 0.029; maps of single classes promise less
    assert worst_gap(made.predict_proba(test)) < (0.1 if scheme == "top_label" else 0.15)
