"""What every calibration loss keeps: symmetries, limits, soft one-hot = hard, gradients, bad input."""

import pickle

import pytest
import torch
from torch.nn import functional as F

from diffcal.calibration.losses import row_blocks
from diffcal.calibration.losses.epoch_loss import EpochLoss
from diffcal.calibration.losses.gradient_weighted import uncertainty_weighted
from diffcal.calibration.losses.mixup import mixup
from diffcal.calibration.losses.rank_mixup import mixed_copies
from diffcal.calibration.losses.registry import LOSSES, build_loss
from diffcal.calibration.losses.soft_target import cross_entropy
from diffcal.errors import ConfigError, DataError
from tests.calibration.losses.cases import value_and_gradient

SPECIAL = {"rank_mixup_mndcg", "rank_mixup_mrl"}
NAMES = sorted(set(LOSSES) - SPECIAL)
BATCH = {"mmce", "weighted_mmce", "mdca", "dca", "crl"}
ROWS = [name for name in NAMES if name not in BATCH]
DETACHED = {"bsce_gra", "focal_gra", "dual_focal_gra", "tlbs_gra", "uncertainty_weighted"}
PARAMS = {
    "uncertainty_weighted": {"weight": lambda log_p, q: (log_p.exp() - q).abs().sum(1)},
    "mbls": {"margin": 2.0},  # so that the term acts on logits of this size
    "acls": {"margin": 2.0},
    "cross_entropy": {"smoothing": 0.1},
    "bsce": {"norm": 3.0, "gamma": 1.5},
}


def loss_of(name, **params):
    """``loss(z, y)`` by name, a loss that reads examples getting those of the batch."""
    loss = build_loss(name, **PARAMS.get(name, {}), **params)
    if not isinstance(loss, EpochLoss) or not loss.needs_examples:
        return loss
    loss.begin(100)
    loss.seen.fill_(4.0)
    loss.right.copy_(torch.arange(100) % 5)
    loss.eval()
    return lambda z, y: loss(z, y, torch.arange(len(z)))


