"""Consistency Calibration: closed forms, limits, sampling, levels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr
from torch import nn

from diffcal.calibration.posthoc import consistency_exact, consistency_gaussian
from diffcal.calibration.posthoc.consistency import ConsistencyCalibration
from diffcal.calibration.posthoc.consistency_exact import exact_consistency, uniform_consistency
from diffcal.calibration.posthoc.consistency_gaussian import (
    gaussian_consistency,
    gaussian_log_consistency,
)
from diffcal.calibration.posthoc.consistency_sampling import sampled_consistency
from diffcal.calibration.posthoc.feature_consistency import (
    FeatureConsistency,
    InputConsistency,
    input_consistency_counts,
)
from diffcal.calibration.posthoc.temperature import TemperatureScaling
from diffcal.errors import ConfigError

LAWS = ["gaussian", "uniform", "gumbel"]


def rows(n, k, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64) * spread


def slow_gaussian(z, step=0.05):
    """The integral as it is written, on a fine grid around each row's maximum."""
    x = torch.arange(-14, 9, step, dtype=torch.float64)
    gap = x[None, :, None] - (z - z.amax(1, keepdim=True))[:, None, :]
    log_cdf = torch.from_numpy(log_ndtr(gap.numpy()))
    log_phi = -0.5 * gap.square() - 0.5 * math.log(2 * math.pi)
    return step * (log_cdf.sum(2, keepdim=True) - log_cdf + log_phi).exp().sum(1)


@pytest.mark.parametrize(
    ("k", "spread"), [(3, 1.0), (10, 0.01), (10, 1.0), (10, 5.0), (47, 2.0), (48, 2.0), (300, 1.0)]
)
def test_gaussian_against_the_plain_integral(k, spread):
    z = rows(12, k, spread)
    expected = slow_gaussian(z)
    torch.testing.assert_close(exact_consistency(z, 1.0), expected, rtol=1e-6, atol=1e-10)
    single = exact_consistency(z.float(), 1.0).double()
    torch.testing.assert_close(single, expected, rtol=2e-4, atol=2e-6)
    log_p = gaussian_log_consistency(z, 1.0)
    torch.testing.assert_close(log_p.exp(), expected, rtol=1e-6, atol=1e-10)


