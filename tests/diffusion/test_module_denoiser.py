"""Plain modules as denoisers: the same numbers as the formulas, features through them, and refusals."""

import pytest
import torch
from torch import nn

from diffcal.attribution.featurise import FeatureConfig, Featuriser
from diffcal.attribution.projection import ProjectionConfig
from diffcal.attribution.timesteps import noise_levels
from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.module_denoiser import ModuleDenoiser, schedule_noise
from diffcal.diffusion.samplers import SamplerConfig, sample
from diffcal.diffusion.schedules import alphas_cumprod
from diffcal.errors import ConfigError


class Gaussian(nn.Module):
    """The exact noise prediction for images that are standard normal of scale ``s``."""

    def __init__(self, s=0.5):
        super().__init__()
        self.log_s = nn.Parameter(torch.tensor(s).log())

    def forward(self, x, t, weights=None):
        abar = alphas_cumprod("ddpm_linear").float()[t.round().long()].view(-1, 1, 1, 1)
        variance = abar * (2 * self.log_s).exp() + 1 - abar
        out = (1 - abar).sqrt() * x / variance
        return out if weights is None else out + weights.sum(dim=1).view(-1, 1, 1, 1)


def denoiser(**options):
    return ModuleDenoiser(Gaussian(), schedule_noise(), sample_shape=(1, 4, 4), **options)


def test_denoises_as_the_closed_form_says():
    d = denoiser()
    assert isinstance(d, Denoiser)
    levels = noise_levels(d, (0, 250, 999))
    abar = alphas_cumprod("ddpm_linear")[[0, 250, 999]]
    torch.testing.assert_close(levels.sigmas, ((1 - abar) / abar).sqrt())
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = x * (0.25 / (0.25 + levels.sigmas.float().square())).view(-1, 1, 1, 1)
    torch.testing.assert_close(d(x, levels.sigmas), expected, rtol=1e-4, atol=1e-4)
    noise = torch.ones_like(x)
    torch.testing.assert_close(d.target(x, noise, levels.sigmas), noise)


def test_samples_have_the_scale_of_the_data():
    noise = torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    config = SamplerConfig(solver="heun", steps=40, schedule="ddpm_linear", sigma_max=1000.0)
    drawn = sample(denoiser(), noise, None, config)
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.05)


def test_features_are_gradients_of_the_module():
    d = denoiser()
    config = FeatureConfig(
        functional="mean",
        combine="mean",
        timesteps=(500,),
        normalise=False,
        projection=ProjectionConfig(kind="identity"),
    )
    clean = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    found = {
        method: Featuriser(d, config, method=method)(clean, range(2)).vectors
        for method in ("fused", "loop")
    }
    torch.testing.assert_close(found["fused"], found["loop"])
    assert found["loop"].shape == (2, 1)
    assert bool((found["loop"] != 0).all())


def test_conditions_are_weights_over_classes():
    d = denoiser(num_classes=2, class_names=("a", "b"))
    x, sigma = torch.zeros(2, 1, 4, 4), torch.ones(2)
    condition = d.condition(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert d.predict(x, sigma, condition)[:, 0, 0, 0].tolist() == [3, 0]
    with pytest.raises(ConfigError, match="needs a class condition"):
        d(x, sigma)
    with pytest.raises(ConfigError, match="unconditional"):
        denoiser()(x, sigma, condition)
    with pytest.raises(ConfigError, match="over the 2 classes"):
        d.condition(torch.ones(1, 3))
    with pytest.raises(ConfigError, match="1 names for 2 classes"):
        denoiser(num_classes=2, class_names=("a",))
    with pytest.raises(ConfigError, match="cannot be guided"):
        d.unconditional(2)
    assert denoiser().condition(None) is None


def test_fingerprint_tells_weights_apart():
    first, same = denoiser(), denoiser()
    assert first.fingerprint == same.fingerprint
    with torch.no_grad():
        same.module.log_s += 1
    assert first.fingerprint != same.fingerprint
