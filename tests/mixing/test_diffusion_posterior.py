"""Class posterior from denoising errors: exact where the denoiser is the exact one."""

import pytest
import torch

from diffcal.diffusion.closed_forms import GaussianDenoiser
from diffcal.errors import ConfigError, DataError
from diffcal.mixing.annotators import build_annotator
from diffcal.mixing.diffusion_posterior import DenoisingErrors, select_levels

SCALE = 0.25


def denoiser():
    generator = torch.Generator().manual_seed(0)
    return GaussianDenoiser(0.15 * torch.randn(3, 1, 4, 4, generator=generator).double(), SCALE)


def drawn(model, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    noise = torch.randn(count, 1, 4, 4, generator=generator)
    images = model.decode(model.means[labels].float() + SCALE * noise)
    return images, labels


def exact_posterior(model, images):
    x = model.encode(images).double()
    squared = (x[:, None] - model.means).square().sum(dim=(2, 3, 4))
    return (-squared / (2 * SCALE**2)).softmax(dim=1)


def mixed(rows):
    return torch.tensor([[0, 1]]).repeat(rows, 1), torch.full((rows, 2), 0.5)


def test_errors_of_the_exact_denoiser():
    """``[σ⁴‖x - μ‖² + s⁴σ²‖n‖²]/(s² + σ²)²`` over pixels: opposite draws cancel the mixed term."""
    model = denoiser()
    encoder = DenoisingErrors(model, sigmas=(0.2, 0.6), draws=4, rows=5)
    images, _ = drawn(model, 7)
    x = model.encode(images).double()
    wanted = []
    for level, sigma in enumerate((0.2, 0.6)):
        noise = torch.stack([encoder._noise(level, draw) for draw in range(4)])
        assert torch.equal(noise[1], -noise[0])
        power = noise.double().square().mean()
        away = (x[:, None] - model.means).square().mean(dim=(2, 3, 4))
        error = (sigma**4 * away + SCALE**4 * sigma**2 * power) / (SCALE**2 + sigma**2) ** 2
        wanted.append(error * (sigma**2 + SCALE**2) / (sigma * SCALE) ** 2)
    features = encoder.encode(images)
    assert features.shape == (7, encoder.dim) == (7, 6)
    torch.testing.assert_close(features.double(), torch.cat(wanted, dim=1), rtol=1e-4, atol=1e-5)
    # However many rows a call of the network takes.
    wide = DenoisingErrors(model, sigmas=(0.2, 0.6), draws=4, rows=512)
    torch.testing.assert_close(wide.encode(images), features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigmas", [(0.5,), (0.2, 0.5, 1.0)])
def test_the_posterior_of_gaussian_classes_is_found(sigmas):
    model = denoiser()
    encoder = DenoisingErrors(model, sigmas=sigmas)
    (train, labels), (held, held_labels) = drawn(model, 3000), drawn(model, 1500, seed=2)
    annotator = build_annotator("diffusion_posterior", relative=False).fit(
        [(encoder.encode(train), labels)], [(encoder.encode(held), held_labels)], 3
    )
    images, truth = drawn(model, 500, seed=3)
    found = annotator.annotate(encoder.encode(images), *mixed(500))
    error = (found - exact_posterior(model, images)).abs().sum(dim=1) / 2
    assert float(error.mean()) < 0.02
    exact_accuracy = (exact_posterior(model, images).argmax(1) == truth).double().mean()
    assert float((found.argmax(1) == truth).double().mean()) > float(exact_accuracy) - 0.02
    assert annotator.report["temperature"] == pytest.approx(1, abs=0.1)


def test_relative_errors_ignore_how_busy_an_image_is():
    features = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)) + 1
    labels = features[:, :3].argmin(dim=1)
    annotator = build_annotator("diffusion_posterior").fit(
        [(features, labels)], [(features, labels)], 3
    )
    plain, busy = (annotator.annotate(f, *mixed(20)) for f in (features, 9 * features))
    torch.testing.assert_close(plain, busy, rtol=0, atol=1e-6)


def test_the_telling_level_is_chosen_first():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (400,), generator=generator)
    errors = torch.rand(400, 4, 3, generator=generator) + 1
    errors[torch.arange(400), 2, labels] -= 0.8
    errors[torch.arange(400), 0, labels] -= 0.2
    assert select_levels(errors.flatten(1), labels, 3, 2) == (2, 0)
    with pytest.raises(ConfigError, match="between 1 and the 4 levels"):
        select_levels(errors.flatten(1), labels, 3, 5)


def test_bad_input():
    model = denoiser()
    for wrong in ({"sigmas": ()}, {"sigmas": (-1.0,)}, {"draws": 0}, {"rows": 0}):
        with pytest.raises(ConfigError):
            DenoisingErrors(model, **wrong)
    model.condition_kind = "none"
    with pytest.raises(ConfigError, match="class-conditional"):
        DenoisingErrors(model)
    good, labels = torch.rand(6, 6), torch.arange(6) % 3
    annotator = build_annotator("diffusion_posterior")
    with pytest.raises(DataError, match="length 5 are not denoising errors of 3"):
        annotator.fit([(good[:, :5], labels)], [(good, labels)], 3)
    with pytest.raises(DataError, match="no real images"):
        annotator.fit([], [(good, labels)], 3)
    with pytest.raises(DataError, match="NaN"):
        annotator.fit([(good * torch.nan, labels)], [(good, labels)], 3)
    annotator.fit([(good, labels)], [(good, labels)], 3)
    with pytest.raises(DataError, match="length 6, got 9"):
        annotator.annotate(torch.rand(1, 9), *mixed(1))
