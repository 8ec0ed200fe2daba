"""Guidance against its formula, on denoisers in closed form."""

import pytest
import torch

from diffcal.diffusion.closed_forms import GaussianDenoiser
from diffcal.diffusion.guidance import Guided, guided
from diffcal.diffusion.samplers import SamplerConfig, sample, sampling_sigmas
from diffcal.errors import ConfigError

DOUBLE = torch.float64


def denoiser():
    means = torch.tensor([-1.0, 0.2, 2.0], dtype=DOUBLE)
    return GaussianDenoiser(means.reshape(3, 1, 1, 1), 0.4)


def batch(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 1, 1, generator=generator, dtype=DOUBLE)
    return x, torch.eye(3).double()[torch.arange(count) % 3]


class Recording(GaussianDenoiser):
    def __call__(self, x, sigma, condition=None):
        self.sizes = [*getattr(self, "sizes", []), len(x)]
        return super().__call__(x, sigma, condition)


def test_formula_in_one_doubled_batch():
    model = denoiser()
    model.__class__ = Recording
    x, condition = batch()
    sigma = torch.full((4,), 0.7, dtype=DOUBLE)
    result = Guided(model, 2.5)(x, sigma, condition)
    assert model.sizes == [8]
    free = model(x, sigma, model.unconditional(4))
    expected = free + 2.5 * (model(x, sigma, condition) - free)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_rows_are_judged_by_their_own_noise_level():
    model = denoiser()
    x, condition = batch()
    sigma = torch.tensor([0.1, 0.2, 1.0, 1.1], dtype=DOUBLE)  # the interval is (0.1, 1]
    plain, full = model(x, sigma, condition), Guided(model, 3.0)(x, sigma, condition)
    inside = torch.tensor([False, True, True, False]).reshape(4, 1, 1, 1)
    result = Guided(model, 3.0, (0.1, 1.0))(x, sigma, condition)
    torch.testing.assert_close(result, torch.where(inside, full, plain), rtol=1e-12, atol=1e-12)


def test_outside_the_interval_the_batch_is_not_doubled():
    model = denoiser()
    model.__class__ = Recording
    x, condition = batch()
    config = SamplerConfig(
        solver="dpmpp_2m", steps=10, guidance_scale=2.0, guidance_interval=(0.1, 2.0)
    )
    sample(model, x, condition, config)
    levels = sampling_sigmas(model, config)[:-1].tolist()
    sizes = model.sizes[1:]  # the first asked whether there is an unconditional branch
    sizes = sizes if len(sizes) == len(levels) else model.sizes
    assert sizes == [8 if 0.1 < level <= 2 else 4 for level in levels]


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "unipc_3"])
def test_sampler_applies_scale_and_interval(solver):
    model, (x, condition) = denoiser(), batch()
    config = SamplerConfig(
        solver=solver, steps=12, guidance_scale=3.0, guidance_interval=(0.05, 5.0)
    )
    by_hand = Guided(model, 3.0, (0.05, 5.0))
    plain = SamplerConfig(solver=solver, steps=12)
    torch.testing.assert_close(
        sample(model, x, condition, config),
        sample(by_hand, x, condition, plain),
        rtol=0,
        atol=1e-12,
    )
    difference = sample(model, x, condition, config) - sample(model, x, condition, plain)
    assert float(difference.abs().min()) > 0.01


def test_scale_one_is_no_guidance():
    model, (x, condition) = denoiser(), batch()
    sigma = torch.full((4,), 0.7, dtype=DOUBLE)
    assert guided(model, 1.0) is model
    torch.testing.assert_close(
        Guided(model, 1.0)(x, sigma, condition), model(x, sigma, condition), rtol=0, atol=1e-14
    )
    no_branch = lambda x, sigma, condition: x / 2  # noqa: E731
    assert sample(no_branch, x, None, SamplerConfig(steps=3)).shape == x.shape


def test_gaussian_mean_moves_by_the_scale():
    """Guidance of Gaussians of one width is the Gaussian with the mean m_u + scale (m_c - m_u)."""
    model, (x, condition) = denoiser(), batch()
    config = SamplerConfig(solver="unipc_3", steps=60)
    result = sample(model, x, condition, SamplerConfig(**vars_of(config), guidance_scale=2.0))
    centre = model.means.mean()
    means = centre + 2 * (model.means - centre)
    moved = GaussianDenoiser(means, 0.4)
    torch.testing.assert_close(result, sample(moved, x, condition, config), rtol=0, atol=1e-10)


def vars_of(config):
    names = ("solver", "steps", "schedule", "sigma_min", "sigma_max", "rho")
    return {name: getattr(config, name) for name in names}


def test_autoguidance_by_a_weaker_model():
    model, weak = denoiser(), GaussianDenoiser(denoiser().means, 0.9)
    x, condition = batch()
    sigma = torch.full((4,), 0.7, dtype=DOUBLE)
    result = Guided(model, 1.5, guide=weak)(x, sigma, condition)
    a, b = model(x, sigma, condition), weak(x, sigma, condition)
    torch.testing.assert_close(result, b + 1.5 * (a - b), rtol=1e-12, atol=1e-12)


def test_bad_guidance_is_refused():
    with pytest.raises(ConfigError, match="unconditional branch"):
        Guided(lambda x, sigma, condition: x, 2.0)
    config = SamplerConfig(steps=3, guidance_scale=2.0)
    with pytest.raises(ConfigError, match="unconditional branch"):
        sample(lambda x, s, c: x, torch.zeros(1, 1), None, config)
    with pytest.raises(ConfigError, match="finite"):
        Guided(denoiser(), float("inf"))
    with pytest.raises(ConfigError, match="no range"):
        Guided(denoiser(), 2.0, (1.0, 1.0))
    with pytest.raises(ConfigError, match="a condition"):
        Guided(denoiser(), 2.0)(*batch()[:1], torch.ones(4).double())
