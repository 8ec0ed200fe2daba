"""Features against golden numbers, the published formula written out, and their invariances."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from gradient_models import (
    dit,
    edm,
    liven,
    mean_features,
    ncsn,
    tiny_text_unet,
    tiny_unet,
    tiny_vae,
    unet,
)
from tiny_diffusers import tiny_text_models
from torch import nn

from diffcal.attribution.featurise import Featuriser, average_over_timesteps
from diffcal.attribution.functionals import FUNCTIONALS
from diffcal.attribution.outputs import DenoiserObjective
from diffcal.attribution.projection import ProjectionConfig, project_rows
from diffcal.core.tensors import append_dims
from diffcal.diffusion.closed_forms import GaussianDenoiser
from diffcal.diffusion.diffusers_denoisers import UNet2DDenoiser
from diffcal.diffusion.stable_diffusion import StableDiffusionDenoiser
from diffcal.errors import ConfigError, DataError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "das.json").read_text("utf-8"))
CASE = GOLDEN["C_featuriser"]
WHOLE = ProjectionConfig(kind="identity")
SKETCH = ProjectionConfig(kind="sjlt", dim=512)


def clean_samples(denoiser, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, *denoiser.sample_shape), generator=generator) * 2 - 1


class LinearNetwork(nn.Module):
    """``W x_t + u t / 1000``, and as a denoiser what the network of the golden case is."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.tensor(CASE["W"], dtype=torch.float64))
        self.u = nn.Parameter(torch.tensor(CASE["u"], dtype=torch.float64))

    def forward(self, x, t):
        out = nn.functional.linear(x.flatten(1), self.W) + self.u * (t / 1000)[:, None]
        return out.reshape(x.shape)


class LinearDenoiser:
    """Golden case C; sigma stands for the timestep of the linear schedule."""

    def __init__(self):
        self.module = LinearNetwork()
        self.sample_shape, self.num_classes, self.condition_kind = (2, 1, 1), 0, "none"
        self.sigma_min, self.sigma_max, self.dtype = 1e-3, 200.0, torch.float32
        self.fingerprint, self.sigma_data = "linear", 1.0
        self.class_names = self.feature_modules = ()
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        abar = (1 - betas).cumprod(0)
        self.sigmas = ((1 - abar) / abar).sqrt()

    def predict(self, x, sigma, condition=None):
        t = (sigma[:, None] - self.sigmas).abs().argmin(1)
        return self.module(x / append_dims((1 + sigma**2).sqrt(), x), t)

    def target(self, clean, noise, sigma):
        return noise

    def __call__(self, x, sigma, condition=None):
        return x - append_dims(sigma, x) * self.predict(x, sigma)

    def condition(self, weights): ...

    unconditional = encode = decode = to = condition  # not asked for


@pytest.mark.parametrize("method", ["loop", "vmap", "fused"])
@pytest.mark.parametrize(
    "name", [name for name in FUNCTIONALS if name not in ("random-signs", "all-outputs")]
)
def test_golden_functionals(name, method):
    config = mean_features(functional=name, timesteps=(100, 500), projection=WHOLE)
    featuriser = Featuriser(LinearDenoiser(), config, method=method, unknown="refuse")
    clean = torch.tensor(CASE["x0"], dtype=torch.float64)[:, :, None, None]
    noise = torch.tensor(CASE["eps[N][T][d]"], dtype=torch.float64)
    batch = featuriser.rows(
        clean.repeat_interleave(2, 0),
        noise.reshape(6, 2, 1, 1),
        torch.tensor([0, 1, 0, 1, 0, 1]),
    )
    wanted = CASE["functionals"][name]
    close = {"rtol": 1e-7, "atol": 2e-9}
    gradients = torch.tensor(wanted["grad[N][T][6]"], dtype=torch.float64)
    torch.testing.assert_close(batch.vectors.reshape(3, 2, 6), gradients, **close)
    torch.testing.assert_close(batch.norms.reshape(3, 2), gradients.norm(dim=2), **close)
    errors = torch.tensor(CASE["mse[N][T]"], dtype=torch.float64)
    torch.testing.assert_close(batch.extras.reshape(3, 2), errors, **close)
    for key, norms in (
        ("feature_mean_over_t", None),
        ("feature_normalised_then_mean", batch.norms.reshape(3, 2)),
    ):
        found = average_over_timesteps(batch.vectors.reshape(3, 2, 6), norms)
        # The golden numbers have ten decimals, which weighted-mse's small gradients feel.
        loose = {"rtol": 1e-5, "atol": 2e-9} if name == "weighted-mse" else close
        torch.testing.assert_close(found, torch.tensor(wanted[key], dtype=torch.float64), **loose)


