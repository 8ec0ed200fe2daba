"""Every golden case, computed once by an independent NumPy implementation and by peers."""

import json
import math
from pathlib import Path

import pytest
import torch

from diffcal.calibration.metrics import binned, classwise, estimators, kernel, ood, proper
from diffcal.calibration.metrics import selective as sel
from diffcal.calibration.metrics.benchmark import (
    BENCHMARK_BINS,
    BENCHMARK_MEASURES,
    benchmark_row,
    benchmark_values,
)
from diffcal.calibration.metrics.binning import assign_bins, width_edges
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.registry import (
    correct_confidence,
    harmonic_calibration_score,
    incorrect_confidence,
)
from diffcal.calibration.metrics.smooth import smooth_calibration_error, smooth_error_at
from diffcal.calibration.metrics.temperature import fit_temperature

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "metrics.json").read_text())["cases"]}
CSM = json.loads((GOLDEN / "csm.json").read_text())["cases"]
MULTICLASS = [name for name, case in CASES.items() if case["kind"] == "multiclass"]
TOLERANCE = {"KDECE": 2e-4, "MMCE": 1e-8}

BINNED = {
    "ECE": binned.expected_calibration_error,
    "ECE_em": lambda p, b: binned.expected_calibration_error(p, b, "mass"),
    "ECE_rank": lambda p, b: binned.expected_calibration_error(p, b, "rank"),
    "cwCE": classwise.classwise_calibration_error,
    "cwCE_em": lambda p, b: classwise.classwise_calibration_error(p, b, "mass"),
    "MCE": binned.maximum_calibration_error,
    "RMSCE": binned.root_mean_square_calibration_error,
    "ACEavg": binned.average_calibration_error,
    "OE_weighted": binned.over_confidence_error,
    "UE_weighted": binned.under_confidence_error,
    "over_part": binned.over_confidence_part,
    "under_part": binned.under_confidence_part,
    "signed": lambda p, b: binned.over_confidence_part(p, b) - binned.under_confidence_part(p, b),
}
SCALAR = {
    "accuracy": lambda p: p.mean_outcome,
    "mean_confidence": lambda p: float(p.confidence.mean()),
    "confidence_minus_accuracy": binned.calibration_gap,
    "correct_confidence": correct_confidence,
    "incorrect_confidence": incorrect_confidence,
    "nll": proper.negative_log_likelihood,
    "brier_sum": proper.brier_score,
    "brier_mean_over_classes": lambda p: proper.brier_score(p, "mean_over_classes"),
    "brier_top_label": proper.brier_top_label,
    "entropy_mean": proper.mean_entropy,
    "KSCE": kernel.ks_calibration_error,
    "KSCE_classwise": kernel.classwise_ks_error,
    "MMCE": kernel.maximum_mean_calibration_error,
    "MMCE_squared": lambda p: kernel.maximum_mean_calibration_error(p) ** 2,
    "SKCE_unbiased": kernel.squared_kernel_calibration_error,
    "KDECE": kernel.kernel_density_calibration_error,
    "ECE_sweep": lambda p: estimators.sweep_calibration_error(p).value,
    "ECE_sweep_bins": lambda p: estimators.sweep_calibration_error(p).n_bins,
    "debiased_L2_top_15": estimators.debiased_calibration_error,
    "debiased_L2_marginal_15": estimators.debiased_classwise_error,
    "ACE_nixon_15": classwise.adaptive_calibration_error,
    "TACE_nixon_15_1e-3": lambda p: classwise.adaptive_calibration_error(p, threshold=1e-3),
    "TACE_nixon_15_1e-2": lambda p: classwise.adaptive_calibration_error(p, threshold=1e-2),
    "smECE": smooth_calibration_error,
    "smECE_sigma_0.05": lambda p: smooth_error_at(p, 0.05),
    "HCS_15": lambda p: harmonic_calibration_score(
        p.mean_outcome, binned.expected_calibration_error(p)
    ),
}
SELECTIVE = {
    "aurc": sel.area_under_risk_coverage,
    "aurc_optimal": sel.optimal_area_under_risk_coverage,
    "e_aurc": sel.excess_area_under_risk_coverage,
    "e_aurc_geifman": lambda p: sel.excess_area_under_risk_coverage(p, geifman=True),
    "augrc": sel.area_under_generalised_risk_coverage,
    "auroc": sel.auroc_of_confidence,
}


def predictions(case, rows=slice(None)):
    key = "probs" if "probs" in case else "logits"
    scores = torch.tensor(case[key], dtype=torch.float64)[rows]
    return Predictions(**{key: scores}, labels=torch.tensor(case["labels"])[rows])


