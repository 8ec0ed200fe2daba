"""Annotators: goldens, Gaussian classes with exact posteriors, invariances, files, bad input."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussian_classes import GaussianClasses, batches
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.errors import ArtifactError, ConfigError, DataError, NumericalError
from diffcal.mixing.annotators import (
    build_annotator,
    hold_out,
    load_annotator,
    save_annotator,
)
from diffcal.mixing.logistic import fit_logistic, fit_logistic_slope, fit_logistics
from diffcal.mixing.pair_annotators import _isotonic
from diffcal.mixing.posterior import KClassPosterior
from diffcal.mixing.temperature import fit_temperature, mean_log_loss, smoothed_targets

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/csm.json").read_text("utf-8"))["cases"]
DOUBLE = torch.float64
PAIR_ANNOTATORS = ("projection_sigmoid", "projection_slope", "projection_isotonic")
ON_FEATURES = (*PAIR_ANNOTATORS, "kclass_projection", "kclass_posterior")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def pairs(first, second, count):
    return torch.tensor([[first, second]]).expand(count, 2)


def halves(count):
    return torch.full((count, 2), 0.5)


def fitted(name, source=None, count=4000, **settings):
    source = source or GaussianClasses()
    annotator = build_annotator(name, **settings)
    train, held_out = batches(*source.draw(count)), batches(*source.draw(count // 2))
    return annotator.fit(train, held_out, len(source.means))


@functools.cache
def small(name):
    return fitted(name, count=400)


def labelled(annotator, features, first=0, second=1):
    return annotator.annotate(features, pairs(first, second, len(features)), halves(len(features)))


# goldens


def test_golden_end_to_end_toy():
    """Exact samples of two Gaussian classes: released labels, pair slope, true posterior."""
    case = GOLDEN["end_to_end_toy"]
    inputs = case["inputs"]
    means = torch.tensor([inputs["mu1"], inputs["mu2"]], dtype=DOUBLE)
    scale = inputs["s"]
    # Four points around each mean have exactly this mean and pooled variance.
    offsets = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=DOUBLE)
    radius = scale * np.sqrt(2 * 6 / 8)
    real = [((means[:, None] + radius * offsets).flatten(0, 1), torch.arange(8) // 4)]
    released = build_annotator("projection_sigmoid").fit(real, real, 2)
    slope = build_annotator("projection_slope", method="isotropic").fit(real, real, 2)
    assert float(slope.state["slopes"][0, 1]) == pytest.approx(inputs["lda_slope"], rel=1e-9)
    # Annotators give float32, of which 6e-8 is the rounding.
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    error = {"ratio": [], "s4": [], "lda": []}
    for group in case["groups"]:
        x = torch.tensor([m["x"] for m in group["members"]], dtype=DOUBLE)
        weights = torch.tensor([m["lambda_gen"] for m in group["members"]], dtype=DOUBLE)
        shrink = scale / np.sqrt(scale**2 + inputs["sigma_max"] ** 2)
        mixed = weights[:, None] * means[0] + (1 - weights[:, None]) * means[1]
        start = inputs["sigma_max"] * torch.tensor(group["noise"], dtype=DOUBLE)
        torch.testing.assert_close(mixed + (start - mixed) * shrink, x, rtol=0, atol=0.02)
        truth = torch.tensor([m["true_posterior_c1"] for m in group["members"]])
        ratio = released._ratio(x, pairs(0, 1, 8))
        wanted = torch.tensor([m["lambda_hat"] for m in group["members"]], dtype=DOUBLE)
        torch.testing.assert_close(ratio, wanted, rtol=1e-9, atol=1e-12)
        for name, annotator in (("s4", released), ("lda", slope)):
            labels = labelled(annotator, x)
            wanted = torch.tensor([m[f"target_{name}"] for m in group["members"]])
            torch.testing.assert_close(labels[:, 0], wanted, **tolerance)
            torch.testing.assert_close(labels[:, 1], 1 - wanted, **tolerance)
            error[name].append((labels[:, 0] - truth).abs())
        error["ratio"].append((weights.float() - truth).abs())
    mean = {name: float(torch.cat(values).mean()) for name, values in error.items()}
    expected = case["mean_abs_error_to_true_posterior"]
    assert mean["lda"] < 1e-6
    assert mean["ratio"] == pytest.approx(
        next(v for k, v in expected.items() if "ratio" in k), rel=1e-5
    )
    assert mean["s4"] == pytest.approx(next(v for k, v in expected.items() if "s4" in k), rel=1e-5)


def test_golden_logistic_slope_fit():
    case = GOLDEN["logistic_slope_fit"]
    x, y = (torch.tensor(case["inputs"][key], dtype=DOUBLE) for key in ("lambda_hat", "is_c1"))
    slope, offset = fit_logistic(x, y)
    assert slope == pytest.approx(case["a"], rel=case["rtol"])
    assert offset == pytest.approx(case["b"], rel=case["rtol"])
    assert -offset / slope == pytest.approx(case["centre"], rel=case["rtol"])
    logits = torch.stack([slope * x + offset, torch.zeros_like(x)], dim=1)
    loss = mean_log_loss(logits, torch.stack([y, 1 - y], dim=1))
    assert loss == pytest.approx(case["nll_mean"], rel=case["rtol"])
    # Twice the weight is the same as twice the observation.
    doubled = fit_logistic(torch.cat([x, x[:3]]), torch.cat([y, y[:3]]))
    weight = torch.ones(10, dtype=DOUBLE)
    weight[:3] = 2
    assert fit_logistic(x, y, weight) == pytest.approx(doubled, rel=1e-9)


def test_golden_isotonic_calibration():
    from sklearn.isotonic import IsotonicRegression

    case = GOLDEN["isotonic_calibration"]
    x, y = (np.array(case["inputs"][key], dtype=float) for key in ("lambda_hat", "is_c1"))
    fit = IsotonicRegression(y_min=0, y_max=1).fit(x, y)
    np.testing.assert_allclose(fit.predict(x), case["expected_fit"], rtol=1e-12)
    # The annotator's curve is the same regression on the data and their mirror image.
    knots, shares = _isotonic(x, y, np.ones_like(x))
    curve = np.interp(x, knots.numpy(), shares.numpy())
    mirror = np.interp(1 - x, knots.numpy(), shares.numpy())
    np.testing.assert_allclose(curve + mirror, 1, rtol=0, atol=1e-12)
    assert bool((np.diff(curve) >= 0).all())
    symmetric = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(
        np.concatenate([x, 1 - x]), np.concatenate([y, 1 - y])
    )
    np.testing.assert_allclose(curve, symmetric.predict(x), rtol=1e-12)


# exact posteriors


@pytest.mark.parametrize("method", ["lda", "logistic"])
def test_kclass_posterior_finds_the_posterior_of_gaussian_classes(method):
    source = GaussianClasses()
    annotator = fitted("kclass_posterior", source, count=6000, method=method)
    features, _ = source.draw(2000)
    found = labelled(annotator, features)
    # 6000 images for 4 x 6 weights: log-odds are known to about sqrt(24 / 6000) = 0.06.
    error = (found - source.posterior(features)).abs().sum(dim=1) / 2
    assert float(error.mean()) < 0.02
    if method == "lda":  # a penalised logistic fit is rightly sharpened
        assert annotator.report["temperature"] == pytest.approx(1, abs=0.08)
    between = source.between(2000)
    error = (labelled(annotator, between) - source.posterior(between)).abs().sum(dim=1) / 2
    assert float(error.mean()) < 0.03


@pytest.mark.parametrize("method", ["lda", "logistic"])
def test_kclass_posterior_separates_class_frequencies_from_evidence(method):
    """Unequal classes: ``balanced`` gives the posterior of equally likely classes, ``data`` theirs."""
    source, shares = GaussianClasses(seed=3), (0.6, 0.25, 0.1, 0.05)
    train, held_out = (batches(*source.draw(n, shares)) for n in (6000, 3000))
    features = source.between(1000)
    for prior, log_prior in (("balanced", 0.0), ("data", torch.tensor(shares).double().log())):
        annotator = KClassPosterior(method=method, prior=prior).fit(train, held_out, 4)
        error = (labelled(annotator, features) - source.posterior(features, log_prior)).abs()
        assert float(error.sum(dim=1).mean()) / 2 < 0.03


def test_streaming_and_keeping_features_give_the_same_logistic_fit(monkeypatch):
    source = GaussianClasses()
    data = batches(*source.draw(1000), size=130), batches(*source.draw(300))
    kept = KClassPosterior().fit(*data, 4)
    monkeypatch.setattr("diffcal.mixing.posterior.CACHED_NUMBERS", 0)
    streamed = KClassPosterior().fit(*data, 4)
    assert torch.equal(kept.state["weight"], streamed.state["weight"])


def test_logistic_weights_minimise_the_penalised_loss():
    from sklearn.linear_model import LogisticRegression

    source = GaussianClasses(dim=3, isotropic=True)
    features, labels = source.draw(600)
    annotator = KClassPosterior(strength=0.01, iterations=200)
    annotator.fit(batches(features, labels), batches(*source.draw(200)), 4)
    from diffcal.mixing.posterior import WHITENING_SHRINKAGE, whitening
    from diffcal.mixing.prototypes import class_statistics

    statistics = class_statistics([(features, labels)], 4)
    matrix, _ = whitening(statistics, WHITENING_SHRINKAGE)
    white = (features - statistics.means.mean(dim=0)) @ matrix.T
    peer = LogisticRegression(C=1 / (0.01 * 600), tol=1e-10, max_iter=1000)
    peer.fit(white.numpy(), labels.numpy())
    prior = (statistics.counts / statistics.counts.sum()).log()
    wanted = torch.from_numpy(peer.decision_function(white.numpy())) - prior
    scores = (features - annotator.state["centre"]) @ annotator.state["weight"].T
    scores = scores + annotator.state["bias"]
    torch.testing.assert_close(
        scores.log_softmax(dim=1), wanted.log_softmax(dim=1), rtol=0, atol=5e-3
    )


def test_slopes_of_gaussian_pairs():
    """Isotropic classes: ``‖δ‖²/τ²``. Others: ``(‖δ‖²)²/δᵀΣδ``, the log-odds' own scale along δ."""
    source = GaussianClasses(isotropic=True)
    annotator = fitted("projection_slope", source, count=20_000, method="isotropic")
    gap = torch.cdist(source.means, source.means).square()
    torch.testing.assert_close(annotator.state["slopes"], gap, rtol=0.05, atol=1e-9)
    skew = GaussianClasses(isotropic=False)
    annotator = fitted("projection_slope", skew, count=20_000, method="direction")
    delta = skew.means[0] - skew.means[1]
    along = delta @ torch.linalg.inv(skew.precision) @ delta
    wanted = float(delta.square().sum() ** 2 / along)
    assert float(annotator.state["slopes"][0, 1]) == pytest.approx(wanted, rel=0.08)


