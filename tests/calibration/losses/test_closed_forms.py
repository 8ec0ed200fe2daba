"""The closed forms of blocks against the plain formulas that autograd differentiates."""

import pytest
import torch

from diffcal.calibration.losses import dual_focal, expected_gap, row_blocks
from diffcal.calibration.losses.adaptive_dual_focal import dual_focal_by_gap
from diffcal.calibration.losses.class_weights import StepPower, TopLabelBrier
from diffcal.calibration.losses.contract import Rows
from diffcal.calibration.losses.expectation import expected_weighted_loss
from diffcal.calibration.losses.row_statistics import row_statistics
from diffcal.calibration.losses.statistics_blocks import Excess
from tests.calibration.losses.cases import value_and_gradient

EXACT = {"rtol": 1e-10, "atol": 1e-12}
WANTED = {
    "all": {"uniform": True, "entropy": True, "power": 2.0},
    "uniform": {"uniform": True},
    "entropy": {"entropy": True},
    "distance 1": {"power": 1.0},
    "distance 1.5": {"power": 1.5},
    "distance 3": {"power": 3.0, "entropy": True},
    "below": {"below": True, "uniform": True},
    "top": {"top": True},
    "excess": {"excess": Excess(1.5)},
    "squared excess": {"top": True, "excess": Excess(1.0, power=2, held=True)},
    "moving squared excess": {"top": True, "excess": Excess(1.0, power=2)},
}
WEIGHTS = {
    "gamma 3": StepPower((3.0,)),
    "gamma 0.5": StepPower((0.5,)),
    "gamma 0": StepPower((0.0,)),
    "gamma 1": StepPower((1.0,)),
    "constant": StepPower((5.0,), constant=True),
    "inverse": StepPower((-2.0,)),
    "steps": StepPower((5.0, 3.0, 2.0), (0.2, 0.5), edge_above=True),
    "both sides": StepPower(torch.tensor([0.7, 0.7, -1.3, 4.0]), torch.tensor([0.05, 0.2, 0.6])),
    "top label": TopLabelBrier(2.0),
}


def rows_of(kind, k, n=9):
    generator = torch.Generator().manual_seed(k)
    z = 2 * torch.randn(n, k, generator=generator, dtype=torch.float64)
    z[1, 1:4] = z[1].amax() + 1  # ties at the top
    z[2, :3] = torch.tensor([7.0, 5.0, 5.0])  # ties below the label
    z[2, 3:] = 0
    z[3, 0] = z[3].amin() - 1
    z[4, 2] = 60  # p is 1 to rounding
    y = torch.randint(k, (n,), generator=generator)
    y[1], y[2], y[3], y[4] = 2, 0, 0, 2
    if kind == "hard":
        return z, y, None
    q = torch.rand(n, k, generator=generator, dtype=torch.float64)
    q[5:, 2:] = 0  # classes without mass
    return z, None, q / q.sum(1, keepdim=True)


def both_ways(function, z, y, q, monkeypatch):
    """Values and gradient, plain and by blocks of few rows, for a function of rows."""
    found = []
    for size in (1 << 16, 3 * z.shape[1]):
        monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", size)
        x = z.clone().requires_grad_()
        assert row_blocks.in_blocks(x, q) == (size < 1 << 16)
        values = function(Rows(x, y, q, None, (len(z),)))
        slopes = torch.linspace(-1, 2, values.numel(), dtype=torch.float64).reshape(values.shape)
        weight = torch.where(values.isfinite(), slopes, 0)
        (grad,) = torch.autograd.grad((torch.where(values.isfinite(), values, 0) * weight).sum(), x)
        found.append((values.detach(), grad))
    return found


@pytest.mark.parametrize("k", [5, 40])  # classes along either axis
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("name", WANTED)
def test_row_statistics(name, kind, k, monkeypatch):
    wanted = WANTED[name]
    if kind == "soft" and "below" in wanted:
        pytest.skip("hard labels only")

    def function(rows):
        found = row_statistics(rows, **wanted)
        fields = ("cross_entropy", "uniform", "entropy", "distance", "below", "top", "excess")
        values = [getattr(found, field) for field in fields]
        assert sum(v is not None for v in values) == 1 + sum(
            1 for v in wanted.values() if v is not False
        )
        return torch.stack([v for v in values if v is not None])

    (plain, plain_grad), (blocked, grad) = both_ways(function, *rows_of(kind, k), monkeypatch)
    torch.testing.assert_close(blocked, plain, **EXACT)
    torch.testing.assert_close(grad, plain_grad, **EXACT)