def close(got, want, name="", tolerance=None):
    if want is None:  # undefined or infinite
        assert not math.isfinite(got), name
        return
    tolerance = tolerance or (1e-5 if name.startswith("smECE") else TOLERANCE.get(name, 1e-10))
    assert abs(got - want) <= tolerance, f"{name}: {got} instead of {want}"


@pytest.mark.parametrize("name", MULTICLASS)
def test_multiclass_case(name):
    case = CASES[name]
    p, expected = predictions(case), dict(case["expected"])
    for bins in case["n_bins"]:
        for family, metric in BINNED.items():
            close(metric(p, bins), expected.pop(f"{family}_{bins}"), f"{family}_{bins}")
    for key, metric in SCALAR.items():
        if key in expected:
            close(metric(p), expected.pop(key), key)
    split = proper.brier_decomposition(p)
    for key, want in expected.pop("brier_decomposition_15").items():
        close(getattr(split, "brier" if key == "brier_top" else key), want, key)
    selective = expected.pop("selective")
    for key, metric in SELECTIVE.items():
        close(metric(p), selective.pop(key), key)
    for coverage, want in selective.pop("selective_accuracy").items():
        close(sel.selective_accuracy(p, float(coverage)), want, coverage)
    for risk, want in selective.pop("coverage_at_risk").items():
        close(sel.coverage_at_risk(p, float(risk)), want, risk)
    expected.pop("KSCE_untied_scan", None)  # depends on the order of ties; not offered
    assert not expected, "golden values that nothing was compared with"
    assert not selective


def test_binary_case():
    case = CASES["binary80"]
    probability = torch.tensor(case["probs"], dtype=torch.float64)
    p, expected = Confidences(probability, torch.tensor(case["labels"])), dict(case["expected"])
    families = {
        **{key: BINNED[key] for key in ("ECE", "ECE_em", "MCE", "RMSCE")},
        "debiased_L2": estimators.debiased_calibration_error,
        "debiased_L2_squared": estimators.debiased_squared_error,
    }
    for bins in (5, 10, 15):
        for key, metric in families.items():
            close(metric(p, bins), expected.pop(f"{key}_{bins}"), key)
    scalar = {
        "smECE": smooth_calibration_error,
        "smECE_sigma_0.05": lambda p: smooth_error_at(p, 0.05),
        "smECE_sigma_0.2": lambda p: smooth_error_at(p, 0.2),
        "KS": kernel.ks_calibration_error,
        "brier": proper.brier_top_label,
        "nll": lambda p: proper.log_decomposition(p).log_loss,
        "MMCE": kernel.maximum_mean_calibration_error,
        "auroc": sel.auroc_of_confidence,
        "average_precision": lambda p: ood.average_precision(
            p.confidence[p.outcome == 1], p.confidence[p.outcome == 0]
        ),
    }
    for key, metric in scalar.items():
        close(metric(p), expected.pop(key), key)
    assert not expected


@pytest.mark.parametrize("name", MULTICLASS)
def test_peers_conventions(name):
    case = CASES[name]
    p, peers = predictions(case), case["peers"]
    compared = 0
    for bins in case["n_bins"]:
        values = {
            f"netcal.ECE_{bins}": binned.expected_calibration_error(p, bins, compat="netcal"),
            f"netcal.MCE_{bins}": binned.maximum_calibration_error(p, bins, compat="netcal"),
            f"netcal.ACE_{bins}": binned.average_calibration_error(p, bins, compat="netcal"),
            f"torchmetrics.l1_{bins}": binned.expected_calibration_error(
                p, bins, compat="torchmetrics"
            ),
            f"torchmetrics.l2_{bins}": binned.root_mean_square_calibration_error(
                p, bins, compat="torchmetrics"
            ),
            f"torchmetrics.max_{bins}": binned.maximum_calibration_error(
                p, bins, compat="torchmetrics"
            ),
            f"interp_edges_adaptive_ece_{bins}": binned.expected_calibration_error(
                p, bins, compat="focal"
            ),
            f"uncertainty_calibration.ece_{bins}": binned.expected_calibration_error(p, bins),
            f"uncertainty_calibration.ece_em_{bins}": binned.expected_calibration_error(
                p, bins, "mass"
            ),
        }
        for key, value in values.items():
            if isinstance(peers.get(key), float):
                close(value, peers[key], key, 1e-6)
                compared += 1
    assert compared > 0


