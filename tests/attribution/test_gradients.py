"""Fused = vmap = loop on every network family; sketches, norms, and what must be refused."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from gradient_models import (
    dhariwal,
    dit,
    edm,
    liven,
    mean_features,
    ncsn,
    rows_of,
    tiny_text_unet,
    unet,
)
from torch import nn

from diffcal.attribution.featurise import Featuriser
from diffcal.attribution.gradient_fused import FusedGradients
from diffcal.attribution.gradient_loop import LoopGradients
from diffcal.attribution.gradient_vmap import VmapGradients
from diffcal.attribution.parameters import select_parameters
from diffcal.attribution.projection import ProjectionConfig, project_rows
from diffcal.attribution.projectors import make_projector
from diffcal.errors import ConfigError, NumericalError

NETWORKS = {
    "ddpm++": edm,
    "ncsn++": ncsn,
    "skips": lambda: edm(encoder_type="skip", decoder_type="skip", resample_filter=[1, 3, 3, 1]),
    "iddpm": lambda: edm("iDDPMPrecond", label_dim=0),
    "dhariwal": dhariwal,
    "unet": unet,
    "unet-scale-shift": lambda: unet(resnet_time_scale_shift="scale_shift", num_class_embeds=None),
    "unet-learned-time": lambda: unet(time_embedding_type="learned", num_train_timesteps=1000),
    "dit": dit,
}
TOLERANCE = 1e-5


def close(found, wanted, tolerance=TOLERANCE):
    """Every row of ``found`` within ``tolerance`` of the size of the same row of ``wanted``."""
    error = (found - wanted).double().norm(dim=1) / wanted.double().norm(dim=1)
    assert float(wanted.norm(dim=1).min()) > 0
    assert float(error.max()) < tolerance, error


def trainable(module):
    return select_parameters(module, "all")


@pytest.mark.parametrize("name", NETWORKS)
def test_three_ways_agree(name):
    denoiser = NETWORKS[name]()
    objective, inputs = rows_of(denoiser, rows=3)
    parameters = trainable(denoiser.module)
    loop = LoopGradients(denoiser.module, objective, parameters)(*inputs)
    vmap = VmapGradients(denoiser.module, objective, parameters)(*inputs)
    engine = FusedGradients(denoiser.module, objective, parameters, unknown="refuse")
    fused = engine(*inputs)
    for other in (vmap, fused):
        close(other.vectors, loop.vectors)
        torch.testing.assert_close(other.norms, loop.norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(other.values, loop.values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.extras, loop.extras, rtol=1e-5, atol=1e-6)
    exact = loop.vectors.double().norm(dim=1).float()
    torch.testing.assert_close(loop.norms, exact, rtol=1e-5, atol=0)
    # Every parameter that the loop finds influential has a gradient in its own place.
    blocks, wanted = (engine.layout.split(batch.vectors) for batch in (fused, loop))
    for parameter, block in blocks.items():
        size = wanted[parameter].norm()
        if size > 1e-4 * loop.vectors.norm():
            assert (block - wanted[parameter]).norm() < 1e-4 * size, parameter
    assert all(p.requires_grad and p.grad is None for p in parameters.values())


@pytest.mark.parametrize("kind", ["identity", "factorised", "sjlt"])
@pytest.mark.parametrize("name", ["ncsn++", "unet", "dit"])
def test_rows_of_several_entries(name, kind):
    """An image at several timesteps: the gradient of their sum, three ways."""
    denoiser = NETWORKS[name]()
    objective, inputs = rows_of(denoiser, rows=10)
    parameters = trainable(denoiser.module)
    shapes = [tuple(p.shape) for p in parameters.values()]
    projector = make_projector(ProjectionConfig(kind=kind, dim=256, factor_dim=6), shapes)
    single = LoopGradients(denoiser.module, objective, parameters, projector)(*inputs)
    wanted = single.vectors.unflatten(0, (2, 5)).sum(dim=1)
    whole = LoopGradients(denoiser.module, objective, parameters)(*inputs, entries=5)
    for method in (LoopGradients, VmapGradients, FusedGradients):
        found = method(denoiser.module, objective, parameters, projector)(*inputs, entries=5)
        close(found.vectors, wanted)
        torch.testing.assert_close(found.norms, whole.vectors.norm(dim=1), rtol=2e-5, atol=0)
        torch.testing.assert_close(found.values, single.values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.extras, single.extras, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="10 entries are no rows of 4"):
        LoopGradients(denoiser.module, objective, parameters)(*inputs, entries=4)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", ["factorised_sjlt", "sjlt"])
def test_half_precision_stays_near(kind, normalise):
    """bfloat16 autocast of the network and of the products that make sketches: directions stay."""
    half, full = unet("bfloat16"), unet()
    config = mean_features(
        timesteps=5, normalise=normalise, projection=ProjectionConfig(kind=kind, dim=256)
    )
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(4, *half.sample_shape, generator=generator) * 2 - 1
    condition = half.condition(torch.eye(half.num_classes)[[0, 1, 0, 1]])
    found, wanted = (
        Featuriser(denoiser, config, unknown="refuse")(clean, range(4), condition).vectors
        for denoiser in (half, full)
    )
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)
    cosine = torch.nn.functional.cosine_similarity(found, wanted)
    assert float(cosine.min()) > 0.999, cosine


@pytest.mark.parametrize(
    ("kind", "norms"),
    [("factorised", "exact"), ("factorised_sjlt", "projected"), ("sjlt", "exact")],
)
@pytest.mark.parametrize("name", ["ncsn++", "unet", "dit"])
def test_projected_as_made_equals_projected_afterwards(name, kind, norms):
    denoiser = NETWORKS[name]()
    objective, inputs = rows_of(denoiser, rows=3)
    parameters = trainable(denoiser.module)
    shapes = [tuple(p.shape) for p in parameters.values()]
    projector = make_projector(ProjectionConfig(kind=kind, dim=256, factor_dim=6), shapes)
    whole = VmapGradients(denoiser.module, objective, parameters)(*inputs)
    engine = FusedGradients(
        denoiser.module, objective, parameters, projector, norms=norms, unknown="refuse"
    )
    fused = engine(*inputs)
    close(fused.vectors, project_rows(projector, whole.vectors))
    wanted = whole.norms if norms == "exact" else fused.vectors.norm(dim=1)
    torch.testing.assert_close(fused.norms, wanted, rtol=2e-5, atol=0)


def test_sketch_with_whole_sides_is_the_gradient():
    denoiser = unet()
    objective, inputs = rows_of(denoiser, rows=2)
    parameters = trainable(denoiser.module)
    shapes = [tuple(p.shape) for p in parameters.values()]
    projector = make_projector(ProjectionConfig(kind="factorised", factor_dim=10**4), shapes)
    assert projector.dim == projector.num_params
    engine = FusedGradients(denoiser.module, objective, parameters, projector, norms="projected")
    wanted = VmapGradients(denoiser.module, objective, parameters)(*inputs)
    close(engine(*inputs).vectors, wanted.vectors)


def weight_gradients(engine, inputs):
    """How many convolution weight gradients a call computes, and how many input gradients."""
    engine(*inputs)  # the check of the first batch does compute them
    with torch.profiler.profile(record_shapes=True) as profile:
        engine(*inputs)
    masks = [
        event.concrete_inputs[10]
        for event in profile.events()
        if event.name == "aten::convolution_backward"
    ]
    return sum(mask[1] for mask in masks), sum(mask[0] for mask in masks)


def test_sketch_never_forms_a_weight_gradient():
    denoiser = ncsn()
    objective, inputs = rows_of(denoiser, rows=2)
    parameters = trainable(denoiser.module)
    shapes = [tuple(p.shape) for p in parameters.values()]
    projector = make_projector(ProjectionConfig(kind="factorised", factor_dim=4), shapes)
    sketched = FusedGradients(denoiser.module, objective, parameters, projector, norms="projected")
    formed, passed_on = weight_gradients(sketched, inputs)
    assert formed == 0
    assert passed_on > 10
    formed, _ = weight_gradients(FusedGradients(denoiser.module, objective, parameters), inputs)
    assert formed > 10


def lora(rank=2):
    peft = pytest.importorskip("peft")
    module = liven(tiny_text_unet())
    module.requires_grad_(False)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=4,
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"],
    )
    module.add_adapter(config)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def text_rows(module, rows=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, 4, 4, generator=generator)
    text = torch.randn(rows, 5, 16, generator=generator)
    t = torch.tensor([3, 500, 900])[:rows]

    def objective(x, t, text):
        out = module(x, t, encoder_hidden_states=text, return_dict=False)[0]
        return out.square().flatten(1).mean(1), out.flatten(1)

    return objective, (x, t, text)


@pytest.mark.parametrize("which", ["lora", "all"])
def test_text_conditional_network_and_its_adapters(which):
    module = lora() if which == "lora" else liven(tiny_text_unet())
    objective, inputs = text_rows(module)
    parameters = select_parameters(module, which)
    assert all("lora_" in name for name in parameters) == (which == "lora")
    assert any(p.ndim == 4 for p in parameters.values())  # convolutions have adapters too
    loop = LoopGradients(module, objective, parameters)(*inputs)
    fused = FusedGradients(module, objective, parameters, unknown="refuse")(*inputs)
    close(fused.vectors, loop.vectors)
    close(VmapGradients(module, objective, parameters)(*inputs).vectors, loop.vectors)
    torch.testing.assert_close(fused.extras, loop.extras, rtol=1e-4, atol=1e-5)
    if which == "lora":
        assert not any(p.requires_grad for n, p in module.named_parameters() if "lora_" not in n)


class Operations(nn.Module):
    """One of every operation with a rule that image networks seldom have."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)
        self.conv2 = nn.Conv2d(3, 4, (3, 2), padding="same", padding_mode="circular")
        self.same = nn.Conv2d(4, 4, 4, padding="same", dilation=2, groups=4)
        self.conv3 = nn.Conv3d(
            2, 3, (2, 3, 1), stride=(1, 2, 1), padding=1, padding_mode="replicate"
        )
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2)
        self.batch = nn.BatchNorm2d(6)
        self.batch.running_mean.normal_()
        self.batch.running_var.uniform_(0.5, 2)
        self.instance = nn.InstanceNorm1d(6, affine=True)
        self.layer = nn.LayerNorm((5, 6))
        self.rms = nn.RMSNorm(6)
        self.table = nn.Embedding(7, 6, padding_idx=2)
        self.position = nn.Parameter(torch.randn(1, 5, 6))
        self.gain = nn.Parameter(torch.randn(6, 1))
        self.mixing = nn.Parameter(torch.randn(6, 3))
        self.time = nn.Linear(2, 6)  # fed with one row for the whole batch
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x, words):
        a = self.conv1(x.flatten(2)[:, :, :9].repeat(1, 2, 1)[:, :4]).mean(2)
        image = self.conv2(x)
        b = self.batch(self.up(self.relu(self.same(image)))).mean((2, 3))
        c = self.conv3(x[:, :2, None].repeat(1, 1, 3, 1, 1)).mean((2, 3, 4))
        tokens = self.layer(self.table(words) + self.position)
        tokens = self.rms(tokens * torch.sigmoid(a)[:, None] + self.time(x.new_ones(1, 2))[:, None])
        tokens = self.instance(tokens.transpose(1, 2)) * self.gain
        shared = self.rms(tokens.transpose(1, 2)) @ self.mixing  # a module called twice
        return (shared.square().mean((1, 2)) + (a * b).sum(1) + c.square().sum(1)).tanh()


