"""What must hold of every calibrator, and of some."""

import ast
import itertools
import math
import re

import numpy as np
import pytest
import torch

from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.posthoc.affine import MatrixScaling, VectorScaling
from diffcal.calibration.posthoc.binning_maps import BayesianBinning, HistogramBinning
from diffcal.calibration.posthoc.calibrator import FitData, NotFittedError, criterion_value
from diffcal.calibration.posthoc.class_temperature import ClassTemperatureScaling
from diffcal.calibration.posthoc.ensemble_temperature import (
    EnsembleTemperatureScaling,
    simplex_least_squares,
)
from diffcal.calibration.posthoc.feature_clipping import FeatureClipping
from diffcal.calibration.posthoc.feature_consistency import FeatureConsistency
from diffcal.calibration.posthoc.pipeline import Pipeline
from diffcal.calibration.posthoc.registry import CALIBRATORS, build_calibrator
from diffcal.calibration.posthoc.storage import load_calibrator, save_calibrator
from diffcal.calibration.posthoc.temperature import TemperatureScaling
from diffcal.errors import CheckpointError, ConfigError, DataError

FAST = {
    "pts": {"steps": 40},
    "group": {"partitions": 2, "steps": 10},
    "feature_consistency": {"num_samples": 20, "fit_samples": 5},
    "feature_clipping": {"grid_size": 20},
    "procal": {"neighbours": 5},
    "smart": {"steps": 40},
    "dac": {"neighbours": 5},
}
METHODS = [*CALIBRATORS, "feature_clipping+temperature", "temperature+histogram"]