def batch(n=7, k=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(n, k, generator=generator, dtype=torch.float64)
    y = torch.randint(k, (n,), generator=generator)
    q = torch.rand(n, k, generator=generator, dtype=torch.float64).pow(3)
    q[0] = F.one_hot(y[0], k)
    return z, y, q / q.sum(1, keepdim=True)


@pytest.mark.parametrize("name", NAMES)
def test_one_hot_is_hard_and_symmetries_hold(name):
    z, y, q = batch()
    loss = loss_of(name)
    hard, hard_grad = value_and_gradient(loss, z, y)
    one_hot, one_hot_grad = value_and_gradient(loss, z, F.one_hot(y, 5).double())
    torch.testing.assert_close(one_hot, hard, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one_hot_grad, hard_grad, rtol=1e-9, atol=1e-12)
    value, grad = value_and_gradient(loss, z, q)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted, permuted_grad = value_and_gradient(loss, z[:, order], q[:, order])
    torch.testing.assert_close(permuted, value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(permuted_grad, grad[:, order], rtol=1e-9, atol=1e-12)
    if name != "acls":  # bounds the logits themselves
        shifted, _ = value_and_gradient(loss, z + 50, q)
        torch.testing.assert_close(shifted, value, rtol=1e-9, atol=1e-10)
        for slopes in (grad, hard_grad):
            torch.testing.assert_close(slopes.sum(1), torch.zeros(7).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_independent_and_reductions_agree(name):
    z, y, q = batch()
    none = loss_of(name, reduction="none")
    for targets in (y, q):
        values = none(z, targets)
        assert values.shape == (7,)
        alone = torch.cat([none(z[i : i + 1], targets[i : i + 1]) for i in range(7)])
        torch.testing.assert_close(alone, values, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(
            loss_of(name)(z, targets) * 7, values.sum(), rtol=1e-12, atol=1e-14
        )
        torch.testing.assert_close(
            loss_of(name, reduction="sum")(z, targets), values.sum(), rtol=1e-12, atol=1e-14
        )
    dense = z[:6].reshape(2, 3, 5).movedim(2, 1)
    torch.testing.assert_close(
        none(dense, y[:6].reshape(2, 3)), none(z[:6], y[:6]).reshape(2, 3), rtol=1e-11, atol=1e-13
    )
    assert float(loss_of(name, reduction="sum")(z[:0], y[:0])) == 0


@pytest.mark.parametrize("name", [n for n in NAMES if n != "crl"])
def test_ignored_rows_do_not_count(name):
    z, y, _ = batch()
    y = torch.where(torch.tensor([0, 1, 0, 0, 1, 0, 0]).bool(), -100, y)
    z[1, 2] = float("inf") if name in ("cross_entropy", "focal") else z[1, 2]
    for reduction in ("mean", "sum"):
        loss = loss_of(name, ignore_index=-100, reduction=reduction)
        value, grad = value_and_gradient(loss, z, y)
        expected, expected_grad = value_and_gradient(
            loss_of(name, reduction=reduction), z[y >= 0], y[y >= 0]
        )
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(grad[y >= 0], expected_grad, rtol=1e-9, atol=1e-13)
        assert (grad[4] == 0).all()
    assert float(loss(z, torch.full((7,), -100))) == 0


# acls holds the largest logit of its second part constant; its gradients are golden
@pytest.mark.parametrize("name", sorted(set(NAMES) - DETACHED - {"acls"}))
def test_gradients_by_differences(name, monkeypatch):
    z, y, q = batch(2, 5)
    loss = loss_of(name)
    for targets in (y, q):
        assert torch.autograd.gradcheck(lambda x, t=targets: loss(x, t), z.requires_grad_())
    if name in ROWS:  # the closed forms, and gradients of gradients through them
        monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 8)
        for targets in (y, q):
            assert torch.autograd.gradcheck(lambda x, t=targets: loss(x, t), z)
        if name != "mbls":
            assert torch.autograd.gradgradcheck(lambda x: loss(x, q), z)


@pytest.mark.parametrize("name", sorted(DETACHED))
def test_constant_weights_scale_the_gradient_of_cross_entropy(name):
    z, y, q = batch()
    loss = loss_of(name, reduction="none")
    for targets, exact in ((y, True), (q, name in ("bsce_gra", "uncertainty_weighted"))):
        values, grad = value_and_gradient(loss, z, targets)
        distribution = F.one_hot(y, 5).double() if exact and targets is y else q
        if exact:
            weight = values / cross_entropy(z, targets, reduction="none")
            expected = weight[:, None] * (z.softmax(1) - distribution)
        else:  # expectation: each class has a weight of its own
            each = torch.stack(
                [loss(z, torch.full((7,), k)) / -z.log_softmax(1)[:, k] for k in range(5)], dim=1
            )
            weighted = q * each
            expected = weighted.sum(1, keepdim=True) * z.softmax(1) - weighted
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["focal", "inverse_focal", "dual_focal", "bsce", "bsce_gra"])
def test_gamma_zero_is_cross_entropy(name):
    z, y, q = batch()
    for targets in (y, q):
        found = value_and_gradient(build_loss(name, gamma=0.0), z, targets)
        torch.testing.assert_close(
            found, value_and_gradient(cross_entropy, z, targets), rtol=1e-12, atol=1e-14
        )


def test_relations_between_losses():
    z, y, q = batch()
    none = {"reduction": "none"}
    brier, focal = (
        build_loss("bsce", norm=1.0, gamma=2.0, **none),
        build_loss("focal", gamma=2.0, **none),
    )
    torch.testing.assert_close(brier(z, y), 4 * focal(z, y), rtol=1e-12, atol=0)
    two = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    p = two.softmax(1)[:, 0]
    dual = build_loss("dual_focal", gamma=2.0, **none)(two, torch.tensor([0, 0]))
    expected = torch.stack([2 * (1 - p[0]), 1 - p[1]]).square() * -p.log()
    torch.testing.assert_close(dual, expected, rtol=1e-12, atol=0)
    # a wrong class that overtakes the true one drops out of p_j
    row = torch.tensor([[1.0, 0.9, 0.0], [1.0, 1.1, 0.0]], dtype=torch.float64)
    weights = build_loss("dual_focal", gamma=1.0, **none)(row, torch.tensor([0, 0]))
    p = row.softmax(1)
    gap = torch.stack([1 - p[0, 0] + p[0, 1], 1 - p[1, 0] + p[1, 2]])
    torch.testing.assert_close(weights, gap * -p[:, 0].log(), rtol=1e-12, atol=0)
    target = z.softmax(1)
    for name in ("bsce", "bsce_gra", "cross_entropy", "kl_divergence", "squared_error"):
        _, grad = value_and_gradient(build_loss(name), z, target)
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-14)
    _, grad = value_and_gradient(build_loss("focal"), z, target)
    assert grad.abs().max() > 1e-3  # not proper
    loss = build_loss("bsce_gra", normalize_weight=True, **none)
    ratio = loss(z, q) / build_loss("bsce_gra", **none)(z, q)
    weight = (z.softmax(1) - q).square().sum(1)
    torch.testing.assert_close(ratio, (1 / weight.mean()).expand(7), rtol=1e-12, atol=0)
    differentiated = uncertainty_weighted(
        z, q, lambda log_p, q: (log_p.exp() - q).square().sum(1), detach=False
    )
    torch.testing.assert_close(differentiated, build_loss("bsce")(z, q), rtol=1e-12, atol=0)
    parts = build_loss("mdca", gamma=1.0, coefficient=0.5).parts(z, y)
    torch.testing.assert_close(parts.base, build_loss("focal", gamma=1.0)(z, y), rtol=0, atol=0)
    torch.testing.assert_close(parts.total, parts.base + 0.5 * parts.term, rtol=0, atol=0)
    summed = build_loss("mmce", reduction="sum")(z, y)
    torch.testing.assert_close(summed, 7 * build_loss("mmce")(z, y), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_autocast_are_finite(name):
    z = torch.tensor([[300.0, -300, 0], [1.5, 1, -2], [-300, 300, 0], [0, 0, 0]])
    y = torch.tensor([0, 1, 2, 0])
    loss = loss_of(name)
    for dtype in (torch.bfloat16, torch.float16):
        low = z.to(dtype)
        for targets in (y, torch.tensor([[0.0, 1, 0], [0.5, 0.25, 0.25]] * 2)):
            value, grad = value_and_gradient(loss, low, targets)
            assert value.dtype == torch.float32
            assert grad.dtype == dtype
            assert value.isfinite()
            assert grad.isfinite().all()
            expected = loss(low.float(), targets)
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
            with torch.autocast("cpu", torch.bfloat16):
                inside = loss(low, targets)
            tolerance = 2e-2 if "mmce" in name else 1e-6  # its matrix product is autocast
            torch.testing.assert_close(inside.float(), expected, rtol=tolerance, atol=1e-6)


def test_large_inputs_under_torch_func():
    z, y, _ = batch(2000, 40)
    loss = build_loss("bsce", reduction="none")
    assert row_blocks.in_blocks(z, None)
    expected = value_and_gradient(loss, z, y)[1]
    found = torch.func.grad(lambda x: loss(x, y).sum())(z)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    stacked = z.reshape(2, 1000, 40)
    each = torch.func.vmap(torch.func.grad(lambda x, t: build_loss("bsce", validate=False)(x, t)))(
        stacked.repeat(1, 2, 1), y.reshape(2, 1000).repeat(1, 2)
    )
    torch.testing.assert_close(
        each[:, :1000].reshape(-1, 40) * 2000, expected, rtol=1e-9, atol=1e-13
    )


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(name):
    z, y, q = batch()
    loss = loss_of(name)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = z.clone()
        broken[3, 1] = bad
        for targets in (y, q):
            with pytest.raises(DataError, match="row 3 holds NaN or infinity"):
                loss(broken, targets)
    with pytest.raises(DataError, match="labels run from 0 to 5"):
        loss(z, torch.tensor([0, 5, 0, 0, 0, 0, 0]))
    with pytest.raises(DataError, match="row 0 sums to 2"):
        loss(z, torch.cat([2 * q[:1], q[1:]]))
    with pytest.raises(DataError, match="at least 2 classes"):
        loss(z[:, :1], torch.zeros(7).long())
    with pytest.raises(DataError, match="empty batch"):
        loss(z[:0], y[:0])
    with pytest.raises(DataError, match="shape"):
        loss(z, y[:4])


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("focal", {"gamma": -1.0}, "gamma must be"),
        ("dual_focal", {"gamma": float("nan")}, "gamma must be"),
        ("bsce", {"norm": 0.5}, "norm must be"),
        ("flsd", {"table": ((0.5, 3.0), (0.2, 5.0))}, "ascending"),
        ("flsd", {"table": ((0.2, 5.0),)}, "last above 1"),
        ("mdca", {"reduction": "none"}, "whole batch"),
        ("mdca", {"gamma": 1.0, "smoothing": 0.1}, "not both"),
        ("mmce", {"width": 0.0}, "width"),
        ("mbls", {"margin": -1.0}, "margin"),
        ("entropy_penalty", {"alpha": -0.1}, "coefficient"),
        ("dfl", {}, "did you mean 'dual_focal'"),
        ("focal", {"gama": 2.0}, "did you mean 'gamma'"),
    ],
)
def test_bad_settings_are_named(name, params, words):
    with pytest.raises(ConfigError, match=words):
        build_loss(name, **params)