@pytest.mark.parametrize("method", ["isotropic", "direction", "logistic"])
def test_pair_slope_gives_the_posterior_of_isotropic_pairs(method):
    source = GaussianClasses(classes=3, isotropic=True, spread=0.8)
    annotator = fitted("projection_slope", source, count=20_000, method=method)
    features = source.between(1000)
    for first, second in ((0, 1), (2, 0)):
        found = labelled(annotator, features, first, second)
        both = source.posterior(features)[:, [first, second]]
        wanted = both[:, 0] / both.sum(dim=1)
        assert float((found[:, first] - wanted).abs().mean()) < 0.02
        assert float(found.sum(dim=1).sub(1).abs().max()) < 1e-6
        rest = [k for k in range(3) if k not in (first, second)]
        assert float(found[:, rest].abs().max()) == 0


def test_isotonic_curve_follows_soft_targets():
    """People's shares that are a known function of λ̂ are found again between the classes."""
    source = GaussianClasses(classes=2, dim=2, isotropic=True)
    train = batches(*source.draw(4000))
    features = torch.cat([source.between(3000), source.draw(1000)[0]])
    annotator = build_annotator("projection_isotonic")
    first, second = (train[0][0].new_zeros(2) for _ in range(2))
    statistics = build_annotator("projection_sigmoid").fit(train, train, 2)
    first, second = statistics.state["prototypes"]
    delta = first - second
    ratio = (features - second) @ delta / delta.square().sum()
    share = torch.sigmoid(9 * (ratio - 0.5))
    shares = torch.stack([share, 1 - share], dim=1)
    annotator.fit(train, [(features, shares)], 2)
    found = labelled(annotator, features)[:, 0]
    torch.testing.assert_close(found, share.float(), rtol=0, atol=0.02)


