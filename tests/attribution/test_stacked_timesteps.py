"""Timesteps kept apart in one feature, and random signs as the functional: closed forms and refusals."""

import pytest
import torch
from diffusers import DDPMScheduler
from gradient_models import dit, edm, liven, mean_features, tiny_unet
from test_featurising import SKETCH, WHOLE, clean_samples

from diffcal.attribution.featurise import FeatureConfig, Featuriser
from diffcal.attribution.journey import path_features
from diffcal.attribution.outputs import DenoiserObjective
from diffcal.attribution.projection import ProjectionConfig
from diffcal.config import config_from_dict
from diffcal.core.rng import item_normal, item_signs
from diffcal.diffusion.diffusers_denoisers import UNet2DDenoiser
from diffcal.errors import ConfigError

TIMESTEPS = (100, 400, 900)


def test_signs_are_fair_and_belong_to_their_item():
    signs = item_signs(3, "signs", 1, (100, 100))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.05
    assert torch.equal(signs, item_signs(3, "signs", 1, (100, 100)))
    assert not torch.equal(signs, item_signs(3, "signs", 2, (100, 100)))


@pytest.mark.parametrize("method", ["loop", "vmap", "fused"])
@pytest.mark.parametrize("normalise", [True, False])
def test_random_signs_written_out(method, normalise):
    """One backward pass of ``mean(s o)`` for each (sample, timestep), with the signs of the timestep."""
    denoiser = edm(label_dim=0)
    clean = clean_samples(denoiser, 2)
    config = mean_features(
        functional="random-signs", timesteps=TIMESTEPS, normalise=normalise, projection=WHOLE
    )
    featuriser = Featuriser(denoiser, config, method=method, batch_rows=4)
    found = featuriser(clean, [0, 1])
    wanted = torch.zeros_like(found.vectors)
    parameters = list(denoiser.module.parameters())
    for at, t in enumerate(TIMESTEPS):
        signs = item_signs(0, "attribution-signs", t, tuple(clean.shape[1:]))
        noise = item_normal(0, "attribution-noise|shared", t, tuple(clean.shape[1:]))
        sigma = featuriser.levels.sigmas[at : at + 1]
        for row in range(2):
            x = clean[row : row + 1] + float(sigma) * noise
            value = (denoiser.predict(x, sigma) * signs).mean()
            parts = torch.autograd.grad(value, parameters, allow_unused=True)
            gradient = torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(parameters, parts, strict=True)
                ]
            )
            wanted[row] += gradient / (gradient.norm() if normalise else 1) / len(TIMESTEPS)
    torch.testing.assert_close(found.vectors, wanted, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("functional", "normalise"), [("mean", True), ("loss", False), ("random-signs", True)]
)
def test_stacked_timesteps_written_out(functional, normalise):
    """Each timestep's own feature, times its signs, averaged; any batches give the same."""
    denoiser = edm(label_dim=0)
    clean = clean_samples(denoiser, 3)

    def features(timesteps, combine, batch_rows=64):
        config = mean_features(
            functional=functional,
            timesteps=timesteps,
            normalise=normalise,
            combine=combine,
            projection=SKETCH,
        )
        # No other method is as quick under the run-time type checks; all give the same rows.
        return Featuriser(denoiser, config, method="vmap", batch_rows=batch_rows)(clean, range(3))

    wanted = torch.zeros(3, SKETCH.dim)
    for t in TIMESTEPS:
        signs = item_signs(SKETCH.seed, "attribution-stack", t, (SKETCH.dim,))
        wanted += features((t,), "mean").vectors * signs / len(TIMESTEPS)
    whole = features(TIMESTEPS, "stack")
    torch.testing.assert_close(whole.vectors, wanted, rtol=1e-4, atol=1e-6)
    small = features(TIMESTEPS, "stack", batch_rows=2)
    torch.testing.assert_close(small.vectors, whole.vectors, rtol=1e-4, atol=1e-6)
    mean = features(TIMESTEPS, "mean")
    torch.testing.assert_close(mean.errors, whole.errors, rtol=1e-5, atol=1e-7)
    assert float((mean.vectors - whole.vectors).norm()) > 0.1 * float(mean.vectors.norm())


