"""Every golden case, computed once by independent implementations and released code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffcal.calibration.metrics.binned import expected_calibration_error
from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.posthoc.affine import DirichletScaling, MatrixScaling, VectorScaling
from diffcal.calibration.posthoc.binning_maps import HistogramBinning
from diffcal.calibration.posthoc.calibrator import FitData, criterion_value
from diffcal.calibration.posthoc.class_temperature import divide_by_class
from diffcal.calibration.posthoc.consistency import ConsistencyCalibration
from diffcal.calibration.posthoc.consistency_exact import exact_consistency
from diffcal.calibration.posthoc.consistency_sampling import (
    consistency_counts,
    mean_probabilities,
    smoothed,
)
from diffcal.calibration.posthoc.ensemble_temperature import EnsembleTemperatureScaling
from diffcal.calibration.posthoc.feature_clipping import (
    FeatureClipping,
    LogitClipping,
    clipped_entropy_change,
)
from diffcal.calibration.posthoc.group import GroupCalibration, soft_group_log_probs
from diffcal.calibration.posthoc.isotonic import IsotonicCalibration
from diffcal.calibration.posthoc.parameterized_temperature import row_temperatures
from diffcal.calibration.posthoc.pipeline import Pipeline
from diffcal.calibration.posthoc.proximity import DensityRatioCalibration, proximity
from diffcal.calibration.posthoc.temperature import TemperatureScaling

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "posthoc.json").read_text())
CASES = {case["id"]: case for case in GOLDEN["cases"]}
FIXTURES = GOLDEN["fixtures"]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


VZ, VY, VH = (FIXTURES["V"][key] for key in ("logits", "labels", "features"))
VZ, VY, VH = tensor(VZ), torch.tensor(VY), tensor(VH)
EZ, EY, EH = (FIXTURES["E"][key] for key in ("logits", "labels", "features"))
EZ, EY, EH = tensor(EZ), torch.tensor(EY), tensor(EH)
WEIGHT, BIAS = tensor(FIXTURES["head"]["weight"]), tensor(FIXTURES["head"]["bias"])


def close(actual, expected, rtol=1e-9, atol=1e-11):
    actual = torch.as_tensor(actual, dtype=torch.float64)
    torch.testing.assert_close(actual, tensor(expected), rtol=rtol, atol=atol)


def fitted(actual, expected):
    close(actual, expected, rtol=1e-5, atol=1e-6)


def check_metrics(probs, labels, expected, loose=False):
    """Metrics of probabilities; those of fitted parameters to the tolerance of parameters."""
    p = Predictions(probs=probs, labels=labels)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if loose else {}
    close(p.mean_outcome, expected["acc"])
    close(p.mean_log_score, expected["nll"], **tolerance)
    close(p.mean_brier, expected["brier"], **tolerance)
    for bins in (5, 15):
        atol = 1e-6 if loose else 1e-9
        close(expected_calibration_error(p, bins), expected[f"ece{bins}"], rtol=0, atol=atol)


def test_fixtures():
    for z, y, h, name in ((VZ, VY, VH, "V"), (EZ, EY, EH, "E")):
        close(h @ WEIGHT.T + BIAS, z.tolist(), rtol=0, atol=1e-6)
        check_metrics(z.softmax(1), y, FIXTURES[name]["metrics"])


def test_temperature():
    case = CASES["temperature/nll"]
    made = TemperatureScaling().fit(VZ, VY)
    fitted(made.temperature, case["T"])
    close(made.predict_proba(EZ)[:5], case["test_probs_first5"], rtol=1e-8)
    check_metrics(made.predict_proba(VZ), VY, case["val"], loose=True)
    check_metrics(made.predict_proba(EZ), EY, case["test"], loose=True)
    for t, slope in case["dnll_dT_at"].items():
        t = tensor(float(t)).requires_grad_()
        nll = torch.nn.functional.cross_entropy(VZ / t, VY)
        close(torch.autograd.grad(nll, t)[0], slope)


def test_temperature_by_ece_grid():
    case = CASES["temperature/ece_grid"]
    made = TemperatureScaling(criterion="ece", search="grid").fit(VZ, VY)
    assert made.temperature == case["T"]
    data = FitData(Predictions(logits=VZ, labels=VY))
    for i, expected in enumerate(case["grid_ece_first30"]):
        log_p = (VZ / ((i + 1) / 10)).log_softmax(1)
        close(criterion_value(data, log_p, "ece"), expected, rtol=0, atol=1e-9)
    close(
        criterion_value(data, made.calibrated_logits(VZ).log_softmax(1), "ece"),
        case["val_ece"],
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize(("name", "kind"), [("nll", "logits"), ("nll_on_log_probs", "log_probs")])
def test_vector(name, kind):
    case = CASES[f"vector_scaling/{name}"]
    made = VectorScaling(input=kind).fit(VZ, VY)
    fitted(made.scale_, case["scale"])
    fitted(made.bias_, case["bias_centred"])
    p = Predictions(probs=made.predict_proba(VZ), labels=VY)
    close(p.mean_log_score, case["val_nll"])
    check_metrics(made.predict_proba(EZ), EY, case["test"], loose=True)
    fitted(made.predict_proba(EZ)[:5], case["test_probs_first5"])


@pytest.mark.parametrize("name", ["matrix_scaling_odir", "dirichlet_odir"])
@pytest.mark.parametrize("strength", ["1", "0.01"])
@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
def test_matrix(name, strength, solver, monkeypatch):
    if solver == "lbfgs":
        monkeypatch.setattr("diffcal.calibration.posthoc.affine.NEWTON_CLASSES", 1)
    case = CASES[f"{name}/{strength}"]
    cls = MatrixScaling if name.startswith("matrix") else DirichletScaling
    made = cls(off_diagonal=float(strength), intercept=float(strength)).fit(VZ, VY)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if solver == "newton" else {"rtol": 1e-4, "atol": 1e-5}
    close(made.weight_, case["weight"], **tolerance)
    close(made.bias_, case["bias"], **tolerance)
    close(made.objective(FitData(Predictions(logits=VZ, labels=VY))), case["objective"])
    if solver == "newton":
        check_metrics(made.predict_proba(EZ), EY, case["test"], loose=True)
        fitted(made.predict_proba(EZ)[:3], case["test_probs_first3"])


def test_ets():
    case = CASES["ets/mse"]
    made = EnsembleTemperatureScaling().fit(VZ, VY)
    fitted(made.temperature_, case["T"])
    fitted(made.weights_, case["weights"])
    p = Predictions(probs=made.predict_proba(VZ), labels=VY)
    close(p.mean_brier / 4, case["objective"])
    check_metrics(made.predict_proba(EZ), EY, case["test"], loose=True)
    fitted(made.predict_proba(EZ)[:5], case["test_probs_first5"])


def test_pts_forward():
    case = CASES["pts/forward"]
    layers = [
        (tensor(layer["weight"]), tensor(layer["bias"])) for layer in case["params"]["layers"]
    ]
    t = row_temperatures(EZ, layers)
    close(t[:8], case["temperature_first8"])
    close((EZ / t[:, None]).softmax(1)[:8], case["test_probs_first8"])


def test_cts_forward():
    case = CASES["cts/forward"]
    t = tensor(case["params"]["T"])
    by_logit = divide_by_class(EZ, t, "logit")
    close(by_logit.softmax(1)[:5], case["per_logit_first5"])
    by_row = divide_by_class(EZ, t, "predicted")
    close(by_row.softmax(1)[:5], case["per_predicted_class_first5"])
    changed = int((by_logit.argmax(1) != EZ.argmax(1)).sum())
    assert changed == case["accuracy_changes_per_logit"]
    assert torch.equal(by_row.argmax(1), EZ.argmax(1))


def test_histogram():
    case = CASES["histogram_binning/top_label"]
    made = HistogramBinning(n_bins=5, scheme="top_label").fit(VZ, VY)
    close(made.values_, case["bin_values"])
    p = made.predict_proba(EZ)
    index = EZ.argmax(1)
    close(p.gather(1, index[:, None])[:, 0], case["test_conf"])
    close(p[:5], case["test_probs_first5"])
    assert int((p.argmax(1) != index).sum()) == case["prediction_changes"]
    case = CASES["histogram_binning/one_vs_rest"]
    made = HistogramBinning(n_bins=5).fit(VZ, VY)
    close(made.values_.reshape(4, 5), case["bin_values"])
    close(made.predict_proba(EZ)[:5], case["test_probs_first5"])


def test_isotonic():
    case = CASES["isotonic/one_vs_rest"]
    made = IsotonicCalibration().fit(VZ, VY)
    close(made.predict_proba(EZ)[:5], case["test_probs_first5"])
    close(made._mapped(EZ.softmax(1))[:5], case["unnormalised_first5"])
    case = CASES["isotonic/multi_class_pooled"]
    made = IsotonicCalibration(scheme="pooled").fit(VZ, VY)
    p = made.predict_proba(EZ)
    close(p[:5], case["test_probs_first5"])
    plain = EZ.softmax(1)
    unnormalised = made.map_value(plain.flatten()).reshape(plain.shape) + 1e-9 * plain
    close(unnormalised[:5], case["unnormalised_first5"])
    assert int((p.argmax(1) != plain.argmax(1)).sum()) == case["prediction_changes"] == 0


def test_group():
    case = CASES["group_calibration/forward"]
    weights = tensor(case["params"]["partition_weights"])
    log_p = soft_group_log_probs(EH, EZ, weights[0], tensor(case["params"]["soft_tau"]))
    close(log_p[:3], case["soft_log_probs_first3"])
    data = FitData(Predictions(logits=VZ, labels=VY), VH)
    made = GroupCalibration(min_count=1).fit_groups(data, weights)
    fitted(made.temperatures_, case["group_temperatures"])
    p = made.predict_proba(EZ, features=EH)
    check_metrics(p, EY, case["ensemble_test"], loose=True)
    fitted(p[:5], case["ensemble_test_probs_first5"])


def test_procal():
    case = CASES["procal/density_ratio"]
    k = case["params"]["k"]
    close(proximity(None, VH, k)[:8], case["val_proximity_first8"])
    close(proximity(EH, VH, k)[:8], case["test_proximity_first8"])
    close(proximity(EH, VH, k, average_first=True)[:8], case["alt_test_proximity_first8"])
    made = DensityRatioCalibration(neighbours=k, bandwidth=tuple(case["params"]["bandwidth"]))
    p = made.fit(VZ, VY, features=VH).predict_proba(EZ, features=EH)
    close(p.gather(1, EZ.argmax(1)[:, None])[:8, 0], case["test_conf_first8"])


@pytest.mark.parametrize("noise", ["gaussian", "uniform", "gumbel"])
@pytest.mark.parametrize("name", [key for key in CASES if key.startswith("consistency/C")])
def test_exact_consistency(name, noise):
    case = CASES[name]
    z = tensor(FIXTURES[case["fixture"]]["logits"])
    p = exact_consistency(z, case["params"]["eps"], noise)
    close(p, case[noise])
    single = exact_consistency(z.float(), case["params"]["eps"], noise)
    assert single.dtype == torch.float32
    close(single, case[noise], rtol=1e-5, atol=2e-6)


def test_explicit_noise():
    case = CASES["consistency/explicit_noise"]
    z = tensor(FIXTURES["C"]["logits"])[case["params"]["rows"]]
    noise = tensor(case["params"]["noise"])
    counts = consistency_counts(z, noise, case["params"]["eps"])
    assert counts.tolist() == case["counts"]
    close(smoothed(counts, 0.0), case["probs"])
    close(smoothed(counts, 1.0), case["laplace1"])
    close(mean_probabilities(z, noise, case["params"]["eps"]), case["mean_softmax"])


def test_consistency_fit():
    case = CASES["consistency/fit_nll_gaussian"]
    made = ConsistencyCalibration().fit(VZ, VY)
    assert made.epsilon == pytest.approx(case["eps"], abs=case["eps_tolerance"])
    check_metrics(made.predict_proba(VZ), VY, case["val"], loose=True)
    check_metrics(made.predict_proba(EZ), EY, case["test"], loose=True)


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_consistency_ece_curve(noise):
    case = CASES["consistency/ece_curve"]
    data = FitData(Predictions(logits=VZ, labels=VY))
    values = [
        criterion_value(data, exact_consistency(VZ, eps, noise).log(), "ece")
        for eps in case["params"]["grid"]
    ]
    close(values, case[f"{noise}_ece"], rtol=0, atol=1e-9)
    assert case["params"]["grid"][int(np.argmin(values))] == case[f"{noise}_best"]
    made = ConsistencyCalibration(noise=noise, criterion="ece").fit(VZ, VY)
    log_p = made.predict_proba(VZ).log()
    assert criterion_value(data, log_p, "ece") <= min(values) + 1e-9  # the finer search is no worse


@pytest.mark.parametrize("criterion", ["nll", "ece"])
def test_feature_clipping(criterion):
    case = CASES[f"feature_clipping/{criterion}"]
    stage = FeatureClipping(criterion=criterion, grid="released").with_head(WEIGHT, BIAS)
    made = Pipeline.of(stage, TemperatureScaling()).fit(VZ, VY, features=VH)
    assert stage.threshold == pytest.approx(case["c"], abs=case["c_tolerance"])
    data = FitData(Predictions(logits=VZ, labels=VY), VH)
    log_p = stage.calibrated_logits(VZ, features=VH).log_softmax(1)
    # the fixture's logits are rounded to six digits and rows that nothing clips keep them
    value = criterion_value(data, log_p, criterion)
    assert value == pytest.approx(case["val_value"], abs=2e-6)
    z = stage.calibrated_logits(EZ, features=EH)
    close(z[:5], case["test_logits_first5"], rtol=0, atol=1e-6)
    check_metrics(z.softmax(1), EY, case["test"], loose=True)
    scaling = made.stages[1]
    assert scaling.temperature == pytest.approx(case["then_temperature"], rel=1e-5)
    p = made.predict_proba(EZ, features=EH)
    check_metrics(p, EY, case["then_temperature_test"], loose=True)


@pytest.mark.parametrize("criterion", ["nll", "ece"])
def test_feature_clipping_without_floor(criterion):
    case = CASES[f"feature_clipping/{criterion}"]
    stage = FeatureClipping(criterion=criterion, grid="released", min_accuracy_ratio=0.0)
    stage.with_head(WEIGHT, BIAS).fit(VZ, VY, features=VH)
    assert stage.threshold == pytest.approx(case["c_without_accuracy_constraint"], abs=1e-6)


def test_clipping_forward():
    case = CASES["feature_clipping/forward"]
    for c in case["params"]["thresholds"]:
        z = EH.clamp(-c, c) @ WEIGHT.T + BIAS
        close(z[:3], case["test_logits_first3"][str(c)], rtol=0, atol=1e-9)
    case = CASES["logit_clipping/forward"]
    made = LogitClipping().fit(VZ, VY)
    for c in case["params"]["thresholds"]:
        made.threshold_ = torch.tensor(c)
        expected = case["test_probs_first3"]
        expected = expected[str(c)] if isinstance(expected, dict) else expected
        close(made.predict_proba(EZ)[:3], expected)


def test_entropy_change():
    for row in CASES["feature_clipping/entropy_change"]["rows"]:
        assert clipped_entropy_change(row["sigma"], row["c"]) == pytest.approx(
            row["delta_H"], rel=1e-9, abs=1e-11
        )