@pytest.mark.parametrize("k", [5, 40])
@pytest.mark.parametrize("name", WEIGHTS)
def test_expected_losses(name, k, monkeypatch):
    weight = WEIGHTS[name]
    rows = rows_of("soft", k)
    if name == "top label":
        rows[0][1, 1] += 0.5  # which of tied classes is the top one is arbitrary
    (plain, plain_grad), (blocked, grad) = both_ways(
        lambda r: expected_weighted_loss(r, weight), *rows, monkeypatch
    )
    torch.testing.assert_close(blocked, plain, **EXACT)
    torch.testing.assert_close(grad, plain_grad, **EXACT)


@pytest.mark.parametrize("name", ["dual_focal", "dual_focal_gra"])
def test_dual_focal_of_few_classes_without_sorting(name, monkeypatch):
    z, _, q = rows_of("soft", 40)
    z, q = z[5:], q[5:]  # mass on two classes
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 120)
    found = []
    for few in (4, 0):  # by labels, by sorting
        monkeypatch.setattr(dual_focal, "FEW", few)
        found.append(value_and_gradient(getattr(dual_focal, name), z, q, reduction="none"))
    torch.testing.assert_close(found[0], found[1], **EXACT)
    assert dual_focal._few_classes(Rows(z, None, q, None, (4,))) is None
    monkeypatch.setattr(dual_focal, "FEW", 4)
    assert dual_focal._few_classes(Rows(z, None, q, None, (4,))) is not None


GAP_LOSSES = {
    "dual": (dual_focal.dual_focal, {"gamma": 3.0}),
    "dual, any power": (dual_focal.dual_focal, {"gamma": 2.3}),
    "gra": (dual_focal.dual_focal_gra, {"gamma": 5.0}),
    "released gra": (dual_focal.dual_focal_gra, {"gamma": 4.0, "released": True}),
    "by gap": (
        dual_focal_by_gap,
        {"gammas": torch.tensor([4.0, 2.0, 0.7]), "edges": torch.tensor([0.01, 0.3])},
    ),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [2, 5, 40, 70])
@pytest.mark.parametrize("name", GAP_LOSSES)
def test_losses_of_the_gap_below_each_class(name, k, masked, monkeypatch):
    """By pairs and along the order, with ties at the top, below, and of all classes."""
    function, settings = GAP_LOSSES[name]
    generator = torch.Generator().manual_seed(k)
    z = 2 * torch.randn(12, k, generator=generator, dtype=torch.float64)
    z[3:6] = z[3:6].round()
    z[6] = 1.0
    z[7, 0] = 60
    q = torch.rand(12, k, generator=generator, dtype=torch.float64)
    q /= q.sum(1, keepdim=True)
    value, grad = value_and_gradient(function, z, q, reduction="none", **settings)
    if masked:  # one class more, of probability 0
        z, q, grad = (
            torch.cat([x, x.new_full((12, 1), end)], dim=1)
            for x, end in ((z, -torch.inf), (q, 0.0), (grad, 0.0))
        )
    for pairs in (0, 100):
        monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 4 * k)
        monkeypatch.setattr(dual_focal, "FEW", 0)
        monkeypatch.setattr(expected_gap, "PAIRS", pairs)
        blocked = value_and_gradient(function, z, q, reduction="none", validate=False, **settings)
        torch.testing.assert_close(blocked, (value, grad), **EXACT)


def test_excluded_classes_cost_nothing(monkeypatch):
    """A logit of minus infinity, which callers mask classes with, is a class of probability 0."""
    z, y, q = rows_of("soft", 5)
    z, q = z[5:].clone(), q[5:]
    z[:, 4] = -torch.inf
    for function in (
        lambda r: expected_weighted_loss(r, StepPower((3.0,))),
        lambda r: row_statistics(r, entropy=True).entropy,
        lambda r: row_statistics(r, power=2.0).cross_entropy,
    ):
        for values, grad in both_ways(function, z, y, q, monkeypatch):
            few, few_grad = both_ways(function, z[:, :4], y, q[:, :4], monkeypatch)[0]
            torch.testing.assert_close(values, few, **EXACT)
            if grad.isfinite().all():
                torch.testing.assert_close(grad[:, :4], few_grad, **EXACT)
        assert grad.isfinite().all()  # by blocks
