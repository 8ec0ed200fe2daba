"""Gradients and sketches of single layers against golden numbers; noise, timesteps, parameters."""

import json
from pathlib import Path

import pytest
import torch
from gradient_models import edm, tiny_unet, unet

from diffcal.attribution import gradient_conv
from diffcal.attribution.gradient_conv import (
    LARGE_ARRAY,
    ConvGeometry,
    ConvPart,
    sketch_convolution,
    unfold,
)
from diffcal.attribution.gradient_parts import BroadcastPart, OuterPart, TablePart
from diffcal.attribution.noise import attribution_noise
from diffcal.attribution.parameters import Layout, select_parameters
from diffcal.attribution.projection_factorised import LayerSketch
from diffcal.attribution.timesteps import elbo_weights, noise_levels, timestep_grid
from diffcal.core.rng import item_normal
from diffcal.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "das.json").read_text("utf-8"))


def numbers(value):
    return torch.tensor(value, dtype=torch.float64)


def test_golden_linear_layer():
    case = GOLDEN["H_projection"]["linear"]
    a, g, right, left = (numbers(case[key]) for key in ("a", "g", "Pi", "Po"))
    part = OuterPart("w", (3, 4), a, rows=2)
    gradient = numbers(case["grad[B][dout][din]"])
    torch.testing.assert_close(part.exact(g), gradient, rtol=1e-7, atol=1e-9)
    squares = gradient.flatten(1).square().sum(1)
    torch.testing.assert_close(part.squared_norm(g), squares)
    bias = BroadcastPart("b", (3,), (3,), None, rows=2)
    torch.testing.assert_close(bias.exact(g), numbers(case["bias_grad"]))
    layer = LayerSketch(0, 3, 4, left, right, 0)
    projected = numbers(case["projected[B][ko][ki]"])
    torch.testing.assert_close(part.sketch(g, layer), projected, rtol=1e-7, atol=1e-8)
    part.shrink(layer)
    assert part.saved.shape == (2, 3, 2)
    torch.testing.assert_close(part.sketch(g, layer), projected, rtol=1e-7, atol=1e-8)


def test_golden_convolution():
    case = GOLDEN["H_projection"]["conv"]
    x, g, right, left = (numbers(case[key]) for key in ("x", "g_out", "Pc", "Po"))
    geometry = ConvGeometry((2, 2), (1, 1), (1, 1), (1, 1))
    part = ConvPart("w", (2, 2, 2, 2), x, 1, geometry, (2, 2, 2, 2))
    wanted = numbers(case["weight_grad"])
    torch.testing.assert_close(part.exact(g), wanted, rtol=1e-7, atol=1e-9)
    unfolded = (g.flatten(2) @ unfold(x, geometry).mT).reshape(wanted.shape)
    torch.testing.assert_close(unfolded, wanted, rtol=1e-7, atol=1e-9)
    bias = BroadcastPart("b", (2,), (2, 1, 1), None, rows=1)
    torch.testing.assert_close(bias.exact(g), numbers(case["bias_grad"]))
    projected = numbers(case["projected[1][2][3]"])
    torch.testing.assert_close(
        sketch_convolution(x, g, left, right, geometry), projected, rtol=1e-7, atol=1e-7
    )
    layer = LayerSketch(0, 2, 8, left, right, 0)
    torch.testing.assert_close(part.sketch(g, layer), projected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("limit", [0, LARGE_ARRAY])
def test_sketch_that_keeps_kernel_positions_apart(limit, monkeypatch):
    # Large inputs go through the library's weight gradient, small ones through a batched product.
    monkeypatch.setattr(gradient_conv, "LARGE_ARRAY", limit)
    generator = torch.Generator().manual_seed(0)
    x, g, left, right = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 5, 6, 7), (2, 4, 3, 7), (3, 4), (2, 5))
    )
    geometry = ConvGeometry((3, 3), (2, 1), (1, 1), (1, 1))
    part = ConvPart("w", (4, 5, 3, 3), x, 2, geometry, (4, 5, 3, 3))
    gradient = part.exact(g)
    wanted = torch.einsum("ko,boctu,lc->bkltu", left, gradient, right).reshape(2, 3, 18)
    torch.testing.assert_close(sketch_convolution(x, g, left, right, geometry, 9), wanted)
    whole = torch.kron(right, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(sketch_convolution(x, g, left, whole, geometry), wanted)
    layer = LayerSketch(0, 4, 45, left, right, 0, 9)
    assert layer.shape == (3, 18)
    torch.testing.assert_close(layer.apply(gradient.reshape(2, 4, 45)), wanted)
    part.shrink(layer)
    torch.testing.assert_close(part.sketch(g, layer), wanted)


@pytest.mark.parametrize("positions", [2, 40])
def test_ghost_norms_both_ways(positions):
    # Few positions: from Gram matrices; many: from the gradient.
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, positions, 7, generator=generator, dtype=torch.float64)
    g = torch.randn(3, positions, 5, generator=generator, dtype=torch.float64)
    part = OuterPart("w", (5, 7), a, rows=3)
    wanted = torch.einsum("bso,bsi->boi", g, a).flatten(1).square().sum(1)
    torch.testing.assert_close(part.squared_norm(g), wanted)
    index = torch.tensor([[1, 1, 2], [0, 2, 2]])
    table = TablePart("t", (3, 5), index, 2, padding_index=0)
    g = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(table.squared_norm(g), table.exact(g).flatten(1).square().sum(1))
    assert not table.exact(g)[:, 0].any()


