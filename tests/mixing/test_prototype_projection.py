"""Projection on prototypes: goldens, an independent solver, invariances."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from diffcal.errors import DataError
from diffcal.mixing.projection import (
    affine_weights,
    isotropic_posterior,
    pair_labels,
    pair_projection,
    simplex_weights,
    simplex_weights_of_classes,
)
from diffcal.mixing.prototypes import ClassStatistics, class_statistics

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/csm.json").read_text("utf-8"))["cases"]
DOUBLE = torch.float64


def tensor(values):
    return torch.tensor(values, dtype=DOUBLE)


def close(actual, expected, rtol, atol=1e-14):
    torch.testing.assert_close(actual, tensor(expected), rtol=rtol, atol=atol)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def projected(features, first, second):
    rows = (len(features), -1)
    return pair_projection(features, first.expand(rows), second.expand(rows))


def test_golden_reannotation_projection():
    case = GOLDEN["reannotation_projection"]
    first, second = tensor(case["inputs"]["p1"]), tensor(case["inputs"]["p2"])
    ratio = projected(tensor(case["inputs"]["features"]), first, second)
    close(ratio, case["expected_lambda_hat"], case["rtol"])
    close(ratio.clamp(0, 1), case["expected_clipped"], case["rtol"])
    close(torch.sigmoid(4 * (ratio - 0.5)), case["expected_sigmoid_s4"], case["rtol"])
    close(torch.sigmoid(2.3 * (ratio - 0.5)), case["expected_sigmoid_s2_3"], case["rtol"])
    example = case["target_vector_example"]
    share = torch.sigmoid(example["s"] * (ratio[[example["feature_index"]]] - 0.5))
    labels = pair_labels(share, torch.tensor([example["pair"]]), example["num_classes"])
    close(labels[0], example["expected"], case["rtol"])
    anchors = case["anchor_values"]
    for name, slope in (("s4", 4.0), ("s2_3", 2.3)):
        close(torch.sigmoid(slope * (tensor(anchors["lambda_hat"]) - 0.5)), anchors[name], 1e-12)


def test_golden_lda_posterior_is_a_sigmoid_of_the_projection():
    case, geometry = (
        GOLDEN["lda_posterior_equivalence"],
        GOLDEN["reannotation_projection"]["inputs"],
    )
    first, second = tensor(geometry["p1"]), tensor(geometry["p2"])
    features = tensor(geometry["features"])
    variance = case["inputs"]["sigma"] ** 2
    gap = (first - second).square().sum()
    assert float(gap) == pytest.approx(case["inputs"]["delta_norm_sq"], rel=1e-12)
    slope = float(gap) / variance
    assert slope == pytest.approx(case["slope"], rel=case["rtol"])
    ratio = projected(features, first, second)
    close(torch.sigmoid(slope * (ratio - 0.5)), case["posterior_equal_priors"], case["rtol"])
    shifted = slope * (ratio - 0.5) + torch.log(tensor(0.3 / 0.7))
    close(torch.sigmoid(shifted), case["posterior_prior_c1_0.3"], case["rtol"])
    posterior = isotropic_posterior(features, torch.stack([first, second]), variance)
    close(posterior[:, 0], case["posterior_equal_priors"], 1e-11)


def test_golden_kclass_projection():
    case = GOLDEN["kclass_projection"]
    prototypes, features = (tensor(case["inputs"][key]) for key in ("prototypes", "features"))
    close(affine_weights(features, prototypes), case["affine_weights"], case["rtol"], atol=1e-11)
    weights = simplex_weights(features, prototypes)
    close(weights, case["simplex_weights"], case["rtol"], atol=1e-11)
    residual = (features - weights @ prototypes).square().sum(dim=1)
    close(residual, case["simplex_sq_residual"], case["rtol"], atol=1e-20)
    posterior = isotropic_posterior(features, prototypes, 0.8**2)
    close(posterior, case["isotropic_gaussian_posterior_sigma_0.8"], case["rtol"])


def test_golden_class_prototypes():
    case = GOLDEN["class_prototypes"]
    features, labels = (
        tensor(case["inputs"]["features"]),
        torch.tensor(case["inputs"]["labels"]),
    )
    statistics = class_statistics([(features, labels)], 2)
    close(statistics.means, case["class_mean"], case["rtol"])
    assert statistics.counts.tolist() == case["class_count"]
    unit = torch.nn.functional.normalize(features, dim=1)
    close(class_statistics([(unit, labels)], 2).means, case["mean_of_l2_normalised"], case["rtol"])
    variance = case["pooled_within_class_variance"]
    assert statistics.variance == pytest.approx(variance, rel=case["rtol"])


@pytest.mark.parametrize("sizes", [(1,) * 60, (60,), (7, 13, 1, 39)])
def test_streamed_statistics_equal_those_at_once_far_from_zero(sizes):
    features, labels = normal(60, 5) + 1e6, torch.arange(60) % 3
    parts = zip(features.split(sizes), labels.split(sizes), strict=True)
    statistics = class_statistics(list(parts), 3)
    within = features - torch.stack([features[labels == k].mean(dim=0) for k in range(3)])[labels]
    torch.testing.assert_close(statistics.covariance, within.T @ within / 57, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(statistics.variances, statistics.covariance.diagonal())
    assert statistics.variance == pytest.approx(float(statistics.variances.mean()))


def test_statistics_refuse_bad_batches():
    statistics = ClassStatistics(2, 3)
    with pytest.raises(DataError, match="length 4, expected 3"):
        statistics.update(normal(2, 4), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="labels run from 0 to 2"):
        statistics.update(normal(2, 3), torch.tensor([0, 2]))
    with pytest.raises(DataError, match="NaN"):
        statistics.update(torch.full((1, 3), torch.nan), torch.tensor([0]))
    statistics.update(normal(2, 3), torch.tensor([0, 0]))
    with pytest.raises(DataError, match="class 1 has 0 real images"):
        statistics.require_classes(1)
    with pytest.raises(DataError, match="no real features"):
        class_statistics([], 2)
    with pytest.raises(DataError, match="without covariance"):
        _ = ClassStatistics(2, 3, covariance=False).covariance


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_projection_ignores_translation_rotation_and_scale(seed, scale, shift):
    points = normal(8, 5, seed=seed)
    rotation = torch.linalg.qr(normal(5, 5, seed=seed + 1)).Q
    moved = scale * points @ rotation + shift
    before, after = (projected(p[2:], p[0], p[1]) for p in (points, moved))
    torch.testing.assert_close(after, before, rtol=1e-7, atol=1e-7 * (1 + shift**2 / scale**2))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_swapping_the_pair_mirrors_the_projection(seed):
    points = normal(8, 5, seed=seed)
    there = projected(points[2:], points[0], points[1])
    back = projected(points[2:], points[1], points[0])
    torch.testing.assert_close(there, 1 - back, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(affine_weights(points[2:], points[:2])[:, 0], there)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 7), dim=st.integers(1, 6))
def test_simplex_weights_are_optimal(seed, classes, dim):
    """The conditions of Karush, Kuhn and Tucker, also with more classes than dimensions."""
    prototypes, features = normal(classes, dim, seed=seed), 2 * normal(5, dim, seed=seed + 1)
    weights = simplex_weights(features, prototypes)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5, dtype=DOUBLE))
    gradient = (weights @ prototypes - features) @ prototypes.T
    least = gradient.min(dim=1, keepdim=True).values
    scale = 1 + gradient.abs().max()
    assert float((gradient - least)[weights > 0].max()) < 1e-8 * scale


def test_simplex_weights_agree_with_a_general_solver():
    prototypes, features = normal(4, 3), normal(3, 3, seed=5)
    for row, found in zip(features, simplex_weights(features, prototypes), strict=True):
        result = minimize(
            lambda w, row=row: float((row - tensor(w) @ prototypes).square().sum()),
            [0.25] * 4,
            bounds=[(0, 1)] * 4,
            constraints={"type": "eq", "fun": lambda w: sum(w) - 1},
            tol=1e-12,
        )
        close(found, result.x.tolist(), rtol=0, atol=1e-5)


def test_simplex_weights_keep_to_the_allowed_classes_and_find_mixes_again():
    prototypes = normal(300, 64)
    wanted = torch.zeros(20, 300, dtype=DOUBLE)
    rows = torch.arange(20)
    wanted[rows, rows * 7], wanted[rows, rows + 200] = 0.3, 0.7
    allowed = wanted > 0
    features = wanted @ prototypes
    found = simplex_weights_of_classes(features, prototypes, allowed)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    free = simplex_weights(features, prototypes)
    torch.testing.assert_close(free @ prototypes, features, rtol=0, atol=1e-5)
    with pytest.raises(DataError, match="at least one class"):
        simplex_weights_of_classes(features, prototypes, torch.zeros_like(allowed))


def test_equal_prototypes_are_refused():
    with pytest.raises(DataError, match="same prototype"):
        projected(normal(2, 3), torch.ones(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE))