def operation_rows(module, rows=3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 3, 6, 5, generator=generator)
    words = torch.randint(0, 7, (rows, 5), generator=generator)
    words[0, 0], words[1, 1] = 2, 2

    def objective(x, words):
        out = module(x, words)
        return out, out

    return objective, (x, words)


@pytest.mark.parametrize("kind", ["identity", "factorised"])
def test_every_operation_with_a_rule(kind):
    torch.manual_seed(0)
    module = Operations().double().eval()
    objective, inputs = operation_rows(module)
    inputs = (inputs[0].double(), inputs[1])
    parameters = trainable(module)
    shapes = [tuple(p.shape) for p in parameters.values()]
    projector = make_projector(ProjectionConfig(kind=kind, factor_dim=3), shapes)
    loop = LoopGradients(module, objective, parameters, projector)(*inputs)
    fused = FusedGradients(module, objective, parameters, projector, unknown="refuse")(*inputs)
    close(fused.vectors, loop.vectors, 1e-10)
    torch.testing.assert_close(fused.norms, loop.norms, rtol=1e-10, atol=0)
    assert fused.vectors.dtype == torch.float64
    blocks = FusedGradients(module, objective, parameters).layout.split(
        LoopGradients(module, objective, parameters)(*inputs).vectors
    )
    assert all(float(block.abs().max()) > 0 for block in blocks.values())  # nothing is vacuous