def test_golden_timesteps():
    case = GOLDEN["I_timesteps"]
    assert list(timestep_grid(10)) == case["uniform_10"]
    assert len(timestep_grid(100)) == case["len_uniform_100"]
    assert len(timestep_grid(30, "released")) == case["len_uniform_30_released"]
    assert list(timestep_grid(10, "cumulative")) == case["cumulative_10"]
    assert [timestep_grid(n, "centred") for n in (1, 2, 4)] == [
        (500,),
        (250, 750),
        (125, 375, 625, 875),
    ]
    assert len(timestep_grid(30)) == 30  # ours has as many as were asked for
    for count in (1, 2, 8, 1000):
        assert timestep_grid(count, "released") == timestep_grid(count)
    for count in (0, 1001):
        with pytest.raises(ConfigError, match="between 1 and 1000"):
            timestep_grid(count)


def test_evidence_weights():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = (1 - betas).cumprod(0)
    wanted = betas / (2 * (1 - betas) * (1 - abar))
    torch.testing.assert_close(elbo_weights(abar), wanted, rtol=1e-9, atol=0)


def test_levels_of_continuous_models_are_clipped():
    levels = noise_levels(edm("VEPrecond", sigma_max=50.0), (0, 500, 999))
    assert levels.sigmas[0] == 0.02  # the network's own smallest level, above the table's
    assert float(levels.sigmas[2]) == 50.0
    abar = GOLDEN["C_featuriser"]["alpha_bar"]
    sigma = noise_levels(unet(), (100, 500)).sigmas
    torch.testing.assert_close(1 / (1 + sigma**2), numbers(abar), rtol=2e-6, atol=0)
    assert noise_levels(edm(), sigmas=[0.5, 2.0]).timesteps == (0, 1)
    with pytest.raises(ConfigError, match="timestep 1000 is outside"):
        noise_levels(unet(), (1000,))
    with pytest.raises(ConfigError, match="positive"):
        noise_levels(unet(), sigmas=[0.0])


def test_noise_policies():
    shape = (3, 8, 8)
    shared = attribution_noise("shared", 0, 100, [5, 9], shape)
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[:1], attribution_noise("shared", 0, 100, [0], shape, role="query"))
    assert not torch.equal(shared[0], attribution_noise("shared", 0, 101, [5], shape)[0])
    assert not torch.equal(shared[0], attribution_noise("shared", 1, 100, [5], shape)[0])

    # As the release draws it: one generator state for every batch of 16, the last one shorter.
    slots = attribution_noise("slot", 2, 300, [0, 17, 35], shape)
    torch.manual_seed(2 * 1000 + 300)
    batch = torch.randn(16, *shape)
    assert torch.equal(slots, batch[[0, 1, 3]])
    torch.manual_seed(2 * 1000 + 300)
    assert torch.equal(torch.randn(4, *shape), batch[:4])
    other = attribution_noise("slot", 2, 300, [17], shape, slot_batch=52)
    assert not torch.equal(other[0], slots[1])

    own = attribution_noise("independent", 0, 100, [5, 9], shape)
    assert torch.equal(own[1], item_normal(0, "attribution-noise|train|100", 9, shape))
    assert len({tuple(row.flatten()[:3].tolist()) for row in own}) == 2
    assert not torch.equal(own, attribution_noise("independent", 0, 100, [5, 9], shape, role="q"))


def test_choice_of_parameters():
    module = tiny_unet()
    everything = select_parameters(module, "all")
    assert list(everything) == [name for name, _ in module.named_parameters()]
    blocks = select_parameters(module, "mid_block, up_blocks.1")
    assert {name.split(".")[0] for name in blocks} == {"mid_block", "up_blocks"}
    assert list(blocks) == [name for name in everything if name in blocks]  # registration order
    assert not any(name.startswith("up_blocks.0") for name in blocks)
    outputs = select_parameters(module, "to_out.0")
    assert outputs
    assert all(".to_out.0." in name for name in outputs)
    chosen = select_parameters(module, r"re:conv\d\.weight$")
    assert chosen
    assert all(name.endswith(("conv1.weight", "conv2.weight")) for name in chosen)
    module.conv_in.weight.requires_grad_(False)
    assert "conv_in.weight" not in select_parameters(module, "all")
    for which, message in (
        ("lora", "matches 'lora'; submodules: conv_in"),
        ("mid", "matches 'mid'"),
        ("re:(", "not a regular expression"),
        (" , ", "is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            select_parameters(module, which)


def test_layout_splits_what_it_joined():
    layout = Layout.of({"a": (2, 3), "b": (), "c": (4,)})
    assert (layout.size, layout.offsets) == (11, (0, 6, 7))
    parts = layout.split(torch.arange(22.0).reshape(2, 11))
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "a": (2, 2, 3),
        "b": (2, 1),
        "c": (2, 4),
    }
    assert parts["c"][1].tolist() == [18.0, 19.0, 20.0, 21.0]