def test_stacked_kernel_is_the_mean_of_the_timesteps_kernels():
    """Over sketches it converges to the kernel of gradients written one after the other."""
    denoiser = UNet2DDenoiser(liven(tiny_unet(None)), DDPMScheduler())
    clean = clean_samples(denoiser, 3)

    def features(timesteps, **options):
        config = mean_features(timesteps=timesteps, **options)
        return Featuriser(denoiser, config, method="vmap")(clean, range(3)).vectors.double()

    apart = [features((t,), projection=WHOLE) for t in TIMESTEPS]
    stacked = sum(rows @ rows.T for rows in apart) / len(TIMESTEPS) ** 2
    average = features(TIMESTEPS, projection=WHOLE)
    sketches = []
    for seed in range(16):
        sketch = ProjectionConfig(kind="sjlt", dim=4096, seed=seed)
        rows = features(TIMESTEPS, projection=sketch, combine="stack")
        sketches.append(rows @ rows.T)
    drawn = torch.stack(sketches)
    error = drawn.std(0) / 4
    assert bool(((drawn.mean(0) - stacked).abs() < 5 * error + 1e-6).all())
    # Averages compare different timesteps too: here that adds much more than the sketch's error.
    assert float((average @ average.T - stacked).diagonal().min()) > 10 * float(error.max())


def test_latents_and_classes_have_signs_of_their_own_shape():
    transformer = dit()
    latents = transformer.encode(torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8))
    config = mean_features(
        functional="random-signs", combine="stack", timesteps=2, projection=SKETCH
    )
    fused, loop = (
        Featuriser(transformer, config, method=method)(
            latents, [0, 1], transformer.condition(torch.eye(6)[:2])
        ).vectors
        for method in ("fused", "loop")
    )
    torch.testing.assert_close(fused, loop, rtol=1e-4, atol=1e-5)


def test_what_decides_the_signs_is_in_the_specification():
    denoiser = edm(label_dim=0)
    plain = Featuriser(denoiser, mean_features(projection=SKETCH)).spec
    assert "combine" not in plain  # as in stores that know no such choice
    stacked = Featuriser(denoiser, mean_features(projection=SKETCH, combine="stack")).spec
    assert {key for key in stacked if plain.get(key) != stacked[key]} == {"combine"}
    signs = mean_features(projection=SKETCH, functional="random-signs")
    assert Featuriser(denoiser, signs).spec["functional"] == "random-signs"
    clean = clean_samples(denoiser, 2)
    other = mean_features(projection=SKETCH, functional="random-signs", noise_seed=1)
    first, second = (Featuriser(denoiser, c)(clean, [0, 1]).vectors for c in (signs, other))
    assert float((first - second).norm()) > 0.1 * float(first.norm())


def test_signs_where_they_mean_nothing_are_refused():
    denoiser = edm(label_dim=0)
    clean, sigma = clean_samples(denoiser, 2), torch.ones(2, dtype=torch.float64)
    plain, signs = (DenoiserObjective(denoiser, name) for name in ("mean", "random-signs"))
    with pytest.raises(
        ConfigError, match="signs go with the functionals random-signs and all-outputs"
    ):
        signs.inputs(clean, clean, sigma, torch.ones(2))
    with pytest.raises(
        ConfigError, match="signs go with the functionals random-signs and all-outputs"
    ):
        plain.inputs(clean, clean, sigma, torch.ones(2), signs=clean)
    for options in ({"combine": "stack"}, {"functional": "random-signs"}):
        config = mean_features(sigmas=(2.0, 1.0), projection=SKETCH, **options)
        with pytest.raises(ConfigError, match="noise levels of its own"):
            path_features(Featuriser(denoiser, config), torch.stack([clean, clean]), [0, 1])
    with pytest.raises(ConfigError, match="combine"):
        config_from_dict(FeatureConfig, {"combine": "sum"})