class Attention(nn.Module):
    """Parameters that act outside every rule: packed attention weights and a matrix power."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.odd = nn.Parameter(torch.randn(4, 4))
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        h, _ = self.attention(x, x, x, need_weights=False)
        return self.last(h @ torch.linalg.matrix_exp(self.odd)).mean((1, 2))


def test_unknown_uses_go_through_vmap_or_are_refused_by_name(caplog):
    torch.manual_seed(0)
    module = Attention().eval()
    x = torch.randn(3, 5, 4)

    def objective(x):
        out = module(x)
        return out, out

    parameters = trainable(module)
    loop = LoopGradients(module, objective, parameters)(x)
    engine = FusedGradients(module, objective, parameters)
    with caplog.at_level(logging.WARNING):
        fused = engine(x)
    close(fused.vectors, loop.vectors)
    torch.testing.assert_close(fused.norms, loop.norms, rtol=1e-5, atol=0)
    shapes = [tuple(p.shape) for p in parameters.values()]
    projector = make_projector(ProjectionConfig(kind="factorised", factor_dim=3), shapes)
    sketched = FusedGradients(module, objective, parameters, projector)(x)
    close(sketched.vectors, project_rows(projector, loop.vectors))
    torch.testing.assert_close(sketched.norms, loop.norms, rtol=1e-5, atol=0)
    assert set(engine.slow_parameters) == {
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
        "odd",
    }
    assert "linalg" in engine.slow_parameters["odd"]
    assert "odd" in caplog.text
    with pytest.raises(ConfigError, match=r"odd .*matrix_exp"):
        FusedGradients(module, objective, parameters, unknown="refuse")(x)


def test_uses_that_taps_cannot_see_are_found_by_the_check():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True)).eval()
    x = torch.randn(3, 5, 4)

    def objective(x):
        out = module(x)[0].sum((1, 2))
        return out, out

    parameters = trainable(module)
    with pytest.raises(ConfigError, match=r"1\.weight_ih_l0"):
        FusedGradients(module, objective, parameters, unknown="refuse")(x)
    first = select_parameters(module, "0")
    loop = LoopGradients(module, objective, first)(x)
    close(FusedGradients(module, objective, first, unknown="refuse")(x).vectors, loop.vectors)


def test_tied_weights_and_merged_rows():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight

        def forward(self, words):
            h = self.table(words)
            flat = self.head(h.reshape(-1, 4).tanh())  # rows and positions in one axis
            return flat.reshape(len(words), -1).square().sum(1)

    torch.manual_seed(0)
    module = Tied()
    words = torch.randint(0, 6, (4, 3))

    def objective(words):
        out = module(words)
        return out, out

    parameters = trainable(module)
    assert list(parameters) == ["table.weight"]
    loop = LoopGradients(module, objective, parameters)(words)
    fused = FusedGradients(module, objective, parameters, unknown="refuse")(words)
    close(fused.vectors, loop.vectors)
    torch.testing.assert_close(fused.norms, loop.norms, rtol=1e-5, atol=0)


def test_sequence_first_activations_are_noticed():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)

    def objective(x):
        out = layer(x.transpose(0, 1)).tanh().sum((0, 2))  # [s, b, d]: rows are not the first axis
        return out, out

    x = torch.randn(2, 6, 4)
    loop = LoopGradients(layer, objective, trainable(layer))(x)
    engine = FusedGradients(layer, objective, trainable(layer))
    close(engine(x).vectors, loop.vectors)
    assert set(engine.slow_parameters) == {"weight", "bias"}


def test_rows_that_influence_each_other_are_refused():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(4, 3, 6, 6)

    def objective(x):
        out = module(x).square().mean((1, 2, 3))
        return out, out

    with pytest.raises(ConfigError, match="'1' uses statistics of the batch"):
        FusedGradients(module, objective, trainable(module))(x)

    module = module[:1]

    def mixing(x):
        hidden = module(x)
        out = (hidden - hidden.mean(0)).square().mean((1, 2, 3))
        return out, out

    with pytest.raises(ConfigError, match="influence each other"):
        FusedGradients(module, mixing, trainable(module))(x)


def test_gradients_with_nan_and_checkpointed_activations_are_refused():
    denoiser = edm()
    objective, inputs = rows_of(denoiser, rows=2)
    broken = (inputs[0].index_fill(0, torch.tensor([1]), float("nan")), *inputs[1:])
    engine = FusedGradients(denoiser.module, objective, trainable(denoiser.module), check=False)
    with pytest.raises(NumericalError, match="per-sample gradients"):
        engine(*broken)
    other = unet()
    other.module.enable_gradient_checkpointing()
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        FusedGradients(other.module, objective, trainable(other.module))


def test_overwritten_activations_are_kept():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))

    def objective(x):
        h = module[0](x)
        out = module[1](h)
        h.mul_(2)  # after the second layer has read it; its backward does not need it
        return module[2](out + h)[:, 0], h

    x = torch.randn(3, 4)
    loop_parameters = trainable(module)

    # autograd itself refuses this, so the oracle works on a copy of the activation
    def oracle(x):
        h = module[0](x)
        return module[2](module[1](h) + 2 * h)[:, 0], h

    loop = LoopGradients(module, oracle, loop_parameters)(x)
    fused = FusedGradients(module, objective, loop_parameters, check=False)(x)
    close(fused.vectors, loop.vectors)


@pytest.mark.parametrize("name", ["ncsn++", "unet"])
def test_rows_do_not_depend_on_their_batch(name):
    denoiser = NETWORKS[name]()
    objective, inputs = rows_of(denoiser, rows=4)
    engine = FusedGradients(denoiser.module, objective, trainable(denoiser.module))
    whole = engine(*inputs)
    order = torch.tensor([2, 0, 3])
    close(engine(*(t[order] for t in inputs)).vectors, whole.vectors[order], 1e-5)
    close(engine(*(t[1:2] for t in inputs)).vectors, whole.vectors[1:2], 1e-5)
    # Inputs that require gradients themselves change nothing, and no graph is left behind.
    leaf = inputs[0].clone().requires_grad_()
    close(engine(leaf, *inputs[1:]).vectors, whole.vectors, 1e-6)
    assert leaf.grad is None
    assert not engine(leaf, *inputs[1:]).values.requires_grad


def test_backward_stops_at_the_earliest_chosen_layer():
    denoiser = unet()
    objective, inputs = rows_of(denoiser, rows=2)
    everything = trainable(denoiser.module)
    some = select_parameters(denoiser.module, "up_blocks.1")
    assert 0 < len(some) < len(everything)
    engine = FusedGradients(denoiser.module, objective, some, check=False, unknown="refuse")
    close(engine(*inputs).vectors, LoopGradients(denoiser.module, objective, some)(*inputs).vectors)

    def operations(engine):
        with torch.profiler.profile() as profile:
            engine(*inputs)
        counts = {event.key: event.count for event in profile.key_averages()}
        return counts["aten::convolution_backward"]

    whole = FusedGradients(denoiser.module, objective, everything, check=False)
    assert operations(engine) < operations(whole) / 2


def test_half_precision_and_memory_format():
    wanted_denoiser = unet()
    objective, inputs = rows_of(wanted_denoiser, rows=2)
    wanted = LoopGradients(wanted_denoiser.module, objective, trainable(wanted_denoiser.module))
    wanted = wanted(*inputs).vectors
    last = copy.deepcopy(wanted_denoiser)
    last.module.to(memory_format=torch.channels_last)
    objective, _ = rows_of(last, rows=2)
    engine = FusedGradients(last.module, objective, trainable(last.module), unknown="refuse")
    strided = (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
    close(engine(*strided).vectors, wanted)

    half = unet(dtype="bfloat16")
    objective, _ = rows_of(half, rows=2)
    parameters = trainable(half.module)
    loop = LoopGradients(half.module, objective, parameters)(*inputs).vectors
    engine = FusedGradients(half.module, objective, parameters, unknown="refuse")
    fused = engine(*inputs).vectors
    close(fused, loop, 0.03)
    close(fused, wanted, 0.1)
    assert fused.dtype == torch.float32
    shapes = [tuple(p.shape) for p in parameters.values()]
    projector = make_projector(ProjectionConfig(kind="factorised", factor_dim=6), shapes)
    engine = FusedGradients(
        half.module, objective, parameters, projector, norms="projected", unknown="refuse"
    )
    sketched = engine(*inputs).vectors
    close(sketched, project_rows(projector, loop), 0.03)
    assert sketched.dtype == torch.float32


def test_graph_of_convolutions_matches_functional_form():
    # The rule binds keyword arguments as well as positional ones.
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    module = nn.Module()
    module.weight = weight

    def objective(x):
        out = F.conv2d(input=x, weight=module.weight, padding=(1, 0), stride=2)
        out = out.square().sum((1, 2, 3))
        return out, out

    x = torch.randn(3, 3, 7, 6)
    loop = LoopGradients(module, objective, trainable(module))(x)
    close(
        FusedGradients(module, objective, trainable(module), unknown="refuse")(x).vectors,
        loop.vectors,
    )


def test_wrong_parameters_and_projectors():
    denoiser = edm()
    objective, inputs = rows_of(denoiser, rows=2)
    parameters = trainable(denoiser.module)
    with pytest.raises(ConfigError, match="no parameters"):
        FusedGradients(denoiser.module, objective, {})
    with pytest.raises(ConfigError, match="'w' is not a parameter"):
        FusedGradients(denoiser.module, objective, {"w": nn.Parameter(torch.ones(1))})
    projector = make_projector(ProjectionConfig(dim=8), [(3, 4)])
    with pytest.raises(ConfigError, match="made for 12 parameters"):
        FusedGradients(denoiser.module, objective, parameters, projector)
    with pytest.raises(ConfigError, match="different numbers of rows"):
        FusedGradients(denoiser.module, objective, parameters)(
            inputs[0], *(t[:1] for t in inputs[1:])
        )