def test_gaussian_many_equal_competitors():
    z = torch.zeros(2, 10, dtype=torch.float64)
    z[0, 9], z[1, 9] = -4.0, -8.0
    torch.testing.assert_close(exact_consistency(z, 1.0), slow_gaussian(z), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("noise", LAWS)
@given(
    st.lists(st.floats(-30, 30), min_size=2, max_size=7),
    st.floats(0.05, 20),
    st.floats(-100, 100),
)
@settings(deadline=None, max_examples=40)
def test_properties(noise, values, epsilon, shift):
    z = torch.tensor([values], dtype=torch.float64)
    p = exact_consistency(z, epsilon, noise)
    assert bool((p >= 0).all())
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float(p[0, z.argmax()]) == pytest.approx(float(p.max()), abs=1e-12)
    torch.testing.assert_close(
        exact_consistency(z + shift, epsilon, noise), p, rtol=1e-6, atol=1e-9
    )
    turned = exact_consistency(z.flip(1), epsilon, noise).flip(1)
    torch.testing.assert_close(turned, p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("noise", LAWS)
@pytest.mark.parametrize("k", [2, 5, 60])
def test_limits(noise, k):
    z = rows(5, k, 1.0)
    sure = torch.nn.functional.one_hot(z.argmax(1), k).double()
    torch.testing.assert_close(exact_consistency(z, 1e-4, noise), sure, rtol=0, atol=1e-6)
    even = torch.full_like(z, 1 / k)
    torch.testing.assert_close(exact_consistency(z, 1e7, noise), even, rtol=0, atol=1e-5)


def test_two_classes_in_closed_form():
    gap = torch.linspace(-3, 3, 13, dtype=torch.float64)
    z = torch.stack([gap, torch.zeros_like(gap)], dim=1)
    expected = torch.where(
        gap.abs() >= 2,
        (gap > 0).double(),
        0.5 + torch.sign(gap) * (0.5 - (1 - gap.abs() / 2) ** 2 / 2),
    )
    torch.testing.assert_close(exact_consistency(z, 2.0, "uniform")[:, 0], expected)
    expected = 0.5 * torch.erfc(-gap / (2 * 2))
    torch.testing.assert_close(exact_consistency(z, 2.0)[:, 0], expected)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_uniform_of_many_rows_is_that_of_single_ones(monkeypatch, spread):
    """Rows together along the last axis, grouped by the number of classes that can win."""
    z = rows(900, 9, spread)
    z[::7] = z[::7].round()
    together = exact_consistency(z, 2.0, "uniform")
    monkeypatch.setattr(consistency_exact, "FEW_ACTIVE", 0)
    alone = exact_consistency(z, 2.0, "uniform")
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)
    assert torch.equal(together == 0, z <= z.amax(1, keepdim=True) - 2)
    u = ((z - z.amax(1, keepdim=True)) / 2)[:5]
    y = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    for row, found in zip(u, together, strict=False):
        density = (y[:, None] - row).clamp(min=0, max=1)
        for k in range(9):
            others = torch.cat([density[:, :k], density[:, k + 1 :]], dim=1).prod(1)
            direct = torch.trapezoid(torch.where(y < 1 + row[k], others, 0), y)
            assert float(found[k]) == pytest.approx(float(direct), abs=2e-4)


def test_uniform_of_many_ties():
    z = torch.zeros(1, 400, dtype=torch.float64)
    z[0, 0] = 1e-3
    p = exact_consistency(z, 1.0, "uniform")
    y = torch.linspace(0, 1, 2_000_001, dtype=torch.float64)  # of the class that is ahead
    direct = torch.trapezoid((y + 1e-3).clamp(max=1) ** 399, y)
    assert float(p[0, 0]) == pytest.approx(float(direct), rel=1e-6)
    assert float(p[0, 1:].std()) < 1e-15


@pytest.mark.parametrize("noise", LAWS)
def test_sampling_converges_to_the_exact_form(noise):
    z = rows(6, 5, 1.5)
    samples = 20_000
    state = torch.random.get_rng_state()
    drawn = sampled_consistency(z, 1.3, noise=noise, num_samples=samples, smoothing=0.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    p = exact_consistency(z, 1.3, noise)
    error = (p * (1 - p) / samples).sqrt() + 1e-12
    assert float(((drawn - p).abs() / error).max()) < 5
    again = sampled_consistency(z[2:4], 1.3, noise=noise, num_samples=samples, smoothing=0.0)
    assert torch.equal(again, drawn[2:4])
    other = sampled_consistency(z, 1.3, noise=noise, num_samples=samples, smoothing=0.0, seed=1)
    assert not torch.equal(other, drawn)


def labelled(n=600, k=4, factor=2.0):
    z = rows(n, k, 2.0, seed=3)
    generator = torch.Generator().manual_seed(4)
    return z, torch.multinomial((z / factor).softmax(1), 1, generator=generator)[:, 0]


def test_gumbel_is_temperature_scaling():
    z, y = labelled()
    made = ConsistencyCalibration(noise="gumbel").fit(z, y)
    scaling = TemperatureScaling().fit(z, y)
    assert made.epsilon == pytest.approx(scaling.temperature, rel=1e-6)
    torch.testing.assert_close(
        made.predict_proba(z), scaling.predict_proba(z), rtol=1e-5, atol=1e-8
    )


def test_recovers_the_noise_scale():
    """Labels drawn from the winner's law itself, as distributions: no sampling error."""
    z = rows(300, 4, 2.0)
    made = ConsistencyCalibration().fit(z, soft_labels=exact_consistency(z, 1.7))
    assert made.epsilon == pytest.approx(1.7, rel=1e-4)


def test_sampled_modes_fit_and_apply():
    z, y = labelled(60)
    made = ConsistencyCalibration(mode="monte_carlo", num_samples=200).fit(z, y)
    assert made.epsilon == ConsistencyCalibration().fit(z, y).epsilon
    p = made.predict_proba(z)
    assert float(p.min()) > 0  # smoothed
    mean = ConsistencyCalibration(mode="monte_carlo", aggregation="mean", num_samples=20)
    p = mean.fit(z, y).predict_proba(z)
    torch.testing.assert_close(p.sum(1), torch.ones(60).double())


def test_settings_and_warnings(caplog):
    with pytest.raises(ConfigError, match="floor"):
        ConsistencyCalibration(noise="uniform")
    with pytest.raises(ConfigError, match="monte_carlo"):
        ConsistencyCalibration(aggregation="mean")
    with pytest.raises(ConfigError, match="positive"):
        exact_consistency(rows(2, 3, 1.0), 0.0)
    z, y = labelled()
    floored = ConsistencyCalibration(noise="uniform", floor=1e-4).fit(z, y)
    assert float(floored.predict_proba(z).min()) >= 1e-4 * (1 - 1e-9)
    assert not caplog.text
    wrong = z.argmin(1)  # no noise is large enough for labels that are always wrong
    ConsistencyCalibration().fit(z * 20, wrong)
    assert "end of the searched range" in caplog.text


def test_feature_level():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    h = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    z = h @ weight.T
    y = z.argmax(1).clone()
    y[::5] = (y[::5] + 1) % 3
    made = FeatureConsistency(num_samples=4000, fit_samples=50).with_weight(weight).fit(z, y)
    # the same by perturbing the features themselves
    noise = torch.randn(4000, 40, 8, generator=generator, dtype=torch.float64)
    winners = ((h + made.epsilon * noise) @ weight.T).argmax(2)
    direct = torch.nn.functional.one_hot(winners, 3).double().mean(0)
    error = (direct * (1 - direct) * 2 / 4000).sqrt() + 1e-3
    assert float(((made.predict_proba(z) - direct).abs() / error).max()) < 5
    # orthogonal rows of equal length are noise at logit level
    made.factor_ = 2 * torch.eye(3, dtype=torch.float64)
    p = exact_consistency(z, 2 * made.epsilon)
    error = (p * (1 - p) / 4000).sqrt() + 1e-3
    assert float(((made.predict_proba(z) - p).abs() / error).max()) < 5


def test_feature_level_of_two_classes_is_exact():
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    z = rows(50, 2, 2.0)
    y = (z[:, 1] > z[:, 0]).long()
    y[::4] = 1 - y[::4]
    made = FeatureConsistency().with_weight(weight).fit(z, y)
    expected = 0.5 * torch.erfc(-(z[:, 1] - z[:, 0]) / (made.epsilon * math.sqrt(5) * math.sqrt(2)))
    torch.testing.assert_close(made.predict_proba(z)[:, 1], expected)


def test_input_level():
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3, 5))
        model.bias.zero_()
    x = torch.randn(12, 5, generator=generator)
    counts = input_consistency_counts(model, x, 0.5, num_samples=300, seed=1)
    assert counts.dtype == torch.int64
    assert bool((counts.sum(1) == 300).all())
    # the model hands on three inputs, so that this is noise at logit level
    p = exact_consistency(x[:, :3].double(), 0.5)
    error = (p * (1 - p) / 300).sqrt() + 1e-2
    assert float(((counts / 300 - p).abs() / error).max()) < 5
    again = input_consistency_counts(
        model, x[7:], 0.5, num_samples=300, seed=1, first_index=7, batch_size=13
    )
    assert torch.equal(again, counts[7:])
    made = InputConsistency(model=model, strengths=(0.1, 1.0), num_samples=50)
    made.fit(x, torch.zeros(12, dtype=torch.int64))
    assert made.strength == 1.0  # labels far from the predictions ask for more noise
    torch.testing.assert_close(made.predict_proba(x).sum(1), torch.ones(12).double())


