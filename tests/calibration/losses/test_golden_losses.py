"""Every golden case of the calibration losses, whole and in blocks, and what must not be reproduced."""

import pytest
import torch

from diffcal.calibration.losses import row_blocks
from diffcal.calibration.losses.dual_focal import dual_focal_gra
from diffcal.calibration.losses.entropy_penalty import entropy_penalty
from diffcal.calibration.losses.focal import flsd_gamma, focal_gradient_ratio
from diffcal.calibration.losses.mmce import weighted_mmce_term
from diffcal.calibration.losses.rank_mixup import rank_mixup_mndcg_term, rank_mixup_mrl_term
from tests.calibration.losses.cases import GOLDEN, call, f64, fixture, value_and_gradient

CASES = [
    case for case in GOLDEN["cases"] if not case["loss"].startswith(("informative", "rankmixup"))
]
BY_ID = {case["id"]: case for case in GOLDEN["cases"]}
EXACT = {"rtol": 1e-9, "atol": 1e-11}
SINGLE = {"rtol": 2e-4, "atol": 2e-6}


def check(case, dtype):
    logits, targets = fixture(case["fixture"], dtype)
    tolerance = EXACT if dtype == torch.float64 else SINGLE
    if case["kind"] == "batch":
        value, grad = value_and_gradient(lambda z: call(case, z, targets), logits)
        torch.testing.assert_close(value.double(), f64(case["scalar"]), **tolerance)
        torch.testing.assert_close(grad.double(), f64(case["grad_of_scalar"]), **tolerance)
        return
    values, _ = value_and_gradient(lambda z: call(case, z, targets, reduction="none"), logits)
    mean, grad = value_and_gradient(lambda z: call(case, z, targets), logits)
    if dtype == torch.float32 and case["fixture"] == "X":
        assert values.isfinite().all()
        assert grad.isfinite().all()
        rows = [0, 1, 2, 4, 5]  # row 3 underflows in float32
        expected = f64(case["per_sample"])[rows]
        torch.testing.assert_close(values[rows].double(), expected, rtol=1e-3, atol=2e-6)
        return
    torch.testing.assert_close(values.double(), f64(case["per_sample"]), **tolerance)
    torch.testing.assert_close(values.sum().double(), f64(case["sum"]), **tolerance)
    torch.testing.assert_close(mean.double(), f64(case["mean"]), **tolerance)
    expected = f64(case["grad_of_mean"])
    if case["id"] in ("bsce_n1_g1/S", "bsce_n2_g1/S"):
        # the last row has p = q to 1e-12: the norm's direction, lost in float32, is taken as 0, and
        # in float64 known to the rounding of p over that distance
        if dtype == torch.float32:
            assert (grad[-1] == 0).all()
        else:
            torch.testing.assert_close(grad[-1], expected[-1], rtol=1e-3, atol=0)
        grad, expected = grad[:-1], expected[:-1]
    torch.testing.assert_close(grad.double(), expected, **tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_golden_case(case):
    for dtype in (torch.float64, torch.float32):
        check(case, dtype)


BLOCKED = [case for case in CASES if case["kind"] == "per_sample" or "mbls" in case["id"]]


@pytest.mark.parametrize("case", BLOCKED, ids=lambda case: case["id"])
def test_golden_case_in_blocks_of_either_layout(case, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 8)  # one or two rows
    for first in (0, 100):
        monkeypatch.setattr(row_blocks, "CLASSES_FIRST", first)
        check(case, torch.float64)


def test_every_case_is_tested():
    assert len(CASES) + 2 + 2 == len(GOLDEN["cases"]) == 156


def test_released_dual_focal_gra_on_request_only():
    case = BY_ID["RELEASED_dual_focal_gra_g5/A"]
    logits, targets = fixture("A")
    expected = f64(case["grad_of_mean"])
    _, grad = value_and_gradient(dual_focal_gra, logits, targets, released=True)
    torch.testing.assert_close(grad, expected, **EXACT)
    _, grad = value_and_gradient(dual_focal_gra, logits, targets)
    assert (grad - expected).abs().max() > 1.2 / 8  # the gap is 1.26 on the scale of sums


def test_released_weighted_mmce_on_request_only():
    case = BY_ID["RELEASED_mmce_w/A"]
    logits, targets = fixture("A")
    value, grad = value_and_gradient(weighted_mmce_term, logits, targets, released=True)
    torch.testing.assert_close(value, f64(case["scalar"]), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad, f64(case["grad_of_scalar"]), rtol=1e-9, atol=1e-11)
    value, _ = value_and_gradient(weighted_mmce_term, logits, targets)
    assert value > 3 * case["scalar"]


def test_released_entropy_penalty_averages_over_classes():
    logits, targets = fixture("A")
    ours = entropy_penalty(logits, targets, alpha=0.02, reduction="none")
    released = entropy_penalty(logits, targets, alpha=0.1, released=True, reduction="none")
    torch.testing.assert_close(released, ours, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["rankmixup_mndcg/R", "rankmixup_mrl_m2/R"])
def test_rank_mixup(name):
    case, data = BY_ID[name], GOLDEN["fixtures"]["R"]
    logits = f64(data["logits"]).requires_grad_()
    mixed = f64(data["mix_logits"]).reshape(2, 8, 5).requires_grad_()
    targets = f64(data["mix_targets"]).reshape(2, 8, 5)
    if "mrl" in name:
        values = rank_mixup_mrl_term(logits, mixed[:1], targets[:1], margin=2.0)
        released = rank_mixup_mrl_term(logits, mixed[:1], targets[:1], released=True)
        torch.testing.assert_close(released.mean().item(), 1.7056875, rtol=1e-9, atol=0)
    else:
        values = rank_mixup_mndcg_term(logits, mixed, targets)
    torch.testing.assert_close(values.detach(), f64(case["per_sample"]), **EXACT)
    grads = torch.autograd.grad(values.mean(), (logits, mixed))
    expected = f64(case["grad_of_mean_mix"])
    torch.testing.assert_close(grads[0], f64(case["grad_of_mean"]), **EXACT)
    flat = grads[1].reshape(-1, 5)
    torch.testing.assert_close(flat[: len(expected)], expected, **EXACT)
    assert (flat[len(expected) :] == 0).all()


def test_table_of_focal_gradient_ratios():
    for row in GOLDEN["tables"]["focal_gradient_ratio_g"]["rows"]:
        found = focal_gradient_ratio(f64(row["p"]), row["gamma"])
        torch.testing.assert_close(found, f64(row["g"]), rtol=1e-12, atol=0)
    for row in GOLDEN["tables"]["focal_gradient_ratio_extrema"]:
        p = f64(row["p_of_max"]).requires_grad_()
        top = focal_gradient_ratio(p, row["gamma"])
        (slope,) = torch.autograd.grad(top, p)
        torch.testing.assert_close(top.detach(), f64(row["g_max"]), rtol=1e-12, atol=0)
        assert abs(slope) < 1e-6
        back = focal_gradient_ratio(f64(row["p_where_g_returns_to_1"]), row["gamma"])
        torch.testing.assert_close(back, f64(1.0), rtol=1e-9, atol=0)


def test_table_of_flsd_gammas():
    for row in GOLDEN["tables"]["flsd_gamma_for_p0"]["rows"]:
        assert flsd_gamma(row["p0"]) == pytest.approx(row["gamma_closed_form"], rel=1e-10)
        found = focal_gradient_ratio(f64(row["p0"]), flsd_gamma(row["p0"]))
        torch.testing.assert_close(found, f64(1.0), rtol=1e-9, atol=0)
