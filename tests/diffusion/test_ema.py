import pytest
import torch

from diffcal.diffusion.ema import ExponentialMovingAverage, ema_decay
from diffcal.errors import ConfigError


def test_half_life_halves():
    decay = ema_decay("half_life", 1000.0, images_seen=10**9, batch_size=100)
    assert decay**10 == pytest.approx(0.5)


def test_ramp_shortens_the_half_life_early():
    early = ema_decay("half_life", 1000.0, images_seen=200, batch_size=100, ramp=0.05)
    assert early == pytest.approx(0.5 ** (100 / 10))


def test_power_profile_is_the_weighted_mean_of_all_steps():
    # decay_t = (1 - 1/t)^(gamma+1) gives weights proportional to t^(gamma+1) - (t-1)^(gamma+1).
    gamma, steps = 2.0, 40
    module = torch.nn.Linear(1, 1, bias=False).double()
    average = ExponentialMovingAverage(module)
    for t in range(1, steps + 1):
        torch.nn.init.constant_(module.weight, float(t))
        average.update(module, ema_decay("power", gamma, images_seen=t, batch_size=1))
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    weights = t ** (gamma + 1) - (t - 1) ** (gamma + 1)
    expected = (weights * t).sum() / weights.sum()
    torch.testing.assert_close(average.averages["weight"].squeeze(), expected, rtol=1e-12, atol=0)


def test_bad_exponent():
    with pytest.raises(ConfigError, match="above -1"):
        ema_decay("power", -1.0, 10, 1)


def test_buffers_follow():
    module = torch.nn.BatchNorm1d(2)
    average = ExponentialMovingAverage(module)
    module(torch.randn(8, 2))
    average.update(module, 0.0)
    other = torch.nn.BatchNorm1d(2)
    average.copy_to(other)
    assert int(other.num_batches_tracked) == 1
    torch.testing.assert_close(other.running_mean, module.running_mean, rtol=0, atol=0)