@pytest.mark.parametrize("noise", LAWS)
@pytest.mark.parametrize("k", [2, 3, 9])
def test_gradient_of_the_exact_forms(noise, k):
    z = (1.5 * rows(4, k, 1.0, seed=k)).requires_grad_()
    law = lambda x: exact_consistency(x, 1.7, noise)  # noqa: E731
    assert torch.autograd.gradcheck(law, z, eps=1e-6, atol=1e-6, rtol=1e-5)
    if noise != "uniform":
        assert torch.autograd.gradgradcheck(law, z, eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("noise", LAWS)
def test_gradient_in_blocks_of_many_classes(noise, monkeypatch):
    from diffcal.calibration.posthoc import consistency_gradient

    z = rows(6, 60, 1.5).requires_grad_()
    g = rows(6, 60, 1.0, seed=1)
    whole = torch.autograd.grad((g * exact_consistency(z, 0.8, noise)).sum(), z)[0]
    direction = rows(6, 60, 1e-4, seed=2)
    with torch.no_grad():
        up, down = (exact_consistency(z + s * direction, 0.8, noise) for s in (1, -1))
    torch.testing.assert_close(
        (whole * direction).sum(1), (g * (up - down)).sum(1) / 2, rtol=1e-4, atol=1e-9
    )
    # a common shift changes nothing
    torch.testing.assert_close(whole.sum(1), torch.zeros(6).double(), rtol=0, atol=1e-10)
    monkeypatch.setattr(consistency_gradient, "BLOCK_ELEMENTS", 10_000)
    parts = torch.autograd.grad((g * exact_consistency(z, 0.8, noise)).sum(), z)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
    half = z.detach().float().requires_grad_()
    exact_consistency(half, 0.8, noise).square().sum().backward()
    assert half.grad.dtype == torch.float32


def test_uniform_law_is_not_differentiated_twice():
    z = rows(2, 3, 1.0).requires_grad_()
    with pytest.raises(ConfigError, match="no second derivative"):
        torch.autograd.grad(exact_consistency(z, 2.0, "uniform")[:, 0].sum(), z, create_graph=True)


@pytest.mark.parametrize("k", [2, 7, 10, 16])
def test_uniform_noise_in_single_precision_agrees_with_double(k):
    """Single precision sorts, groups and integrates by itself; rows with ties and losers included."""
    z = torch.randn(3000, k, generator=torch.Generator().manual_seed(k)) * 2
    z[:200] = z[:200].round()  # ties
    for epsilon in (0.7, 4.0, 40.0):
        single = uniform_consistency(z, epsilon)
        double = uniform_consistency(z.double(), epsilon)
        assert single.dtype == torch.float32
        assert (single - double).abs().max() < 3e-7
        assert torch.equal(single[double == 0], torch.zeros_like(single[double == 0]))


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 10.0])
def test_many_classes_in_single_precision(spread):
    z = rows(16, 1000, spread)
    z[0], z[1, 10:] = 0, -6  # none ahead; ten ahead of all others
    exact = exact_consistency(z, 1.0)
    single = exact_consistency(z.float(), 1.0).double()
    torch.testing.assert_close(single, exact, rtol=0, atol=2e-5)
    likely = exact > 1e-6
    torch.testing.assert_close(single[likely], exact[likely], rtol=3e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [10, 100])
def test_threads_and_modes_change_no_bit(monkeypatch, dtype, k):
    for name in ("BLOCK_ELEMENTS", "NARROW_ELEMENTS"):
        monkeypatch.setattr(consistency_gaussian, name, 700)
    monkeypatch.setattr(consistency_gaussian, "WORKER_ELEMENTS", 1)
    z = rows(203, k, 3.0).to(dtype)
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(exact_consistency(z, 2.0))
            with torch.inference_mode():
                seen.append(exact_consistency(z, 2.0))
                seen.append(exact_consistency(z.clone(), 2.0))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for made in seen[1:]:
        assert torch.equal(made, seen[0])
    assert not seen[0].is_inference()


@pytest.mark.parametrize("k", [2, 10, 100])
def test_gaussian_law_into_given_memory(k):
    z = rows(30, k, 2.0)
    expected = gaussian_consistency(z, 1.5)
    for out in (torch.empty(k, 30, dtype=torch.float64).t(), torch.empty(30, k).bfloat16()):
        assert gaussian_consistency(z, 1.5, out=out) is out
        torch.testing.assert_close(out, expected.to(out.dtype), rtol=0, atol=0)
