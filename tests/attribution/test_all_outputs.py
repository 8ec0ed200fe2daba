"""The kernel of all outputs by the output layer, against Jacobians written out, and its refusals."""

import math

import pytest
import torch
from gradient_models import dit, edm, liven, ncsn, tiny_text_unet, unet
from test_featurising import SKETCH, clean_samples
from torch import nn

from diffcal.attribution.featurise import FeatureConfig, Featuriser
from diffcal.attribution.gradient_outputs import OutputLayerRows
from diffcal.attribution.outputs import DenoiserObjective
from diffcal.attribution.parameters import select_parameters
from diffcal.attribution.projection import ProjectionConfig
from diffcal.attribution.projectors import spread_projector
from diffcal.core.rng import item_normal, item_signs
from diffcal.errors import ConfigError, NumericalError

TIMESTEPS = (0, 400, 900)


def condition_of(denoiser, count):
    if denoiser.condition_kind == "none":
        return None
    return denoiser.condition(torch.eye(denoiser.num_classes)[:count])


def jacobian_kernel(outputs, parameters):
    """``sum_o J_o(x) . J_o(x')`` of outputs [b, d], from the gradient of each of them."""
    each = torch.eye(outputs.numel(), dtype=outputs.dtype)
    parts = torch.autograd.grad(outputs.flatten(), parameters, each, is_grads_batched=True)
    rows = torch.cat([part.flatten(1) for part in parts], dim=1).double()
    jacobian = rows.unflatten(0, outputs.shape).flatten(1)
    return jacobian @ jacobian.T


