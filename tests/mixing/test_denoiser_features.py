"""Features of a tiny EDM network's layers, against hooks by hand."""

import pytest
import torch

from diffcal.core.rng import item_normal
from diffcal.diffusion.closed_forms import GaussianDenoiser
from diffcal.diffusion.edm_denoiser import EDMDenoiser
from diffcal.diffusion.edm_networks import build_network
from diffcal.errors import ConfigError, DataError, NumericalError
from diffcal.mixing.denoiser_features import DenoiserFeatures, _pool
from diffcal.models.encoders import FeatureEncoder


def tiny(classes=4):
    torch.manual_seed(0)
    network = build_network(
        {
            "preconditioner": "EDMPrecond",
            "kwargs": {
                "img_resolution": 8,
                "img_channels": 1,
                "label_dim": classes,
                "model_type": "SongUNet",
                "model_channels": 8,
                "channel_mult": [1, 2],
                "num_blocks": 1,
                "attn_resolutions": [],
            },
        }
    )
    for parameter in network.parameters():  # EDM starts some layers at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return EDMDenoiser(network)


def images(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 8, 8, 1), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("classes", [4, 0])
def test_features_are_pooled_outputs_of_the_layers(classes):
    denoiser = tiny(classes)
    encoder = DenoiserFeatures(denoiser, sigmas=(0.2, 0.7), draws=2, pool="mean_std", depth=2)
    assert isinstance(encoder, FeatureEncoder)
    found = encoder.encode(images())
    x = denoiser.encode(images())
    condition = torch.full((3, 4), 0.25) if classes else None
    parts = []
    for level, sigma in enumerate((0.2, 0.7)):
        drawn = []
        for draw in range(2):
            noise = item_normal(0, "feature-noise", 2 * level + draw, (1, 8, 8))
            row = []
            for name in denoiser.feature_modules[:2]:
                outputs = []
                layer = denoiser.module.get_submodule(name)
                handle = layer.register_forward_hook(
                    lambda m, i, o, outputs=outputs: outputs.append(o)
                )
                with torch.no_grad():
                    denoiser(x + sigma * noise, torch.full((3,), sigma), condition)
                handle.remove()
                flat = outputs[0].flatten(2)
                row += [flat.mean(dim=2), flat.var(dim=2, correction=0).sqrt()]
            drawn.append(torch.cat(row, dim=1))
        parts.append((drawn[0] + drawn[1]) / 2)
    torch.testing.assert_close(found, torch.cat(parts, dim=1), rtol=1e-4, atol=1e-5)
    assert encoder.dim == found.shape[1]
    # Each row is a function of its image alone.
    alone = torch.cat([encoder.encode(image[None]) for image in images()])
    torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-5)


def test_settings_and_weights_show_in_the_version():
    denoiser = tiny()
    versions = {
        DenoiserFeatures(denoiser, **settings).version
        for settings in (
            {},
            {"sigmas": (0.1,)},
            {"draws": 2},
            {"pool": "mean"},
            {"seed": 1},
            {"depth": 1},
        )
    }
    assert len(versions) == 6
    assert DenoiserFeatures(tiny()).version in versions


def test_pooling_of_maps_and_tokens():
    maps = torch.arange(32.0).reshape(1, 2, 4, 4)
    quarters = maps.reshape(1, 2, 2, 2, 2, 2).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(_pool(maps, 1, "grid2"), quarters)
    tokens = maps.flatten(2).transpose(1, 2)
    for pool in ("mean", "mean_std", "grid2"):
        torch.testing.assert_close(_pool(tokens, 1, pool), _pool(maps, 1, pool))
    both = torch.cat([torch.zeros_like(maps), maps])
    torch.testing.assert_close(_pool(both, 1, "mean"), _pool(maps, 1, "mean"))


def test_bad_input():
    denoiser = tiny()
    for wrong, message in (
        ({"sigmas": ()}, "sigmas"),
        ({"sigmas": (0.0,)}, "sigmas"),
        ({"draws": 0}, "draws"),
        ({"modules": ["model.nothing"]}, "no layer 'model.nothing'; try: model.dec"),
    ):
        with pytest.raises(ConfigError, match=message):
            DenoiserFeatures(denoiser, **wrong)
    with pytest.raises(ConfigError, match="names no layers"):
        DenoiserFeatures(GaussianDenoiser(torch.zeros(2, 1, 2, 2)))
    with pytest.raises(DataError, match="4x4x1"):
        DenoiserFeatures(denoiser).encode(images()[:, :4, :4])
    with torch.no_grad():
        next(denoiser.module.parameters()).fill_(float("nan"))
    with pytest.raises(NumericalError, match="denoiser features"):
        DenoiserFeatures(denoiser).encode(images())