@pytest.mark.parametrize(("functional", "normalise"), [("mean", True), ("loss", False)])
def test_features_are_the_published_formula(functional, normalise):
    """Written out with the scheduler's own noising and one backward pass per (sample, timestep)."""
    module, scheduler = liven(tiny_unet(None)), DDPMScheduler()
    config = mean_features(
        functional=functional, timesteps=4, normalise=normalise, projection=SKETCH, noise="slot"
    )
    featuriser = Featuriser(UNet2DDenoiser(module, scheduler), config, batch_rows=5)
    assert featuriser.levels.timesteps == (0, 250, 500, 750)
    clean = clean_samples(featuriser.denoiser, 3)
    found = featuriser(clean, [0, 1, 17])
    wanted = torch.zeros(3, featuriser.gradients.layout.size)
    errors = torch.zeros(3, 4)
    for row, t in ((row, t) for t in range(4) for row in range(3)):
        torch.manual_seed(250 * t)
        noise = torch.randn(16, 3, 8, 8)[[0, 1, 17 % 16][row]][None]
        x_t = scheduler.add_noise(clean[row : row + 1], noise, torch.tensor([250 * t]))
        prediction = module(x_t, torch.tensor([250 * t])).sample
        error = (prediction - noise).square().mean()
        value = prediction.mean() if functional == "mean" else error
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))]
        )
        wanted[row] += gradient / (gradient.norm() + 1e-8) / 4 if normalise else gradient / 4
        errors[row, t] = error.detach()
    wanted = project_rows(featuriser.gradients.projector, wanted)
    assert float((found.vectors - wanted).norm(dim=1).div(wanted.norm(dim=1)).max()) < 5e-5
    torch.testing.assert_close(found.errors, errors, rtol=1e-4, atol=1e-6)
    if functional == "loss":
        torch.testing.assert_close(found.values, found.errors, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("noise", ["shared", "slot", "independent"])
def test_batches_and_order_change_nothing(noise):
    denoiser = edm()
    clean = clean_samples(denoiser)
    weights = torch.eye(4)
    condition = denoiser.condition(weights)
    config = mean_features(timesteps=2, noise=noise, projection=SKETCH)
    whole = Featuriser(denoiser, config)(clean, [0, 1, 2, 3], condition)
    order = [3, 1, 0]
    small = Featuriser(denoiser, config, batch_rows=3)
    other = small(clean[order], order, condition[order])
    torch.testing.assert_close(other.vectors, whole.vectors[order], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other.errors, whole.errors[order], rtol=1e-4, atol=1e-6)
    # Conditions matter, and so does noise of one's own.
    swapped = small(clean[order], order, condition[[0, 3, 1]])
    assert float((swapped.vectors - other.vectors).norm()) > 1e-2 * float(other.vectors.norm())
    moved = small(clean[order], [7, 8, 9], condition[order])
    same = bool(torch.equal(moved.errors, other.errors))
    assert same == (noise == "shared")
    query = small(clean[order], order, condition[order], role="query")
    assert bool(torch.equal(query.errors, other.errors)) == (noise != "independent")


def test_norms_exact_and_projected():
    denoiser = ncsn()
    clean, condition = clean_samples(denoiser, 2), denoiser.condition(torch.eye(4)[:2])

    def features(**changes):
        config = mean_features(timesteps=(900,), **changes)
        return Featuriser(denoiser, config)(clean, [0, 1], condition).vectors

    factorised = ProjectionConfig(kind="factorised", factor_dim=8)
    assert mean_features(projection=factorised).norm_kind == "projected"
    assert mean_features(projection=SKETCH).norm_kind == "exact"
    one = features(projection=factorised)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(2), rtol=1e-5, atol=0)
    whole = features(projection=WHOLE)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(2), rtol=1e-5, atol=0)
    ghost = features(projection=factorised, norms="exact")
    plain = features(projection=factorised, normalise=False)
    norms = features(projection=WHOLE, normalise=False).norm(dim=1, keepdim=True)
    torch.testing.assert_close(ghost, plain / norms, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_targets_are_what_the_network_was_trained_for(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    denoiser = UNet2DDenoiser(liven(tiny_unet(None)), scheduler)
    clean, noise = clean_samples(denoiser), clean_samples(denoiser, seed=1)
    t = torch.tensor([0, 100, 500, 999])
    sigma = denoiser.noise.sigma(t)
    objective = DenoiserObjective(denoiser, "loss")
    x, _, target, _ = objective.inputs(clean, noise, sigma, torch.ones(4))
    wanted = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": scheduler.get_velocity(clean, noise, t),
    }[prediction_type]
    torch.testing.assert_close(target, wanted, rtol=1e-4, atol=1e-5)
    output = denoiser.module(scheduler.add_noise(clean, noise, t), t).sample
    value, error = objective(x, sigma, target, torch.ones(4))
    torch.testing.assert_close(error, (output - wanted).square().mean((1, 2, 3)), rtol=2e-4, atol=0)
    torch.testing.assert_close(value, error)
    # The same network seen in another form: the error of the clean sample is that of the denoiser.
    as_sample = DenoiserObjective(denoiser, "loss", "sample")
    rows = as_sample.inputs(clean, noise, sigma, torch.ones(4))
    denoised = denoiser(x, sigma)
    error = (denoised - clean).square().mean((1, 2, 3))
    torch.testing.assert_close(as_sample(*rows)[0], error, rtol=1e-4, atol=0)
    as_epsilon = DenoiserObjective(denoiser, "loss", "epsilon")
    rows = as_epsilon.inputs(clean, noise, sigma, torch.ones(4))
    torch.testing.assert_close(
        as_epsilon(*rows)[0], error / sigma.float() ** 2, rtol=2e-3, atol=1e-5
    )
    if prediction_type == "v_prediction":
        as_v = DenoiserObjective(denoiser, "loss", "v")
        rows = as_v.inputs(clean, noise, sigma, torch.ones(4))
        torch.testing.assert_close(as_v(*rows)[0], value, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("preconditioner", ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_targets_of_preconditioned_networks(preconditioner):
    denoiser = edm(preconditioner, label_dim=0)
    clean, noise = clean_samples(denoiser), clean_samples(denoiser, seed=1)
    sigma = torch.tensor([0.05, 0.3, 2.0, 40.0], dtype=torch.float64)
    x = clean + append_dims(sigma.float(), clean) * noise
    raw, denoised = denoiser.predict(x, sigma), denoiser(x, sigma)
    target = denoiser.target(clean, noise, sigma)
    c_skip, c_out, _, _ = denoiser.network.coefficients(append_dims(sigma.float(), clean))
    torch.testing.assert_close(c_skip * x + c_out * raw, denoised, rtol=1e-5, atol=1e-5)
    # A perfect network gives the clean sample back.
    torch.testing.assert_close(c_skip * x + c_out * target, clean, rtol=1e-4, atol=1e-4)
    if preconditioner == "VPPrecond":
        torch.testing.assert_close(target, noise, rtol=1e-5, atol=1e-5)


def test_latent_and_text_conditions(tmp_path):
    transformer = dit()
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    config = mean_features(timesteps=2, projection=SKETCH, params="transformer_blocks.1")
    latents = transformer.encode(images)
    condition = transformer.condition(torch.eye(6)[:2])
    methods = [
        Featuriser(transformer, config, method=method)(latents, [0, 1], condition).vectors
        for method in ("fused", "loop")
    ]
    torch.testing.assert_close(*methods, rtol=1e-4, atol=1e-5)

    text = StableDiffusionDenoiser(
        liven(tiny_text_unet()),
        tiny_vae(),
        DDIMScheduler(steps_offset=1, clip_sample=False, prediction_type="v_prediction"),
        *tiny_text_models(tmp_path),
        ("a cat", "a car"),
    )
    config = mean_features(timesteps=2, projection=SKETCH, params="attn1, attn2")
    latents, condition = text.encode(images), text.condition(torch.eye(2))
    fused, loop = (
        Featuriser(text, config, method=method)(latents, [0, 1], condition).vectors
        for method in ("fused", "loop")
    )
    torch.testing.assert_close(fused, loop, rtol=1e-4, atol=1e-5)
    other = Featuriser(text, config)(latents, [0, 1], condition.flip(0)).vectors
    assert float((other - fused).norm()) > 1e-4 * float(fused.norm())


def test_callables_as_functionals():
    denoiser = edm()
    clean, condition = clean_samples(denoiser, 2), denoiser.condition(torch.eye(4)[:2])

    def half_mean(outputs):
        return outputs.prediction.flatten(1).mean(1) / 2

    config = mean_features(functional="custom", timesteps=1, normalise=False, projection=SKETCH)
    custom = Featuriser(denoiser, config, functional=half_mean)
    named = Featuriser(denoiser, mean_features(timesteps=1, normalise=False, projection=SKETCH))
    found, wanted = (f(clean, [0, 1], condition).vectors for f in (custom, named))
    torch.testing.assert_close(2 * found, wanted, rtol=1e-4, atol=1e-6)
    assert custom.spec["functional"].endswith("half_mean")
    with pytest.raises(ConfigError, match="callable functional"):
        Featuriser(denoiser, config)
    with pytest.raises(ConfigError, match="one number for each"):
        Featuriser(denoiser, config, functional=lambda o: o.prediction.mean())(
            clean, [0, 1], condition
        )


def test_specification_tells_what_decides_features():
    denoiser = edm()
    config = mean_features(projection=SKETCH)
    spec = Featuriser(denoiser, config).spec
    assert spec == json.loads(json.dumps(spec))
    assert spec == Featuriser(denoiser, config, method="vmap", batch_rows=2).spec
    grid = tuple(range(0, 1000, 100))
    assert spec == Featuriser(denoiser, mean_features(timesteps=grid, projection=SKETCH)).spec
    changes = [
        {"functional": "loss"},
        {"prediction": "epsilon"},
        {"timesteps": 9},
        {"noise": "slot"},
        {"noise_seed": 1},
        {"noise": "slot", "slot_batch": 52},
        {"normalise": False},
        {"norms": "projected"},
        {"params": "model.dec"},
    ]
    specs = [Featuriser(denoiser, mean_features(projection=SKETCH, **c)).spec for c in changes]
    for change, other in zip(changes, specs, strict=True):
        assert other != spec, change
    assert len({json.dumps(other) for other in specs}) == len(changes)
    other_weights = edm()
    liven(other_weights.module, seed=9)
    assert Featuriser(other_weights, config).spec["model"] != spec["model"]


def test_what_cannot_be_featurised():
    with pytest.raises(ConfigError, match="unknown functional 'average'"):
        mean_features(functional="average")
    with pytest.raises(ConfigError, match="no weights for sigmas"):
        mean_features(functional="weighted-mse", sigmas=(1.0,))
    denoiser = edm()
    with pytest.raises(ConfigError, match="no trainable parameter matches 'up_blocks'"):
        Featuriser(denoiser, mean_features(params="up_blocks"))
    with pytest.raises(ConfigError, match="larger than the"):
        Featuriser(denoiser, mean_features(projection=ProjectionConfig(dim=10**7)))
    featuriser = Featuriser(denoiser, mean_features(projection=SKETCH))
    with pytest.raises(DataError, match="2 samples, 3 indices"):
        featuriser(clean_samples(denoiser, 2), [0, 1, 2], denoiser.condition(torch.eye(4)[:2]))
    with pytest.raises(ConfigError, match="class condition"):
        featuriser(clean_samples(denoiser, 2), [0, 1])
    plain = GaussianDenoiser(torch.zeros(1, 2, 1, 1), 1.0)
    with pytest.raises(ConfigError, match="does not tell its network's raw output"):
        DenoiserObjective(plain)


def test_channels_last_and_half_precision_features():
    clean = clean_samples(unet(), 2)
    config = mean_features(timesteps=2, projection=SKETCH)
    results = []
    for dtype, last in (("float32", False), ("float32", True), ("bfloat16", False)):
        denoiser = unet(dtype=dtype)
        condition = denoiser.condition(torch.eye(5)[:2])
        featuriser = Featuriser(denoiser, config, channels_last=last)
        results.append(featuriser(clean, [0, 1], condition).vectors)
        assert featuriser.spec["model_dtype"] == dtype
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert float((results[2] - results[0]).norm()) < 0.1 * float(results[0].norm())
