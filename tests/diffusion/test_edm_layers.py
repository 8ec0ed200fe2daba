"""Layers and blocks of EDM networks against whole golden tensors, and fresh weights against theory."""

import math

import pytest
import torch
from edm_golden import NETS, tensors, under

from diffcal.diffusion.attention import attention_weights
from diffcal.diffusion.edm_block import UNetBlock, drop_labels
from diffcal.diffusion.edm_layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Initialisation,
    Linear,
    PositionalEmbedding,
    resampling_filter,
)
from diffcal.errors import ConfigError

CLASSES = {
    cls.__name__: cls
    for cls in (Conv2d, Linear, GroupNorm, PositionalEmbedding, FourierEmbedding, UNetBlock)
}
MODULES = {name: entry for name, entry in NETS["modules"].items() if entry["cls"] in CLASSES}


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
def test_module_of_the_golden_file(name):
    entry = MODULES[name]
    module = CLASSES[entry["cls"]](**entry["kwargs"]).eval()
    module.load_state_dict(under(entry["prefix"] + "w/"))  # strict: names are part of the promise
    given = [tensors()[f"{entry['prefix']}in/{key}"] for key in entry["inputs"]]
    result = module(*given)
    assert list(result.shape) == entry["out_shape"]
    expected = tensors()[f"{entry['prefix']}out32"]
    # Embeddings: phases of several hundred, so float32 itself is off by "err".
    tolerance = max(2e-6, 4 * entry["err"])
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)
    exact = module.double()(*(value.double() for value in given))
    if entry["cls"] in ("Conv2d", "Linear", "GroupNorm", "UNetBlock"):
        torch.testing.assert_close(exact, tensors()[f"{entry['prefix']}out64"], rtol=0, atol=1e-10)


def test_all_golden_modules_are_covered():
    assert set(NETS["modules"]) - set(MODULES) == {"attention"}


def test_attention_and_its_gradients_of_the_golden_file():
    entry = under("mod/attention/")
    # The file has channels before tokens.
    q, k = (entry[f"in/{key}"].clone().requires_grad_() for key in "qk")
    weights = attention_weights(q.mT, k.mT)
    torch.testing.assert_close(weights, entry["out32"], rtol=0, atol=1e-6)
    (weights * entry["grad/dw"]).sum().backward()
    torch.testing.assert_close(q.grad, entry["grad/q"], rtol=0, atol=2e-6)
    torch.testing.assert_close(k.grad, entry["grad/k"], rtol=0, atol=2e-6)


def test_filters_sum_to_one_and_spread_separably():
    box, tent = resampling_filter([1, 1]), resampling_filter([1, 3, 3, 1])
    torch.testing.assert_close(box, torch.full((1, 1, 2, 2), 0.25), rtol=0, atol=0)
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    torch.testing.assert_close(tent[0, 0], row.outer(row) / 64, rtol=0, atol=0)


def test_fused_halving_differs_from_halving_first():
    torch.manual_seed(0)
    options = {"down": True, "resample_filter": [1, 3, 3, 1]}
    plain, fused = Conv2d(3, 4, 3, **options), Conv2d(3, 4, 3, fused_resample=True, **options)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert float((plain(x) - fused(x)).detach().abs().max()) > 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 2},
        {"kernel": -1},
        {"kernel": 3, "up": True, "down": True},
        {"kernel": 0, "up": True},
    ],
)
def test_impossible_convolutions_are_refused(options):
    with pytest.raises(ConfigError):
        Conv2d(3, 4, **options)


@pytest.mark.parametrize("channels", [3, 130])
def test_channels_that_do_not_divide_into_groups_are_refused(channels):
    with pytest.raises(ConfigError, match=f"{channels} channels"):
        GroupNorm(channels)


@pytest.mark.parametrize(
    "mode", ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"]
)
def test_fresh_weights_have_the_variance_of_their_law(mode):
    torch.manual_seed(0)
    fan_in, fan_out, gain = 300, 200, 0.7
    drawn = Initialisation(mode=mode, weight_gain=gain).draw([200, 300], fan_in, fan_out, gain)
    fans = fan_in if mode.startswith("kaiming") else (fan_in + fan_out) / 2
    expected = gain * math.sqrt(1 / fans)
    # 60 000 draws: standard error below 0.3 %, so 2 % is over six sigma.
    assert float(drawn.std()) == pytest.approx(expected, rel=0.02)
    if mode.endswith("uniform"):
        assert float(drawn.abs().max()) <= expected * math.sqrt(3) * (1 + 1e-6)


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ConfigError, match="attention heads"):
        UNetBlock(8, 12, 4, attention=True, num_heads=5)


def test_labels_are_dropped_by_whole_rows_in_training_only():
    labels = torch.rand(2000, 3) + 0.1
    assert drop_labels(labels, 0.3, training=False) is labels
    torch.manual_seed(0)
    dropped = drop_labels(labels, 0.3, training=True)
    gone = (dropped == 0).all(dim=1)
    torch.testing.assert_close(dropped[~gone], labels[~gone], rtol=0, atol=0)
    assert 0.25 < float(gone.float().mean()) < 0.35  # standard error 0.01