def test_isotonic_without_people_uses_the_calibrated_posterior():
    source = GaussianClasses(classes=3, isotropic=True, spread=0.8)
    annotator = fitted("projection_isotonic", source, count=8000)
    grid = torch.linspace(0, 1, 21, dtype=DOUBLE)[:, None]
    prototypes = annotator.state["prototypes"]
    shares = labelled(annotator, grid * prototypes[0] + (1 - grid) * prototypes[1])[:, 0]
    assert bool((shares.diff() >= 0).all())
    # Not a step: hard labels would jump from 0 to 1 in the middle.
    assert 0.02 < float(shares[8]) < 0.48
    assert float(shares[0] + shares[-1]) == pytest.approx(1, abs=1e-6)


def test_ratio_returns_the_weights_of_any_number_of_classes():
    annotator = fitted("ratio")
    classes = torch.tensor([[3, 1, -1], [0, 1, 2]])
    weights = torch.tensor([[0.25, 0.75, 0.0], [0.2, 0.3, 0.5]])
    labels = annotator.annotate(torch.zeros(2, 5), classes, weights)
    wanted = torch.tensor([[0, 0.75, 0, 0.25], [0.2, 0.3, 0.5, 0]])
    torch.testing.assert_close(labels, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("whiten", [False, True])
def test_kclass_projection_finds_mixes_and_respects_its_support(whiten):
    source = GaussianClasses()
    annotator = fitted("kclass_projection", source, whiten=whiten)
    wanted = torch.tensor([[0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4]], dtype=DOUBLE)
    features = wanted @ annotator.state["prototypes"]
    torch.testing.assert_close(labelled(annotator, features), wanted.float(), rtol=0, atol=1e-6)
    mixed = fitted("kclass_projection", source, whiten=whiten, support="mixed")
    assert float(labelled(mixed, features)[:, 2:].abs().max()) == 0


# invariances


@pytest.mark.parametrize("name", ON_FEATURES)
def test_labels_ignore_translation_rotation_and_scale_of_features(name):
    source = GaussianClasses()
    train, held_out = source.draw(1500), source.draw(800)
    features = source.between(50)
    rotation = torch.linalg.qr(normal(5, 5)).Q

    def moved(x):
        return 7.0 * x @ rotation + 3.0

    settings = {"method": "isotropic"} if name == "projection_slope" else {}
    if name == "kclass_posterior":
        # Shrinking towards the diagonal is not invariant under rotation; least shrinkage nearly is.
        settings = {"method": "lda", "strength": 0.0}
    if name == "projection_isotonic":
        settings = {"method": "logistic"}
        held_out = (held_out[0], source.posterior(held_out[0]))
    plain = build_annotator(name, **settings).fit([train], [held_out], 4)
    turned = build_annotator(name, **settings).fit(
        [(moved(train[0]), train[1])], [(moved(held_out[0]), held_out[1])], 4
    )
    torch.testing.assert_close(
        labelled(turned, moved(features)), labelled(plain, features), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("name", ON_FEATURES)
def test_swapping_the_pair_changes_no_label(name):
    annotator = fitted(name, count=1500)
    features = GaussianClasses(seed=0).between(60)
    torch.testing.assert_close(
        labelled(annotator, features, 2, 1), labelled(annotator, features, 1, 2), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", PAIR_ANNOTATORS)
def test_labels_rise_from_one_prototype_to_the_other(name):
    annotator = fitted(name, count=1500)
    grid = torch.linspace(-0.5, 1.5, 41, dtype=DOUBLE)[:, None]
    prototypes = annotator.state["prototypes"]
    shares = labelled(annotator, grid * prototypes[2] + (1 - grid) * prototypes[0], 2, 0)[:, 2]
    assert bool((shares.diff() >= 0).all())
    assert float(shares[-1] - shares[0]) > 0.5


@settings(deadline=None, max_examples=20)
@given(low=st.floats(0.1, 20), factor=st.floats(1.01, 5))
def test_a_steeper_slope_makes_every_label_surer(low, factor):
    source = GaussianClasses()
    features = source.between(30)
    mild, steep = (
        labelled(fitted("projection_sigmoid", source, count=100, slope=s), features).max(dim=1)
        for s in (low, low * factor)
    )
    assert bool((steep.values >= mild.values - 1e-6).all()) or not torch.equal(
        steep.indices, mild.indices
    )


@pytest.mark.parametrize("name", [*ON_FEATURES, "ratio"])
@settings(deadline=None, max_examples=10)
@given(scale=st.sampled_from([0.0, 1.0, 1e3, 1e6]), seed=st.integers(0, 99))
def test_labels_are_distributions_whatever_the_features(name, scale, seed):
    annotator = small(name)
    labels = labelled(annotator, scale * normal(20, 5, seed=seed))
    assert labels.dtype == torch.float32
    assert bool((labels >= 0).all())
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(20), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ON_FEATURES)
def test_halves_equal_the_whole(name):
    features = GaussianClasses().between(40)
    whole = labelled(small(name), features)
    parts = [labelled(small(name), half) for half in features.split(20)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    assert labelled(small(name), features[:0]).shape == (0, 4)


# calibration helpers


@settings(deadline=None, max_examples=25)
@given(temperature=st.floats(0.05, 20), seed=st.integers(0, 99))
def test_logits_made_too_sharp_give_their_temperature_back(temperature, seed):
    logits = 2 * normal(200, 5, seed=seed)
    offset = normal(5, seed=seed + 1)
    targets = (logits + offset).softmax(dim=1)
    found = fit_temperature(logits * temperature, targets, offset)
    assert found == pytest.approx(temperature, rel=1e-6)
    plain = fit_temperature(logits * temperature, logits.softmax(dim=1))
    assert plain == pytest.approx(temperature, rel=1e-6)


def test_temperature_refuses_nan():
    with pytest.raises(NumericalError, match="NaN"):
        fit_temperature(torch.full((2, 2), torch.nan), torch.eye(2))


def test_separable_data_need_shrinkage_and_then_give_a_finite_slope():
    x, y = torch.linspace(-1, 1, 10, dtype=DOUBLE), (torch.arange(10) >= 5).double()
    with pytest.raises(DataError, match="separated perfectly"):
        fit_logistic(x, y)
    slope, offset = fit_logistic(x, y, slope=2.0, strength=5.0)
    assert 2 < slope < 20
    assert offset == pytest.approx(0, abs=1e-9)
    weight = torch.ones_like(x)
    assert 1 < fit_logistic_slope(x, y, weight, strength=5.0) < 10
    # Perfectly separable classes, far apart, must still annotate.
    far = GaussianClasses(classes=3, spread=40)
    labels = labelled(fitted("projection_slope", far, count=300), far.between(20))
    assert bool(labels.isfinite().all())


def test_regressions_at_once_are_those_one_by_one_and_padding_counts_nothing():
    x, y = normal(6, 40), (normal(6, 40, seed=1) > 0).double()
    weight = torch.rand(6, 40, generator=torch.Generator().manual_seed(2)).double()
    weight[3, 25:] = 0
    for shrinkage in ({}, {"slope": 0.7, "strength": 3.0}):
        slopes, offsets = fit_logistics(x, y, weight, **shrinkage)
        for row in range(6):
            real = weight[row] > 0
            wanted = fit_logistic(x[row][real], y[row][real], weight[row][real], **shrinkage)
            assert (float(slopes[row]), float(offsets[row])) == pytest.approx(wanted, rel=1e-9)


def test_pair_slopes_with_soft_targets_are_weighted_regressions():
    """Against the plain form: share of the first class among both, weighted by their sum."""
    source = GaussianClasses(isotropic=True)
    train, (features, _) = batches(*source.draw(1000)), source.draw(300)
    shares = source.posterior(features)
    annotator = build_annotator("projection_slope", strength=2.0).fit(
        train, [(features, shares)], 4
    )
    plain = build_annotator("projection_slope", method="direction").fit(train, train, 4)
    ratio = annotator._ratio(features, pairs(1, 3, 300))
    unit = float(plain.state["slopes"][1, 3])
    both = shares[:, 1] + shares[:, 3]
    slope, offset = fit_logistic(
        unit * (ratio - 0.5),
        shares[:, 1] / both,
        both,
        slope=annotator.report["common_slope"],
        strength=2.0,
    )
    assert float(annotator.state["slopes"][1, 3]) == pytest.approx(slope * unit, rel=1e-7)
    assert float(annotator.state["offsets"][1, 3]) == pytest.approx(offset, rel=1e-6, abs=1e-9)


def test_slope_without_offset_is_the_logistic_one():
    x = normal(3000)
    target = torch.sigmoid(1.7 * x)
    weight = torch.rand(3000, generator=torch.Generator().manual_seed(0)).double()
    assert fit_logistic_slope(x, target, weight) == pytest.approx(1.7, rel=1e-9)
    assert fit_logistic(x, target, weight) == pytest.approx((1.7, 0), rel=1e-9, abs=1e-9)


# many classes, held-out split, files, bad input


@pytest.mark.parametrize("name", ["projection_slope", "projection_isotonic", "kclass_posterior"])
def test_hundreds_of_classes_stay_usable(name):
    source = GaussianClasses(classes=220, dim=16, spread=2.0)
    annotator = build_annotator(name)
    labels = torch.arange(1760) % 220
    train = [(source.means[labels] + normal(1760, 16), labels)]
    held_out = [(source.means[labels[:440]] + normal(440, 16, seed=5), labels[:440])]
    annotator.fit(train, held_out, 220)
    found = labelled(annotator, source.means[:2], 0, 1)
    assert float(found[0, 0]) > 0.5 > float(found[1, 0])


def test_hold_out_splits_every_image_once_and_repeats():
    features, labels = torch.arange(100.0)[:, None], torch.arange(100)
    train, held = hold_out(batches(features, labels, 7), 100, 0.2, seed=4)
    rows = [torch.cat([y for _, y in part]) for part in (train, held, held)]
    assert len(rows[1]) == 20
    assert torch.equal(rows[1], rows[2])
    assert sorted(torch.cat(rows[:2]).tolist()) == list(range(100))
    assert torch.equal(torch.cat([f for f, _ in held])[:, 0].long(), rows[1])
    other = hold_out(batches(features, labels, 50), 100, 0.2, seed=4)[1]
    assert torch.equal(torch.cat([y for _, y in other]), rows[1])
    with pytest.raises(ConfigError, match="held_out"):
        hold_out([], 10, 1.0)
    with pytest.raises(DataError, match="too few"):
        hold_out([], 1, 0.5)


@pytest.mark.parametrize("name", [*ON_FEATURES, "ratio"])
def test_saved_annotators_give_the_same_labels(name, tmp_path):
    annotator, features = small(name), GaussianClasses().between(10)
    save_annotator(tmp_path, annotator, {"rows": 3})
    loaded = load_annotator(tmp_path)
    assert torch.equal(labelled(loaded, features), labelled(annotator, features))
    assert loaded.settings == annotator.settings
    assert loaded.report == annotator.report


def test_damaged_annotators_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        load_annotator(tmp_path)
    save_annotator(tmp_path, small("kclass_posterior"), {})
    weights = tmp_path / "annotator.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        load_annotator(tmp_path)
    (tmp_path / "annotator.json").write_text("{}")
    with pytest.raises(ArtifactError, match="does not describe"):
        load_annotator(tmp_path)


def test_bad_input_is_refused_in_words():
    with pytest.raises(ConfigError, match="did you mean 'kclass_posterior'"):
        build_annotator("kclass_posteriors")
    with pytest.raises(ConfigError, match="no setting 'slop'"):
        build_annotator("projection_sigmoid", slop=3)
    for name, wrong in (
        ("projection_sigmoid", {"slope": 0.0}),
        ("projection_slope", {"method": "x"}),
        ("projection_slope", {"strength": -1.0}),
        ("projection_isotonic", {"method": "x"}),
        ("kclass_projection", {"support": "x"}),
        ("kclass_posterior", {"method": "x"}),
        ("kclass_posterior", {"prior": "x"}),
        ("kclass_posterior", {"method": "lda", "strength": 1.5}),
        ("diffusion_posterior", {"penalty": -1.0}),
    ):
        with pytest.raises(ConfigError):
            build_annotator(name, **wrong)
    with pytest.raises(ConfigError, match="not fitted"):
        labelled(build_annotator("kclass_posterior"), torch.zeros(1, 5))
    annotator = small("projection_slope")
    with pytest.raises(DataError, match="length 5, got 6"):
        labelled(annotator, torch.zeros(1, 6))
    with pytest.raises(DataError, match="class 4 of 4"):
        labelled(annotator, torch.zeros(1, 5), 0, 4)
    with pytest.raises(DataError, match="class -2 of 4"):
        labelled(annotator, torch.zeros(1, 5), 0, -2)
    with pytest.raises(DataError, match="mixes 3 classes"):
        annotator.annotate(torch.zeros(1, 5), torch.tensor([[0, 1, 2]]), torch.ones(1, 3) / 3)
    with pytest.raises(DataError, match="no label"):
        small("ratio").annotate(torch.zeros(1, 5), pairs(0, 1, 1), torch.zeros(1, 2))
    source = GaussianClasses()
    train = batches(*source.draw(200))
    with pytest.raises(DataError, match="class 4 has 0"):
        build_annotator("kclass_posterior").fit(train, train, 5)
    for name in ("kclass_posterior", "projection_slope", "projection_isotonic"):
        with pytest.raises(DataError, match="no held-out images"):
            build_annotator(name).fit(train, [], 4)
    same = [(torch.ones(4, 3), torch.arange(4) % 2)]
    with pytest.raises(DataError, match="same prototype"):
        build_annotator("projection_slope").fit(same, same, 2)


def test_temperature_of_separable_images_stays_above_zero():
    targets = torch.eye(3).repeat(40, 1)
    logits = 8 * targets - 4
    smooth = smoothed_targets(targets)
    torch.testing.assert_close(smooth.sum(1), torch.ones(120, dtype=torch.float64))
    temperature = fit_temperature(logits, smooth)
    confidence = (logits.double() / temperature).softmax(1).max(1).values
    # n images without an error: their mean confidence becomes (n + 1) / (n + 2).
    torch.testing.assert_close(confidence, torch.full((120,), 121 / 122, dtype=torch.float64))
    assert fit_temperature(logits, targets) < temperature / 3
