"""EDM networks and preconditioners against the published code's outputs, key lists and tables."""

import json
import math

import pytest
import torch
from edm_golden import GOLDEN, KEYS, NETS, named, network, tensors, under

from diffcal.diffusion.attention import set_attention_backend
from diffcal.diffusion.checkpoints import empty_network
from diffcal.diffusion.denoisers import model_to_images
from diffcal.diffusion.edm_denoiser import EDMDenoiser
from diffcal.diffusion.edm_networks import build_network, checked_kwargs
from diffcal.diffusion.losses import edm_loss_weight
from diffcal.diffusion.samplers import SamplerConfig, sample, sampling_sigmas
from diffcal.errors import ConfigError, DataError

CASES = NETS["cases"]
TINY = {"img_resolution": 8, "img_channels": 3, "model_channels": 8, "num_blocks": 1}


def built(preconditioner="EDMPrecond", **kwargs):
    return build_network({"preconditioner": preconditioner, "kwargs": TINY | kwargs})


def test_coefficients_and_loss_weight_of_the_golden_file():
    case = json.loads((GOLDEN / "csm.json").read_text("utf-8"))["cases"]["edm_preconditioning"]
    sigma = torch.tensor(case["inputs"]["sigma"], dtype=torch.float64)
    net = built(sigma_data=case["inputs"]["sigma_data"], model_type="SongUNet")
    found = dict(
        zip(("c_skip", "c_out", "c_in", "c_noise"), net.coefficients(sigma), strict=True),
        loss_weight=edm_loss_weight(sigma, case["inputs"]["sigma_data"]),
    )
    assert found.keys() == case["expected"].keys()
    for name, values in case["expected"].items():
        expected = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(found[name], expected, rtol=case["rtol"], atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_network_output_of_the_golden_file(name):
    case = CASES[name]
    net, out = network(case["net"]), under(case["out"])
    x, sigma = named(case["x"]), named(case["sigma"])
    result = net(
        x,
        sigma,
        named(case["class_labels"]),
        augment_labels=named(case["augment_labels"]),
    )
    assert result.dtype == torch.float32
    # D of EDM: 1e-5. The others multiply an error of their network by sigma.
    scale = 1 if NETS["nets"][case["net"]]["precond"] == "EDMPrecond" else sigma.clip(min=1)
    errors = (result - out["out32"]).abs().amax(dim=(1, 2, 3))
    assert bool((errors <= 1e-5 * scale).all()), errors / scale


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [n for n, case in CASES.items() if case["out"] + "F32" in tensors()]
)
def test_inner_stages_of_the_golden_file(name):
    case = CASES[name]
    net, out = network(case["net"]), under(case["out"])
    x, sigma = named(case["x"]), named(case["sigma"])
    seen = {}
    for part in ("map_noise", "map_layer1"):
        net.model.get_submodule(part).register_forward_hook(
            lambda module, given, result, part=part: seen.update({part: result})
        )
    net.model.register_forward_hook(
        lambda module, given, result: seen.update(F=result, c_noise=given[1])
    )
    net(x, sigma, named(case["class_labels"]), augment_labels=named(case["augment_labels"]))
    torch.testing.assert_close(seen["c_noise"], out["c_noise32"], rtol=1e-6, atol=1e-6)
    for part in ("map_noise", "map_layer1"):
        torch.testing.assert_close(seen[part], out[f"{part}32"], rtol=0, atol=5e-4)
    torch.testing.assert_close(seen["F"], out["F32"], rtol=0, atol=max(1e-5, 4 * case["F_err"]))


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in CASES if n.endswith("onehot/noaug")])
def test_float64_copy_agrees_with_the_published_code_in_float64(name):
    case = CASES[name]
    net = network(case["net"], torch.float64)
    expected = under(case["out"])["out64"]
    result = net(named(case["x"]), named(case["sigma"]), named(case["class_labels"]))
    assert result.dtype == torch.float64
    scale = float(expected.abs().max())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9 * max(1, scale))


@pytest.mark.parametrize("name", KEYS["configs"])
def test_keys_shapes_and_counts_of_published_configurations(name):
    entry = KEYS["configs"][name]
    net = empty_network({"preconditioner": entry["precond"], "kwargs": entry["kwargs"]})
    parameters = {key for key, _ in net.named_parameters()}
    layout = [
        [key, list(value.shape), "p" if key in parameters else "b"]
        for key, value in net.state_dict().items()
    ]
    assert sorted(layout) == sorted(KEYS["layouts"][entry["layout"]])
    assert len(layout) == entry["state_dict_keys"]
    assert sum(p.numel() for p in net.parameters()) == entry["parameters"]