def data(n, k=4, d=6, factor=2.0, seed=0):
    """Logits that are ``factor`` times too large for their labels, with features and their head."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(k, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    h = torch.randn(n, d, generator=generator, dtype=torch.float64).abs()
    z = h @ weight.T
    y = torch.multinomial((z / factor).softmax(1), 1, generator=generator)[:, 0]
    return z, y, h, weight


Z, Y, H, W = data(400)
TZ, TY, TH, _ = data(300, seed=1)


def make(method):
    made = build_calibrator(method, FAST)
    for stage in made.stages if isinstance(made, Pipeline) else [made]:
        if isinstance(stage, FeatureClipping):
            stage.with_head(W, W.new_zeros(len(W)))
        if isinstance(stage, FeatureConsistency):
            stage.with_weight(W)
    return made


@pytest.fixture(scope="module")
def fitted():
    return {name: make(name).fit(Z, Y, features=H) for name in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_contract(method, fitted, tmp_path):
    made = fitted[method]
    state = torch.random.get_rng_state()
    p = made.predict_proba(TZ, features=TH)
    assert p.dtype == torch.float64
    assert bool((p >= 0).all())
    torch.testing.assert_close(p.sum(1), torch.ones(len(TZ)).double(), rtol=0, atol=1e-12)
    logits = made.calibrated_logits(TZ, features=TH)
    torch.testing.assert_close(logits.softmax(1), p, rtol=1e-9, atol=1e-12)
    if made.preserves_argmax:
        assert torch.equal(p.argmax(1), TZ.argmax(1))
        single = made.predict_proba(TZ.float(), features=TH.float())
        assert single.dtype == torch.float32
        assert torch.equal(single.argmax(1), TZ.float().argmax(1))
    # batches and order of the rows change nothing
    rows = torch.randperm(len(TZ), generator=torch.Generator().manual_seed(3))
    parts = [made.predict_proba(TZ[r], features=TH[r]) for r in rows.split(77)]
    torch.testing.assert_close(torch.cat(parts), p[rows], rtol=1e-12, atol=1e-14)
    array = made.predict_proba(TZ.numpy(), features=TH.numpy())
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, p.numpy())
    for suffix in ("safetensors", "json"):
        save_calibrator(made, tmp_path / f"c.{suffix}")
        save_calibrator(made, tmp_path / f"twin.{suffix}")
        files = [(tmp_path / f"{name}.{suffix}").read_bytes() for name in ("c", "twin")]
        assert files[0] == files[1]
        again = load_calibrator(tmp_path / f"c.{suffix}")
        assert type(again) is type(made)
        assert torch.equal(again.predict_proba(TZ, features=TH), p)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("pts", "group", "feature_consistency")]
)
def test_order_of_examples_and_refit(method, fitted):
    rows = torch.randperm(len(Z), generator=torch.Generator().manual_seed(4))
    made = make(method).fit(Z[rows], Y[rows], features=H[rows])
    p = fitted[method].predict_proba(TZ, features=TH)
    torch.testing.assert_close(
        made.predict_proba(TZ, features=TH), p, rtol=1e-4, atol=1e-5, msg=lambda m: f"{method}: {m}"
    )
    made.fit(Z[rows], Y[rows], features=H[rows])
    torch.testing.assert_close(made.predict_proba(TZ, features=TH), p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_hot_soft_labels_are_hard_labels(method, fitted):
    q = torch.nn.functional.one_hot(Y, 4).double()
    made = make(method).fit(Z, soft_labels=q, features=H)
    torch.testing.assert_close(
        made.predict_proba(TZ, features=TH),
        fitted[method].predict_proba(TZ, features=TH),
        rtol=1e-5,
        atol=1e-6,
    )


def test_soft_labels_recover_the_temperature():
    q = (Z / 2).softmax(1)  # the law that labels were drawn from: the fit has no sampling error
    made = TemperatureScaling().fit(Z, soft_labels=q)
    assert made.temperature == pytest.approx(2, abs=1e-9)
    vector = VectorScaling().fit(Z, soft_labels=q)
    torch.testing.assert_close(vector.scale_, torch.full((4,), 0.5).double(), rtol=1e-8, atol=0)
    torch.testing.assert_close(vector.bias_, torch.zeros(4).double(), rtol=0, atol=1e-8)
    matrix = MatrixScaling(off_diagonal=1e-9, intercept=1e-9).fit(Z, soft_labels=q)
    torch.testing.assert_close(matrix.predict_proba(TZ), (TZ / 2).softmax(1), rtol=1e-4, atol=1e-5)
    cts = ClassTemperatureScaling().fit(Z, soft_labels=q)
    torch.testing.assert_close(cts.temperatures_, torch.full((4,), 2.0).double(), rtol=1e-8, atol=0)
    ets = EnsembleTemperatureScaling(criterion="nll").fit(Z, soft_labels=q)
    torch.testing.assert_close(ets.predict_proba(TZ), (TZ / 2).softmax(1), rtol=1e-4, atol=1e-5)


def test_temperature_of_drawn_labels():
    z, y, _, _ = data(20_000, factor=2.5, seed=7)
    made = TemperatureScaling().fit(z, y)
    assert made.temperature == pytest.approx(2.5, rel=0.05)
    calibrated = TemperatureScaling().fit(z / 2.5, y)
    assert calibrated.temperature == pytest.approx(1, rel=0.05)  # calibrated data stay


@pytest.mark.parametrize(
    "method", ["temperature", "vector", "ets", "cts", "consistency", "dirichlet"]
)
def test_validation_nll_does_not_rise(method):
    made = build_calibrator(
        method, {"ets": {"criterion": "nll"}, "dirichlet": {"off_diagonal": 1e-6}}
    )
    if method == "dirichlet":
        made.intercept = 1e-6
    made.fit(Z, Y)
    d = FitData(Predictions(logits=Z, labels=Y))
    before = criterion_value(d, Z.log_softmax(1), "nll")
    assert criterion_value(d, made.calibrated_logits(Z).log_softmax(1), "nll") < before


def test_simplex_least_squares_finds_corners_and_edges():
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(3, 50, 4, generator=generator, dtype=torch.float64)
    for wanted in ([1.0, 0, 0], [0.3, 0.7, 0], [0.2, 0.3, 0.5], [0, 0, 1.0]):
        w = torch.tensor(wanted).double()
        found = simplex_least_squares(parts, torch.einsum("wbk,w->bk", parts, w))
        torch.testing.assert_close(found, w, rtol=0, atol=1e-7)


def test_bayesian_binning_is_the_weighted_average():
    """Beside a plain loop over models and bins."""
    scores = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outcomes = (scores > 0.4).double()
    made = BayesianBinning()
    knots, values = made._fit_map(scores, outcomes)
    from diffcal.calibration.metrics.binning import mass_edges_of_values

    logs, rates = [], []
    for bins in made.bin_numbers(60):
        edges = mass_edges_of_values(scores, bins).tolist()
        log_score, rate = 0.0, []
        for low, high in itertools.pairwise(edges):
            inside = (scores > low) & (scores <= high)
            n, m = int(inside.sum()), float(outcomes[inside].sum())
            a, b = 2 * (low + high) / 2, 2 * (1 - (low + high) / 2)
            log_score += math.lgamma(2) - math.lgamma(n + 2)
            log_score += math.lgamma(m + a) - math.lgamma(a)
            log_score += math.lgamma(n - m + b) - math.lgamma(b)
            rate.append((high, (m + a) / (n + 2)))
        logs.append(log_score)
        rates.append(rate)
    weights = np.exp(np.array(logs) - max(logs))
    weights /= weights.sum()
    for x, value in zip(knots.tolist(), values.tolist(), strict=True):
        expected = sum(
            w * next(r for high, r in rate if x <= high + 1e-15)
            for w, rate in zip(weights, rates, strict=True)
        )
        assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("method", "k"),
    [
        *(
            (method, 2)
            for method in ("temperature", "vector", "consistency", "ets", "pts", "isotonic")
        ),
        *((method, 1000) for method in ("temperature", "consistency", "ets", "isotonic")),
        ("vector", 100),
    ],
)
def test_numbers_of_classes(method, k):
    z, y, _, _ = data(60, k=k, seed=5)
    p = make(method).fit(z, y).predict_proba(z[:20])
    torch.testing.assert_close(p.sum(1), torch.ones(20).double(), rtol=0, atol=1e-9)


def test_large_float32_logits():
    z = (Z[:, :4] * 1e4 / Z.abs().max()).float()
    for method in ("temperature", "consistency", "ets", "isotonic", "vector"):
        p = make(method).fit(z, Y).predict_proba(z)
        assert p.dtype == torch.float32
        assert bool(p.isfinite().all()), method


def test_scikit_learn_clones_a_calibrator():
    base = pytest.importorskip("sklearn.base")
    example = re.search(r"``(\{.*\})``", build_calibrator.__doc__ or "")
    assert example is not None
    settings = ast.literal_eval(example.group(1)) | {"feature_clipping": {"grid_size": 20}}
    for method in ("temperature", "feature_clipping+temperature"):
        made = build_calibrator(method, settings)
        if isinstance(made, Pipeline):
            made.stages[0].with_head(W, torch.zeros(len(W)))  # type: ignore[attr-defined]
        expected = made.fit(Z, Y, features=H).predict_proba(TZ, features=TH)
        copied = base.clone(made)
        with pytest.raises(NotFittedError):
            copied.predict_proba(TZ, features=TH)
        copied.fit(Z[:100], Y[:100], features=H[:100])
        torch.testing.assert_close(made.predict_proba(TZ, features=TH), expected, rtol=0, atol=0)
        again = copied.fit(Z, Y, features=H).predict_proba(TZ, features=TH)
        torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_rows_of_a_list_or_a_data_frame_give_an_array(fitted):
    pandas = pytest.importorskip("pandas")
    made = fitted["temperature"]
    expected = made.predict_proba(Z.double().numpy())
    for given in (Z.tolist(), pandas.DataFrame(Z.double().numpy())):
        # below the annotation, which the tests check
        probs = made._map(given, None, made._write_probs)
        assert isinstance(probs, np.ndarray)
        np.testing.assert_array_equal(probs, expected)


def test_bad_input(fitted):
    made = fitted["temperature"]
    with pytest.raises(NotFittedError, match="not fitted"):
        TemperatureScaling().predict_proba(Z)
    for bad in (Z[:, :3], Z.long(), Z[0], Z[:0]):
        with pytest.raises(DataError):
            made.predict_proba(bad)
    broken = Z.clone()
    broken[7, 1] = math.nan
    with pytest.raises(DataError, match="first is 7"):
        made.predict_proba(broken)
    for z, y in ((broken, Y), (Z, Y + 1), (Z[:0], Y[:0]), (Z[:, :1], Y * 0), (Z, Y[:5])):
        with pytest.raises(DataError):
            TemperatureScaling().fit(z, y)
    with pytest.raises(DataError, match="features"):
        make("group").fit(Z, Y)
    with pytest.raises(DataError, match="columns"):
        fitted["group"].predict_proba(TZ, features=TH[:, :3])
    with pytest.raises(DataError, match="last layer"):
        build_calibrator("feature_clipping").fit(Z, Y, features=H)
    with pytest.raises(ConfigError, match="did you mean temperature"):
        build_calibrator("temprature")
    with pytest.raises(ConfigError, match="only be the last"):
        build_calibrator("histogram+temperature")
    with pytest.raises(ConfigError, match=r"temperature\.criterio'"):
        build_calibrator("temperature", {"temperature": {"criterio": "ece"}})


def test_damaged_files(tmp_path, fitted):
    path = tmp_path / "c.safetensors"
    save_calibrator(fitted["temperature"], path)
    path.write_bytes(path.read_bytes()[:-3])
    for bad in (path, tmp_path / "none.json", tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match="not a saved calibrator"):
            load_calibrator(bad)
    (tmp_path / "x.json").write_text('{"format": "diffcal-calibrator/1"}')
    with pytest.raises(CheckpointError, match="not a saved calibrator"):
        load_calibrator(tmp_path / "x.json")
    state = fitted["vector"].state_dict()
    with pytest.raises(CheckpointError, match="must hold"):
        fitted["temperature"].load_state_dict(state)


def test_separable_data_warn(caplog):
    z = torch.eye(3).repeat(4, 1).double()
    made = TemperatureScaling().fit(z, torch.arange(12) % 3)
    assert made.temperature == pytest.approx(0.01)
    assert "end of" in caplog.text


def test_class_temperatures_by_released_search():
    made = ClassTemperatureScaling(criterion="ece").fit(Z[:120], Y[:120])
    d = FitData(Predictions(logits=Z[:120], labels=Y[:120]))
    common = TemperatureScaling().fit(Z[:120], Y[:120]).calibrated_logits(Z[:120])
    found = made.calibrated_logits(Z[:120])
    assert criterion_value(d, found.log_softmax(1), "ece") < criterion_value(
        d, common.log_softmax(1), "ece"
    )


# peers


@pytest.mark.filterwarnings("ignore")
def test_netcal():
    peer = pytest.importorskip("netcal.scaling")
    binning = pytest.importorskip("netcal.binning")
    probs, test = Z.softmax(1).numpy(), TZ.softmax(1).numpy()
    for theirs, ours, atol in (
        (binning.HistogramBinning(bins=7), HistogramBinning(n_bins=7), 1e-12),
        (binning.IsotonicRegression(), build_calibrator("isotonic"), 1e-9),
        (peer.TemperatureScaling(), TemperatureScaling(), 1e-5),
    ):
        theirs.fit(probs, Y.numpy())
        expected = torch.from_numpy(np.asarray(theirs.transform(test), dtype=np.float64))
        actual = ours.fit(Z, Y).predict_proba(TZ)
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_scikit_learn():
    """One-versus-rest isotonic regression, and temperature scaling where it has it (1.8)."""
    sklearn = pytest.importorskip("sklearn.isotonic")
    p, test = Z.softmax(1).numpy(), TZ.softmax(1).numpy()
    columns = [
        sklearn.IsotonicRegression(out_of_bounds="clip")
        .fit(p[:, k], (k == Y).numpy())
        .predict(test[:, k])
        for k in range(4)
    ]
    expected = np.stack(columns, axis=1)
    expected /= expected.sum(axis=1, keepdims=True)
    actual = build_calibrator("isotonic").fit(Z, Y).predict_proba(TZ).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    calibration = pytest.importorskip("sklearn.calibration")
    scaling = getattr(calibration, "_TemperatureScaling", None)
    if scaling is None:
        pytest.skip("this scikit-learn has no temperature scaling")
    inverse = scaling().fit(Z.numpy(), Y.numpy()).beta_
    assert TemperatureScaling().fit(Z, Y).temperature == pytest.approx(1 / inverse, rel=1e-5)
