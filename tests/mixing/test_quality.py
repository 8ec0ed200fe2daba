"""Quality columns and filters, against slow and obvious versions."""

import numpy as np
import pytest
import torch
from gaussian_classes import GaussianClasses, batches
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from diffcal.errors import ConfigError, DataError
from diffcal.mixing.projection import pair_projection
from diffcal.mixing.quality import (
    FilterConfig,
    endpoint_agreement,
    group_spearman,
    nearest_cosine,
    off_axis_residual,
    real_residual_quantile,
    third_class_mass,
)

DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def test_residual_of_a_pair_is_the_distance_to_its_line():
    features, prototypes = normal(20, 6), normal(4, 6, seed=1)
    classes = torch.tensor([[2, 0], [1, 3]]).repeat(10, 1)
    distance, weights = off_axis_residual(features, prototypes, classes)
    first, second = prototypes[classes[:, 0]], prototypes[classes[:, 1]]
    ratio = pair_projection(features, first, second)
    torch.testing.assert_close(weights[:, 0], ratio)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(20, dtype=DOUBLE))
    nearest = second + ratio[:, None] * (first - second)
    torch.testing.assert_close(distance, (features - nearest).norm(dim=1))


def test_residual_of_three_classes_with_padding():
    prototypes = normal(5, 6)
    off = normal(1, 6, seed=2)
    mix = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.4, 0.0]], dtype=DOUBLE)
    classes = torch.tensor([[4, 1, 0], [2, 3, -1]])
    points = torch.stack([mix[i] @ prototypes[classes[i].clamp(min=0)] for i in range(2)])
    distance, weights = off_axis_residual(points, prototypes, classes)
    torch.testing.assert_close(weights, mix, rtol=0, atol=1e-6)
    assert float(distance.max()) < 1e-6
    # A step across the flat shows in full, one along it not at all.
    flat = torch.stack([prototypes[1] - prototypes[4], prototypes[0] - prototypes[4]])
    basis = torch.linalg.qr(flat.T).Q
    across = off - (off @ basis) @ basis.T
    moved, _ = off_axis_residual(points[:1] + across, prototypes, classes[:1])
    torch.testing.assert_close(moved, across.norm(dim=1), rtol=1e-6, atol=0)


def test_residual_quantile_of_real_images():
    source = GaussianClasses(classes=3)
    features, labels = source.draw(400)
    values = []
    for row, label in zip(features, labels.tolist(), strict=True):
        for other in {0, 1, 2} - {label}:
            delta = source.means[label] - source.means[other]
            away = row - source.means[label]
            along = away @ delta / delta.norm()
            values.append(float((away.square().sum() - along**2).sqrt()))
    for quantile in (0.5, 0.99, 1.0):
        found = real_residual_quantile(batches(features, labels, 90), source.means, quantile)
        assert found == pytest.approx(
            np.quantile(values, quantile, method="inverted_cdf"), abs=2 * max(values) / 65536
        )
    with pytest.raises(DataError, match="no real images"):
        real_residual_quantile([], source.means)


def test_third_class_mass():
    posterior = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]])
    classes = torch.tensor([[3, 0, -1], [0, 1, 2]])
    expected = torch.tensor([0.5, 0.4], dtype=DOUBLE)
    torch.testing.assert_close(third_class_mass(posterior, classes), expected, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    levels=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
def test_group_spearman_equals_scipy_with_ties(sizes, levels, seed):
    rng = np.random.default_rng(seed)
    groups = np.repeat(rng.permutation(100)[: len(sizes)], sizes)
    x, y = rng.integers(0, levels, (2, len(groups))) / 3
    order = rng.permutation(len(groups))
    groups, x, y = groups[order], x[order], y[order]
    found = group_spearman(*(torch.from_numpy(v) for v in (groups, x, y))).numpy()
    for group in set(groups):
        rows = groups == group
        constant = len(set(x[rows])) < 2 or len(set(y[rows])) < 2
        wanted = np.nan if constant else spearmanr(x[rows], y[rows]).statistic
        np.testing.assert_allclose(found[rows], wanted, rtol=0, atol=1e-12)


def test_group_spearman_is_nan_where_an_estimate_is():
    groups = torch.tensor([5, 5, 5, 9, 9, 9])
    x = torch.tensor([0, 0.5, 1.0]).repeat(2)
    y = torch.tensor([0.1, 0.7, 0.9, 3.0, float("nan"), 1.0])
    found = group_spearman(groups, x, y)
    assert found[:3].tolist() == [1.0] * 3
    assert bool(found[3:].isnan().all())
    assert group_spearman(groups[:0], x[:0], y[:0]).shape == (0,)


def test_endpoints_are_members_of_one_class():
    posterior = torch.tensor([[0.9, 0.1, 0], [0.9, 0.1, 0], [0.4, 0.6, 0], [0.0, 0.1, 0.9]])
    classes = torch.tensor([[0, 1]]).repeat(4, 1)
    weights = torch.tensor([[1.0, 0], [0, 1.0], [0.5, 0.5], [1.0, 0]])
    pure, agrees = endpoint_agreement(posterior, classes, weights)
    assert pure.tolist() == [True, True, False, True]
    assert agrees[pure].tolist() == [True, False, False]


def test_nearest_cosine_finds_copies_in_any_block(monkeypatch):
    monkeypatch.setattr("diffcal.mixing.quality.BLOCK", 7)
    real = normal(50, 6).float() + 10
    centre = real.double().mean(dim=0)
    queries = torch.cat([real[[13, 49]], normal(20, 6, seed=3).float() + 10])
    found = nearest_cosine(queries, batches(real, torch.zeros(50).long(), 20), centre)
    away, keys = queries.double() - centre, real.double() - centre
    table = (away @ keys.T) / away.norm(dim=1)[:, None] / keys.norm(dim=1)
    torch.testing.assert_close(found.double(), table.max(dim=1).values, rtol=0, atol=1e-5)
    assert float(found[:2].min()) > 1 - 1e-5
    assert float(found[2:].max()) < 0.999


def test_filters_keep_what_passes_and_what_is_not_known():
    columns = {
        "residual": [0.5, 1.5, None, 1.0],
        "third_mass": [0.1, 0.1, 0.4, 0.3],
        "group_spearman": [0.9, None, 0.7, float("nan")],
        "nearest_cosine": [0.99, 0.5, 0.5, None],
        "endpoint_ok": [True, False, None, None],
    }
    for wanted, config in (
        ([1, 1, 1, 1], {}),
        ([1, 0, 1, 1], {"max_residual": 1.0}),
        ([1, 1, 0, 1], {"max_third_mass": 0.3}),
        ([1, 1, 0, 1], {"min_group_spearman": 0.8}),
        ([0, 1, 1, 1], {"max_nearest_cosine": 0.95}),
        ([1, 0, 1, 1], {"require_endpoints": True}),
        ([0, 0, 0, 1], {"max_residual": 1.0, "max_third_mass": 0.3, "max_nearest_cosine": 0.9}),
    ):
        assert FilterConfig(**config).keep(columns).tolist() == [bool(v) for v in wanted]
        assert FilterConfig(**config).active == bool(config)
    assert FilterConfig(max_residual=0.0).active
    with pytest.raises(DataError, match="lacks"):
        FilterConfig(max_residual=1.0).keep({"third_mass": [0.1]})
    for wrong in ({"max_third_mass": 1.5}, {"max_residual": -1.0}, {"min_group_spearman": 2.0}):
        with pytest.raises(ConfigError, match="must be in"):
            FilterConfig(**wrong)