class Objective:
    """Signed sum of a plain network's outputs, as a denoiser's objective has it."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x, sigma, target, weight, signs):
        outputs = self.module(x)
        return (outputs * signs).flatten(1).sum(dim=1), torch.zeros(len(x))


def rows_of(module, x, names="all", **options):
    """Whole rows of a plain network whose outputs have the shape of its inputs."""
    signs = item_signs(0, "test", 0, tuple(x.shape[1:])).expand_as(x)
    parameters = select_parameters(module, names)
    engine = OutputLayerRows(module, Objective(module), parameters, None, **options)
    return engine(x, torch.ones(len(x)), x, torch.ones(len(x)), signs), engine


class Unusual(nn.Module):
    """A layer between two others that keep what it does recognisable, or do not."""

    def __init__(self, layer, before=None, after=None):
        super().__init__()
        self.first, self.layer = before or nn.Conv2d(4, 4, 3, padding=1), layer
        self.after = after or (lambda y: y)

    def forward(self, x):
        return self.after(self.layer(torch.tanh(self.first(x))))


LAYERS = {
    "padded": Unusual(nn.Conv2d(4, 4, 3, padding=1)),
    "without bias": Unusual(nn.Conv2d(4, 4, 3, padding=1, bias=False)),
    "pointwise": Unusual(nn.Conv2d(4, 4, 1)),
    "groups and dilation": Unusual(nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)),
    "circular": Unusual(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
    "strided": Unusual(nn.Conv2d(4, 16, 3, stride=2, padding=1), after=nn.PixelShuffle(2)),
    "transposed": Unusual(
        nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1),
        before=nn.Conv2d(4, 4, 3, stride=2, padding=1),
    ),
    "half of the outputs": Unusual(
        nn.Conv2d(4, 8, 3, padding=1), after=lambda y: y.chunk(2, dim=1)[0]
    ),
    "scaled": Unusual(nn.Conv2d(4, 4, 3, padding=1), after=lambda y: -y / 4),
    "linear": Unusual(
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 4 * 36)),
        after=lambda y: y.unflatten(1, (4, 6, 6)),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_have_the_kernel_of_all_outputs(name):
    torch.manual_seed(0)
    module = liven(LAYERS[name].double(), size=0.3)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    found, engine = rows_of(module, x)
    parameters = [dict(module.named_parameters())[n] for n in engine.layer]
    assert all(n.startswith("layer") for n in engine.layer)
    wanted = jacobian_kernel(module(x).flatten(1), parameters)
    torch.testing.assert_close(found.vectors @ found.vectors.T, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.norms.square(), wanted.diagonal(), rtol=1e-9, atol=1e-9)


def test_the_weight_alone_and_several_entries_of_a_row():
    torch.manual_seed(0)
    module = liven(LAYERS["padded"].double(), size=0.3)
    x = torch.randn(4, 4, 6, 6, dtype=torch.float64)
    found, engine = rows_of(module, x, "re:weight")
    assert engine.layer == ("layer.weight",)
    wanted = jacobian_kernel(module(x).flatten(1), [module.layer.weight])
    torch.testing.assert_close(found.vectors @ found.vectors.T, wanted, rtol=1e-9, atol=1e-9)
    signs = item_signs(0, "test", 0, (4, 6, 6)).expand_as(x)
    ones = torch.ones(4)
    pairs = engine(x, ones, x, ones, signs, entries=2).vectors
    torch.testing.assert_close(pairs, found.vectors.unflatten(0, (2, 2)).sum(1))


@pytest.mark.parametrize("make", [edm, ncsn, unet, dit], ids=["edm", "ncsn", "unet", "dit"])
def test_kernel_of_every_family(make):
    """Real networks, class conditions and latents: the stacked, normalised kernel written out."""
    denoiser = make()
    clean = clean_samples(denoiser, 3)
    condition = condition_of(denoiser, 3)
    parameters = select_parameters(denoiser.module, "all")
    config = FeatureConfig(
        functional="all-outputs",
        combine="stack",
        timesteps=TIMESTEPS,
    )
    featuriser = Featuriser(denoiser, config, batch_rows=4)
    found = featuriser(clean, range(3), condition).vectors.double()
    layer = [parameters[name] for name in featuriser.gradients.layer]
    kernel = torch.zeros(3, 3, dtype=torch.float64)
    for at, t in enumerate(TIMESTEPS):
        noise = item_normal(0, "attribution-noise|shared", t, tuple(clean.shape[1:]))
        sigma = featuriser.levels.sigmas[at].expand(3)
        outputs = denoiser.predict(clean + float(sigma[0]) * noise, sigma, condition)
        one = jacobian_kernel(outputs.flatten(1), layer)
        size = one.diagonal().sqrt()
        kernel += one / size / size[:, None] / len(TIMESTEPS) ** 2
    # What is left is the error of the sketch, 1 / sqrt(4,096) in products of unit vectors.
    torch.testing.assert_close(found @ found.T, kernel, rtol=0, atol=6 / 64 / len(TIMESTEPS))


def test_batches_give_the_same_and_errors_are_those_of_the_network():
    denoiser = edm()
    clean, condition = clean_samples(denoiser, 5), condition_of(denoiser, 4)[[0, 1, 2, 3, 0]]

    def features(batch_rows, **options):
        config = FeatureConfig(timesteps=TIMESTEPS, projection=SKETCH, **options)
        return Featuriser(denoiser, config, batch_rows=batch_rows)(clean, range(5), condition)

    options = {"functional": "all-outputs", "combine": "stack"}
    small, whole = features(2, **options), features(64, **options)
    torch.testing.assert_close(small.vectors, whole.vectors, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.errors, features(64, functional="mean").errors)
    plain = features(64, functional="all-outputs", combine="mean", normalise=False)
    parts = [
        Featuriser(
            denoiser,
            FeatureConfig(
                functional="all-outputs",
                combine="mean",
                timesteps=(t,),
                normalise=False,
                projection=SKETCH,
            ),
        )(clean, range(5), condition).vectors
        for t in TIMESTEPS
    ]
    torch.testing.assert_close(plain.vectors, sum(parts) / 3, rtol=1e-4, atol=1e-4)


def test_half_precision_is_near_single():
    whole, half = edm(label_dim=0), edm(label_dim=0, dtype="bfloat16")
    clean = clean_samples(whole, 3)
    config = FeatureConfig(timesteps=TIMESTEPS, projection=SKETCH)
    rows = [Featuriser(one, config)(clean, range(3)).vectors for one in (whole, half)]
    assert float((rows[0] - rows[1]).norm()) < 0.02 * float(rows[0].norm())


def test_weights_and_flags_are_left_alone():
    denoiser = unet(num_class_embeds=None)
    before = {n: p.detach().clone() for n, p in denoiser.module.named_parameters()}
    config = FeatureConfig(functional="all-outputs", timesteps=2)
    Featuriser(denoiser, config)(clean_samples(denoiser, 2), [0, 1])
    for name, parameter in denoiser.module.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("after", "names", "message"),
    [
        (torch.tanh, "all", "not those of the last layer, 'layer.weight'"),
        (lambda y: y.cumsum(dim=3), "all", "not those of the last layer"),
        (lambda y: y * torch.arange(1.0, 7.0), "all", "not those of the last layer"),
        (torch.abs, "all", "not those of the last layer"),  # every size is right, but not the signs
        (torch.relu, "all", "not those of the last layer"),
        (None, "first", "not those of the last layer, 'first.weight'"),
        (None, "re:layer.bias", "none of the chosen parameters is a layer's weight"),
    ],
)
def test_networks_without_a_linear_output_layer_are_refused(after, names, message):
    module = Unusual(nn.Conv2d(4, 4, 3, padding=1), after=after)
    with pytest.raises(ConfigError, match=message):
        rows_of(module, torch.randn(2, 4, 6, 6), names)


class Tied(nn.Module):
    """One layer used twice: its outputs depend on it in two ways."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def test_a_layer_that_acts_twice_is_refused():
    with pytest.raises(ConfigError, match="acts in other ways than through the outputs"):
        rows_of(Tied(), torch.randn(2, 4, 6, 6))