def test_mixup():
    x = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y = torch.arange(64) % 10
    made = [
        mixup(x, y, alpha=0.4, num_classes=10, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    torch.testing.assert_close(made[0].images, made[1].images, rtol=0, atol=0)
    assert not made[0].images.equal(made[2].images)
    share, other = made[0].share[:, None], made[0].partner
    one_hot = F.one_hot(y, 10).float()
    torch.testing.assert_close(made[0].targets, share * one_hot + (1 - share) * one_hot[other])
    wide = share[..., None, None]
    torch.testing.assert_close(made[0].images, wide * x + (1 - wide) * x[other])
    assert made[0].same_class.equal(y == y[other])
    generator = torch.Generator().manual_seed(3)
    shares = mixup(
        torch.zeros(20000, 1),
        torch.zeros(20000).long(),
        alpha=2.0,
        num_classes=2,
        per_example=True,
        generator=generator,
    ).share
    # Beta(2, 2): mean 1/2, variance 1/20; four standard errors
    assert abs(float(shares.mean()) - 0.5) < 4 * (0.05 / 20000) ** 0.5
    assert abs(float(shares.var()) - 0.05) < 0.002
    with pytest.raises(ConfigError, match="alpha"):
        mixup(x, y, alpha=0.0, num_classes=10, generator=generator)
    with pytest.raises(ConfigError, match="num_classes"):
        mixup(x, y, generator=generator)
    with pytest.raises(DataError, match="labels run"):
        mixup(x, y, num_classes=5, generator=generator)


@pytest.mark.parametrize("name", sorted(SPECIAL))
def test_rank_mixup_trains_on_copies(name):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 6, generator=generator), torch.arange(16) % 4
    copies = mixed_copies(x, y, num_classes=4, generator=generator)
    assert copies.images.shape == (3, 16, 6)
    weights = torch.randn(6, 4, generator=generator, requires_grad=True)
    loss = build_loss(name)
    parts = loss.parts(x @ weights, y, copies.images @ weights, copies.targets)
    torch.testing.assert_close(parts.total, parts.base + 0.1 * parts.term, rtol=0, atol=0)
    assert parts.term > 0
    parts.total.backward()
    assert weights.grad.isfinite().all()
    flat = (x @ weights).detach(), (copies.images @ weights).detach()
    assert loss(flat[0], y, flat[1], copies.targets).ndim == 0


# in a process of its own: the tests' type checking wraps every function, which cannot be traced
COMPILE_ALL = """
import json, traceback
import torch
from diffcal.calibration.losses.registry import LOSSES, build_loss

generator = torch.Generator().manual_seed(0)
y, rows = torch.arange(64) % 10, torch.arange(64)
z = torch.randn(64, 10, generator=generator).requires_grad_()
q = torch.rand(64, 10, generator=generator).softmax(1)
copies = torch.randn(2, 64, 10, generator=generator)
copy_targets = torch.rand(2, 64, 10, generator=generator).softmax(2)
weights = {"uncertainty_weighted": {"weight": lambda log_p, q: (log_p.exp() - q).abs().sum(1)}}
found = {}
for name in LOSSES:
    try:
        torch._dynamo.reset()
        loss = build_loss(name, **weights.get(name, {}))
        more = ()
        if loss.needs_copies:
            more = (copies, copy_targets)
        if getattr(loss, "needs_examples", False):
            loss.begin(64)
            loss.seen.fill_(4.0)
            loss.right.copy_(rows % 5)
            loss.eval()
            more = (rows,)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for targets in (y, q):
            values = compiled(z, targets, *more), loss(z, targets, *more)
            torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
            slopes = [torch.autograd.grad(value, z)[0] for value in values]
            torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)
        found[name] = ""
    except Exception:
        found[name] = traceback.format_exc()[-2000:]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    """What went wrong with each loss under torch.compile as one graph; all in one process."""
    import json
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", COMPILE_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_compiles_whole(compiled, name):
    assert not compiled[name], compiled[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_soft_targets_that_were_cast_to_half_precision_are_taken(dtype):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, 30, generator=generator)
    q = torch.randn(500, 30, generator=generator).mul(3).softmax(dim=1)
    assert (q.to(dtype).double().sum(dim=1) - 1).abs().max() > 1e-4  # or this tests nothing
    exact = float(cross_entropy(z, q))
    assert float(cross_entropy(z, q.to(dtype))) == pytest.approx(exact, rel=2e-3)
    wrong = q.clone()
    wrong[7] *= 1.02
    with pytest.raises(DataError, match=r"row 7 sums to 1\.0"):
        cross_entropy(z, wrong.to(dtype))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("size", [3, 5])
def test_class_weights_are_as_many_as_classes(size, soft):
    y = torch.tensor([0, 1, 2])  # none of a class without a weight
    targets = F.one_hot(y, 4).float() if soft else y
    with pytest.raises(DataError, match=r"class_weight must have shape \[4\], got"):
        cross_entropy(torch.zeros(3, 4), targets, class_weight=torch.ones(size))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"uncertainty_weighted"}))
def test_losses_go_through_pickle_to_other_processes(name):
    loss = build_loss(name)
    assert type(pickle.loads(pickle.dumps(loss))) is type(loss)