@pytest.mark.parametrize("name", NETS["nets"])
def test_ranges_modules_and_heads_of_golden_networks(name):
    entry = NETS["nets"][name]
    net = network(name)
    assert float(net.sigma_min) == pytest.approx(float(entry["sigma_min"]), rel=1e-7)
    assert float(net.sigma_max) == pytest.approx(float(entry["sigma_max"]), rel=1e-7)
    ours = {key for key, _ in net.named_modules() if key}
    assert ours == set(entry["modules"])
    heads = {
        key: module.num_heads
        for key, module in net.named_modules()
        if getattr(module, "num_heads", 0)
    }
    assert heads == entry["attention_heads"]


@pytest.mark.parametrize("name", NETS["samplers"])
def test_sampler_of_the_golden_file(name):
    entry = NETS["samplers"][name]
    denoiser = EDMDenoiser(network(entry["net"]))
    calls = []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    config = SamplerConfig(
        solver="heun",
        steps=entry["num_steps"],
        schedule="karras",
        sigma_min=entry["sigma_min"],
        sigma_max=entry["sigma_max"],
        rho=float(entry["rho"]),
    )
    expected = under(entry["prefix"])
    torch.testing.assert_close(
        sampling_sigmas(denoiser, config), expected["t_steps"], rtol=1e-14, atol=0
    )
    condition = denoiser.condition(named(entry["class_labels"]))
    result = sample(denoiser, named(entry["latents"]), condition, config)
    assert len(calls) == entry["network_calls"]
    torch.testing.assert_close(result, expected["out32"], rtol=0, atol=1e-5)
    torch.testing.assert_close(result, expected["out64"], rtol=0, atol=1e-5)
    pixels = model_to_images(result).int() - expected["uint8_nhwc"].int()
    assert int(pixels.abs().max()) <= 1


def test_table_of_improved_ddpm():
    net, golden = network("adm_iddpm"), under("iddpm/")
    fresh = built("iDDPMPrecond", model_type="DhariwalUNet")
    torch.testing.assert_close(fresh.u, net.u, rtol=2e-5, atol=1e-7)
    index = net.sigma_index(golden["sigma_in"])
    torch.testing.assert_close(index, golden["index_exact"], rtol=0, atol=0)
    rounded = net.round_sigma(golden["sigma_in"])
    torch.testing.assert_close(rounded, net.u[golden["index_exact"]], rtol=0, atol=0)
    same = golden["index"] == golden["index_exact"]
    torch.testing.assert_close(rounded[same], golden["round32"][same], rtol=0, atol=0)


def test_times_of_the_variance_preserving_form():
    net, golden = network("ddpmpp_vp"), under("vp/")
    sigma = net.sigma(golden["t"])
    torch.testing.assert_close(sigma, golden["sigma"], rtol=2e-6, atol=0)
    # The published rounding at t = 1e-5, 2.4 % below the exact value, is part of the models.
    torch.testing.assert_close(net.sigma_inv(sigma), golden["sigma_inv"], rtol=2e-5, atol=1e-7)
    assert net.sigma_min == 0.0009765625


@torch.no_grad()
def test_soft_labels_act_affinely_on_the_embedding():
    net = network("ddpmpp_edm").model
    noise, eye = torch.zeros(1), torch.eye(3)
    seen = []
    net.map_layer0.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    weights = torch.tensor([[0.2, 0.5, 0.3]])
    for labels in (weights, eye[0:1], eye[1:2], eye[2:3]):
        net.embed(noise, labels, None)
    mixed = 0.2 * seen[1] + 0.5 * seen[2] + 0.3 * seen[3]
    torch.testing.assert_close(seen[0], mixed, rtol=0, atol=1e-5)