def test_adapters_alone_are_refused_with_what_to_do():
    peft = pytest.importorskip("peft")
    module = tiny_text_unet()
    module.requires_grad_(False)
    module.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))

    class Text:
        def __init__(self):
            self.module = module

        def __call__(self, x, sigma, target, weight, signs):
            text = torch.ones(len(x), 4, module.config.cross_attention_dim)
            outputs = module(x, torch.ones(len(x)), text).sample
            return (outputs * signs).flatten(1).sum(dim=1), torch.zeros(len(x))

    size, channels = module.config.sample_size, module.config.in_channels
    x = torch.randn(2, channels, size, size)
    engine = OutputLayerRows(module, Text(), select_parameters(module), None)
    with pytest.raises(ConfigError, match=r"methods das-signs and das-mean"):
        engine(x, torch.ones(2), x, torch.ones(2), torch.ones_like(x))


def test_a_network_that_turns_signs_is_refused_in_a_later_batch_of_one():
    """A row alone has no other to differ from: the pattern of the first batch stays."""
    module = Unusual(nn.Conv2d(4, 4, 3, padding=1), after=torch.abs)
    x = torch.randn(2, 4, 6, 6)
    signs = item_signs(0, "test", 0, (4, 6, 6))[None]
    engine = OutputLayerRows(module, Objective(module), select_parameters(module, "all"), None)
    one = torch.ones(1)
    engine(x[:1], one, x[:1], one, signs)
    with pytest.raises(ConfigError, match="not those of the last layer"):
        engine(x[1:], one, x[1:], one, signs)


def test_outputs_that_are_not_numbers_are_no_rows():
    module = Unusual(nn.Conv2d(4, 4, 3, padding=1), after=lambda y: y * float("nan"))
    with pytest.raises(NumericalError):
        rows_of(module, torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "sample"}, "network's own outputs"),
        ({"projection": ProjectionConfig(kind="identity")}, r"projection\.kind sjlt"),
        ({"projection": ProjectionConfig(kind="factorised_sjlt")}, r"projection\.kind sjlt"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FeatureConfig(functional="all-outputs", **options)


def test_other_gradient_methods_are_refused():
    with pytest.raises(ConfigError, match="leave it at fused"):
        Featuriser(edm(), FeatureConfig(functional="all-outputs"), method="loop")


def test_signs_are_needed():
    objective = DenoiserObjective(edm(label_dim=0), "all-outputs")
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ConfigError, match="signs go with"):
        objective.inputs(x, x, torch.ones(1, dtype=torch.float64), torch.ones(1))


@pytest.mark.parametrize(("coordinates", "nonzeros"), [(5000, 1), (4096, 1), (1025, 4), (65, 64)])
def test_few_coordinates_fill_the_columns(coordinates, nonzeros):
    """An SJLT as wide as asked for, whose products err by its width and not by the coordinates."""
    projector = spread_projector(ProjectionConfig(kind="sjlt", dim=4096), coordinates)
    assert (projector.num_params, projector.dim, projector.nonzeros) == (
        coordinates,
        4096,
        nonzeros,
    )
    x = torch.nn.functional.normalize(
        torch.randn(30, coordinates, generator=torch.Generator().manual_seed(1)), dim=1
    )
    rows = projector.project(x)
    error = (rows @ rows.T - x @ x.T).square().mean().sqrt()
    assert float(error) < 3 / math.sqrt(4096)


@pytest.mark.parametrize(("kind", "dim"), [("gaussian", 4096), ("sjlt", 8192)])
def test_sketches_larger_than_what_they_sketch_are_refused(kind, dim):
    with pytest.raises(ConfigError, match="larger than the 65"):
        spread_projector(ProjectionConfig(kind=kind, dim=dim), 65)
