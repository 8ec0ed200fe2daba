"""Soft-target losses: golden values, gradients, the contract, stability."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from diffcal.calibration.losses.registry import build_loss
from diffcal.calibration.losses.soft_target import (
    cross_entropy,
    csm_objective,
    kl_divergence,
    squared_error,
)
from diffcal.errors import ConfigError, DataError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/soft_target_losses.json").read_text())
FUNCTIONS = {
    "cross_entropy": cross_entropy,
    "kl_divergence": kl_divergence,
    "squared_error": squared_error,
}


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(function, logits, targets, **kwargs):
    logits = logits.clone().requires_grad_()
    value = function(logits, targets, **kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


@pytest.mark.parametrize("row", GOLDEN["loss_rows"]["rows"])
def test_golden_rows(row):
    z, q = f64([row["logits"]]), f64([row["target"]])
    for function, name, gradient in (
        (cross_entropy, "soft_ce", "grad_soft_ce"),
        (kl_divergence, "kl_target_model", "grad_soft_ce"),
        (squared_error, "l2_brier", "grad_l2"),
    ):
        value, grad = value_and_gradient(function, z, q, reduction="none")
        torch.testing.assert_close(value, f64([row[name]]), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grad, f64([row[gradient]]), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["id"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_golden_cases(case, dtype):
    fixture = GOLDEN["fixtures"][case["fixture"]]
    logits = f64(fixture["logits"]).to(dtype)
    raw = torch.tensor(fixture["targets"], dtype=torch.float64)
    targets = raw.to(dtype) if raw.shape == logits.shape else raw.long()
    name = "squared_error" if case["loss"] == "brier" else "cross_entropy"
    params = {"smoothing": 0.05} if case["loss"] == "label_smoothing" else {}
    values, _ = value_and_gradient(FUNCTIONS[name], logits, targets, reduction="none", **params)
    mean, grad = value_and_gradient(build_loss(name, **params), logits, targets)
    if dtype == torch.float32 and case["fixture"] == "X":
        assert values.isfinite().all()
        assert grad.isfinite().all()
        return
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-6}
    )
    torch.testing.assert_close(values.double(), f64(case["per_sample"]), **tolerance)
    torch.testing.assert_close(values.sum().double(), f64(case["sum"]), **tolerance)
    torch.testing.assert_close(mean.double(), f64(case["mean"]), **tolerance)
    torch.testing.assert_close(grad.double(), f64(case["grad_of_mean"]), **tolerance)


def test_golden_objective():
    case = GOLDEN["csm_objective"]
    inputs, expected = case["inputs"], case["expected"]
    real, mixed = f64(inputs["real_logits"]), f64(inputs["mix_logits"])
    real.requires_grad_()
    mixed.requires_grad_()
    labels, targets = torch.tensor(inputs["real_labels"]), f64(inputs["mix_targets"])
    objective = csm_objective(real, labels, mixed, targets)
    torch.testing.assert_close(objective.real.detach(), f64(expected["ce"]), rtol=1e-12, atol=0)
    torch.testing.assert_close(objective.mixed.detach(), f64(expected["l2"]), rtol=1e-12, atol=0)
    torch.testing.assert_close(objective.total.detach(), f64(expected["total"]), rtol=1e-12, atol=0)
    grads = torch.autograd.grad(objective.total, (real, mixed))
    torch.testing.assert_close(grads[0], f64(case["grad_real_logits"]), rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(grads[1], f64(case["grad_mix_logits"]), rtol=1e-11, atol=1e-15)
    other = csm_objective(real, labels, mixed, targets, "cross_entropy", 1.0)
    torch.testing.assert_close(
        other.total.detach(), f64(expected["alt_total_ce_plus_softce"]), rtol=1e-12, atol=0
    )
    halved = csm_objective(real, labels, mixed, targets, squared_error, 0.5)
    torch.testing.assert_close(halved.total, halved.real + 0.5 * halved.mixed, rtol=1e-12, atol=0)
    alone = csm_objective(real, labels, None, None)
    torch.testing.assert_close(alone.total, objective.real, rtol=0, atol=0)


def test_every_loss_is_proper():
    case = GOLDEN["both_losses_proper"]
    for function in FUNCTIONS.values():
        _, grad = value_and_gradient(
            function, f64([case["logits_at_optimum"]]), f64([case["target"]])
        )
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-15)


def test_cost_of_an_error_against_confidence():
    for row in GOLDEN["error_cost_vs_confidence"]["rows"]:
        q, p = f64([[row["q"], 1 - row["q"]]]), f64([[row["p"], 1 - row["p"]]])
        torch.testing.assert_close(
            kl_divergence(p.log(), q), f64(row["kl_q_p"]), rtol=1e-10, atol=0
        )
        torch.testing.assert_close(squared_error(p.log(), q), f64(row["l2"]), rtol=1e-10, atol=0)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 7), st.sampled_from(sorted(FUNCTIONS))
)
def test_properties(seed, n, k, name):
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, k, generator=generator, dtype=torch.float64)
    y = torch.randint(k, (n,), generator=generator)
    q = torch.rand(n, k, generator=generator, dtype=torch.float64).softmax(1)
    loss = build_loss(name, reduction="none")
    hard, hard_grad = value_and_gradient(loss, z, y)
    soft, soft_grad = value_and_gradient(loss, z, F.one_hot(y, k).double())
    torch.testing.assert_close(soft, hard, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(soft_grad, hard_grad, rtol=1e-12, atol=1e-12)
    value, grad = value_and_gradient(loss, z, q)
    torch.testing.assert_close(grad.sum(1), torch.zeros(n).double(), rtol=0, atol=1e-12)
    shifted, _ = value_and_gradient(loss, z + 100, q)
    torch.testing.assert_close(shifted, value, rtol=1e-10, atol=1e-10)
    order = torch.randperm(k, generator=generator)
    torch.testing.assert_close(loss(z[:, order], q[:, order]), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(build_loss(name)(z, q) * n, value.sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(build_loss(name, reduction="sum")(z, q), value.sum(), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_gradients_by_differences(name):
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)).double().softmax(1)
    assert torch.autograd.gradcheck(lambda x: FUNCTIONS[name](x, q), z.requires_grad_())


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_half_precision_is_computed_in_float32(name):
    z = torch.tensor([[300.0, -300.0, 0.0], [1.5, 1.0, -2.0]], dtype=torch.bfloat16)
    q = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.25, 0.25]])
    value, grad = value_and_gradient(FUNCTIONS[name], z, q, reduction="none")
    expected, _ = value_and_gradient(FUNCTIONS[name], z.double(), q.double(), reduction="none")
    assert value.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    assert grad.isfinite().all()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16):
        inside = FUNCTIONS[name](z, q, reduction="none")
    torch.testing.assert_close(inside, value, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_ignored_rows_and_class_weights(name):
    function = FUNCTIONS[name]
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, -100, 2, 1, -100])
    kept = y >= 0
    value, grad = value_and_gradient(function, z, y, ignore_index=-100)
    torch.testing.assert_close(value, function(z[kept], y[kept]), rtol=1e-6, atol=1e-7)
    assert (grad[~kept] == 0).all()
    nothing = function(z, torch.full((5,), -100), ignore_index=-100)
    assert float(nothing) == 0
    w = torch.tensor([1.0, 2.0, 0.5])
    weighted = function(z[kept], y[kept], class_weight=w)
    row_weight = w[y[kept]]
    rows = function(z[kept], y[kept], reduction="none")
    expected = (rows * row_weight).sum() / row_weight.sum()
    torch.testing.assert_close(weighted, expected, rtol=1e-6, atol=1e-7)
    soft = function(z[kept], F.one_hot(y[kept], 3).float(), class_weight=w)
    torch.testing.assert_close(soft, weighted, rtol=1e-6, atol=1e-7)


def test_shapes_of_dense_single_and_empty_input():
    z = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    y = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(0))
    assert cross_entropy(z, y, reduction="none").shape == (2, 4, 5)
    torch.testing.assert_close(cross_entropy(z, y), F.cross_entropy(z, y), rtol=1e-6, atol=1e-6)
    assert squared_error(z[:1, :, 0, 0], y[:1, 0, 0]).ndim == 0
    assert float(kl_divergence(z[:0, :, 0, 0], y[:0, 0, 0], reduction="sum")) == 0
    turned = z[:, :, 0, :3].transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(
        cross_entropy(turned, y[:, 0, :3]),
        F.cross_entropy(turned, y[:, 0, :3]),
        rtol=1e-6,
        atol=1e-6,
    )


def test_bad_input_is_named():
    z = torch.zeros(2, 3)
    with pytest.raises(DataError, match="labels run from 0 to 3"):
        cross_entropy(z, torch.tensor([0, 3]))
    with pytest.raises(DataError, match=r"row 1 sums to 1\.5"):
        squared_error(z, torch.tensor([[1.0, 0, 0], [1.0, 0.5, 0]]))
    with pytest.raises(DataError, match="negative"):
        kl_divergence(z, torch.tensor([[1.5, -0.5, 0], [1.0, 0, 0]]))
    with pytest.raises(DataError, match="sums to nan"):
        kl_divergence(z, torch.tensor([[float("nan"), 0, 0], [1.0, 0, 0]]))
    with pytest.raises(DataError, match="logits' shape"):
        cross_entropy(z, torch.ones(2, 4) / 4)
    with pytest.raises(DataError, match="integer targets must have shape"):
        cross_entropy(z, torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match="soft"):
        cross_entropy(z, torch.ones(2, 3) / 3, ignore_index=-100)
    with pytest.raises(ConfigError, match="reduction"):
        build_loss("cross_entropy", reduction="average")
    with pytest.raises(ConfigError, match="smoothing"):
        build_loss("cross_entropy", smoothing=1.5)
    with pytest.raises(ConfigError, match="unknown mixed loss"):
        csm_objective(z, torch.tensor([0, 1]), z, torch.ones(2, 3) / 3, "l3")
    with pytest.raises(ConfigError, match="negative"):
        csm_objective(z, torch.tensor([0, 1]), z, torch.ones(2, 3) / 3, weight=-1.0)
    with pytest.raises(DataError, match="one shape"):
        csm_objective(z, torch.tensor([0, 1]), z, torch.ones(3, 3) / 3)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("squared_eror", {}, "did you mean 'squared_error'"),
        ("L2", {}, "did you mean 'squared_error'"),
        ("label_smoothing", {}, "did you mean 'cross_entropy'"),
        ("zzz", {}, "known losses: acls"),
        ("cross_entropy", {"smothing": 0.1}, "did you mean 'smoothing'"),
        ("squared_error", {"gamma": 2.0}, "has no parameter 'gamma'"),
    ],
)
def test_registry_refuses_with_a_hint(name, params, words):
    with pytest.raises(ConfigError, match=words):
        build_loss(name, **params)