@torch.no_grad()
def test_missing_augment_labels_are_zero_augment_labels():
    case = CASES["ddpmpp_edm/onehot/noaug"]
    net = network("ddpmpp_edm")
    given = (named(case["x"]), named(case["sigma"]), named(case["class_labels"]))
    zeros = torch.zeros(len(given[0]), 9)
    torch.testing.assert_close(net(*given), net(*given, augment_labels=zeros), rtol=0, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddpmpp_edm", "adm_edm"])
def test_exact_attention_gives_the_same_images(name):
    case = CASES[f"{name}/onehot/noaug"]
    net = network(name)
    given = (named(case["x"]), named(case["sigma"]), named(case["class_labels"]))
    fused = net(*given)
    set_attention_backend("exact")
    try:
        exact = net(*given)
    finally:
        set_attention_backend("sdpa")
    torch.testing.assert_close(exact, fused, rtol=0, atol=5e-6)


def test_scalar_noise_level_is_one_for_all():
    # In double precision: single precision's last place depends on the processor's matrix products.
    net = network("ddpmpp_edm_uncond").double()
    x = tensors()["in/ddpmpp_edm_uncond/x"].double()
    with torch.no_grad():
        one, many = net(x, 0.7), net(x, torch.full((len(x),), 0.7, dtype=torch.float64))
    assert one.dtype == torch.float64
    torch.testing.assert_close(one, many, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden": 3}, "no argument 'hidden'"),
        ({"in_channels": 3}, "no argument 'in_channels'"),
        ({"model_type": "Transformer"}, "model_type must be one of"),
        (
            {"model_type": "DhariwalUNet", "embedding_type": "fourier"},
            "no argument 'embedding_type'",
        ),
        ({"img_resolution": 12, "channel_mult": [1, 1, 1, 1]}, "cannot be halved"),
        ({"dropout": math.nan}, "finite"),
        ({"dropout": 1.0}, "out of range"),
        ({"label_dropout": -0.1}, "out of range"),
        ({"model_channels": 0}, r"must lie in \[1"),
        ({"model_channels": True}, "whole number"),
        ({"model_channels": 8.0}, "whole number"),
        ({"num_blocks": 10**9}, r"must lie in \[1"),
        ({"channel_mult": []}, "at least one"),
        ({"channel_mult": "12"}, "list"),
        ({"channel_mult": [1] * 17}, "at most 16"),
        ({"resample_filter": [1, 2, 1]}, "even number"),
        ({"resample_filter": [1, -1]}, "even number"),
        ({"use_fp16": 1}, "true or false"),
        ({"sigma_data": "0.5"}, "finite number"),
    ],
)
def test_impossible_configurations_name_the_argument(kwargs, message):
    values = {"model_type": "SongUNet"} | TINY | kwargs
    with pytest.raises(ConfigError, match=message):
        checked_kwargs("EDMPrecond", values)


def test_configuration_keys_are_checked():
    with pytest.raises(ConfigError, match="not 'weights'"):
        build_network({"preconditioner": "EDMPrecond", "kwargs": TINY, "weights": 1})
    with pytest.raises(ConfigError, match="unknown preconditioner 'EDM'"):
        build_network({"preconditioner": "EDM", "kwargs": TINY})
    with pytest.raises(ConfigError, match="needs the argument 'img_channels'"):
        build_network({"preconditioner": "EDMPrecond", "kwargs": {"img_resolution": 8}})


@torch.no_grad()
def test_denoiser_checks_conditions():
    conditional = EDMDenoiser(built(model_type="SongUNet", channel_mult=[1], label_dim=3))
    plain = EDMDenoiser(built(model_type="SongUNet", channel_mult=[1]))
    x, sigma = torch.randn(2, 3, 8, 8), torch.ones(2)
    assert plain.condition(None) is None
    with pytest.raises(ConfigError, match="needs a class condition"):
        conditional(x, sigma)
    with pytest.raises(ConfigError, match="unconditional"):
        plain(x, sigma, torch.ones(2, 3))
    with pytest.raises(ConfigError, match="4 columns"):
        conditional.condition(torch.full((2, 4), 0.25))
    with pytest.raises(DataError, match="row 1"):
        conditional.condition(torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.5]]))
    with pytest.raises(DataError, match="row 0"):
        conditional.condition(torch.tensor([[1.5, -0.5, 0.0]]))
    with pytest.raises(ConfigError, match="label_dropout 0"):
        conditional.unconditional(2)
    with pytest.raises(ConfigError, match="no classes"):
        plain.unconditional(2)
    dropped = EDMDenoiser(
        built(model_type="SongUNet", channel_mult=[1], label_dim=3, label_dropout=0.1)
    )
    assert dropped.unconditional(2).tolist() == [[0.0] * 3] * 2


def test_denoiser_names_features_that_exist():
    for name in NETS["nets"]:
        denoiser = EDMDenoiser(network(name))
        assert len(set(denoiser.feature_modules)) == len(denoiser.feature_modules) >= 3
        for part in denoiser.feature_modules:
            denoiser.module.get_submodule(part)


def test_fingerprint_follows_weights_and_configuration():
    first, again = EDMDenoiser(network("adm_ve")), EDMDenoiser(network("adm_ve"))
    assert first.fingerprint == again.fingerprint
    other = network("adm_ve")
    with torch.no_grad():
        other.model.out_conv.bias[0] += 1e-7
    assert EDMDenoiser(other).fingerprint != first.fingerprint