def test_temperature_case():
    case = CASES["temperature400x4"]
    expected = case["expected"]
    val, test = (predictions(case, slice(*case[rows])) for rows in ("val_rows", "test_rows"))
    fit = fit_temperature(val)
    close(fit.temperature, expected["temperature_nll"], tolerance=1e-5)
    close(fit.loss, expected["val_nll_at_T"], tolerance=1e-8)
    close(proper.negative_log_likelihood(val), expected["val_nll_at_1"])
    assert fit_temperature(val, "nll", "grid").temperature == expected["temperature_grid_0p1_nll"]
    assert fit_temperature(val, "ece", "grid").temperature == expected["temperature_grid_0p1_ece15"]
    for state, part, tolerance in (
        ("pre", test, None),
        ("post", test.scaled(expected["temperature_nll"]), 1e-6),
    ):
        values = benchmark_values(part)
        values |= {
            "NLL": values["NLL"],
            "Brier_mean_over_classes": values["Brier"],
            "accuracy": part.mean_outcome,
        }
        for key, want in expected[state].items():
            close(values[key], want, key, tolerance)


@pytest.mark.parametrize("protocol", ["official", "same_rows"])
def test_benchmark_row(protocol):
    case = CASES["temperature400x4"]
    row = benchmark_row(
        torch.tensor(case["logits"], dtype=torch.float64),
        torch.tensor(case["labels"]),
        protocol=protocol,
        val_rows=torch.arange(*case["val_rows"]),
    )
    for key, want in CASES["benchmark_row"][f"{protocol}_protocol"].items():
        tolerance = 2e-4 if key.endswith("KDECE") else 1e-6
        close(row[key], want, key, tolerance)
    measures = {key for key in row if key.startswith(("pre_", "post_"))}
    assert measures == set(BENCHMARK_MEASURES) - {"auc_cifar10c", "auc_svhn"}


def test_benchmark_has_102_measures():
    assert len(BENCHMARK_MEASURES) == len(set(BENCHMARK_MEASURES)) == 102
    binned_names = [name for name in BENCHMARK_MEASURES if name.rsplit("_", 1)[-1].isdigit()]
    assert len(binned_names) == 5 * len(BENCHMARK_BINS) * 2 == 90


def test_ood_case():
    case = CASES["ood_ties"]
    inside, outside = (torch.tensor(case[key]) for key in ("scores_in", "scores_out"))
    report, expected = ood.ood_report(inside, outside), case["expected"]
    for key in ("auroc", "aupr_in", "aupr_out", "fpr95", "fpr80", "detection_error"):
        close(getattr(report, key), expected[key], key)
    threshold = ood.false_positive_rate(inside.double(), outside.double())[1]
    close(threshold, expected["fpr95_threshold"], tolerance=1e-6)


def test_hcs_case():
    for row in CASES["hcs"]["rows"]:
        close(harmonic_calibration_score(row["acc"], row["ece"], row["beta"]), row["expected"])


def test_csm_calibration_metrics():
    case = CSM["calibration_metrics"]
    p, expected = predictions(case["inputs"]), case["expected"]
    values = {
        **{f"ece_{bins}": binned.expected_calibration_error(p, bins) for bins in (5, 10, 15)},
        "aece_reference_5": binned.expected_calibration_error(p, 5, compat="focal"),
        "aece_reference_15": binned.expected_calibration_error(p, 15, compat="focal"),
        "aece_equal_mass_5": binned.expected_calibration_error(p, 5, "mass"),
        "classwise_ece_15": classwise.classwise_calibration_error(p),
        "nll": proper.negative_log_likelihood(p),
        "accuracy": p.mean_outcome,
        "brier_sum": proper.brier_score(p),
    }
    for key, value in values.items():
        close(value, expected[key], key, 1e-9)
    per_class = classwise.classwise_calibration_errors(p)
    torch.testing.assert_close(
        per_class,
        torch.tensor(expected["classwise_ece_15_per_class"], dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )
    # the release averages over the classes up to the largest label it has seen
    close(float(per_class[:2].mean()), expected["classwise_ece_15_reference_labels_seen_only"])


def test_csm_bin_edge_rule():
    case = CSM["bin_edge_rule"]
    p = predictions(case)
    index = assign_bins(p.confidence, width_edges(case["n_bins"]))
    assert index.tolist() == case["expected_bin_index"]
    close(binned.expected_calibration_error(p, case["n_bins"]), case["expected_ece"])


def test_csm_temperature_grid():
    case, inputs = CSM["temperature_grid"], CSM["calibration_metrics"]["inputs"]
    logits = torch.tensor(inputs["probs"], dtype=torch.float64).log()
    p = Predictions(logits=logits, labels=torch.tensor(inputs["labels"]))
    for objective, name in (("ece", "ece15"), ("nll", "nll")):
        fit = fit_temperature(p, objective, "grid")
        assert fit.temperature == case[f"best_T_by_{name}"]
        close(fit.loss, case[f"{objective}_at_best"], tolerance=1e-8)


def test_csm_ood_auroc():
    case = CSM["ood_auroc"]
    inside, outside = (torch.tensor(case[key]) for key in ("in_confidence", "out_confidence"))
    close(ood.ood_auroc(inside, outside), case["auroc"])
