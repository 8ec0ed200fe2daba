"""Tiny networks of every supported family, as objectives of per-sample gradients."""

import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler

sys.path.insert(0, str(Path(__file__).parents[1] / "diffusion"))

from tiny_diffusers import tiny_text_unet, tiny_transformer, tiny_unet, tiny_vae

from diffcal.attribution.featurise import FeatureConfig
from diffcal.attribution.outputs import DenoiserObjective
from diffcal.diffusion.diffusers_denoisers import DiTDenoiser, UNet2DDenoiser
from diffcal.diffusion.edm_denoiser import EDMDenoiser
from diffcal.diffusion.edm_networks import build_network


def liven(module, seed=0, size=0.05):
    """Make every parameter count: fresh networks hold zeros that hide whole branches."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return module


def edm(preconditioner="EDMPrecond", dtype="float32", **changes):
    torch.manual_seed(5)
    config = {
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 4,
        "model_type": "SongUNet",
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
    }
    network = build_network({"preconditioner": preconditioner, "kwargs": config | changes})
    return EDMDenoiser(liven(network), dtype=dtype)


def ncsn(**changes):
    return edm(
        "VEPrecond",
        embedding_type="fourier",
        encoder_type="residual",
        resample_filter=[1, 3, 3, 1],
        channel_mult_noise=2,
        **changes,
    )


def dhariwal(**changes):
    return edm(model_type="DhariwalUNet", model_channels=32, **changes)


def unet(dtype="float32", num_class_embeds=5, **changes):
    module = liven(tiny_unet(num_class_embeds, **changes))
    return UNet2DDenoiser(module, DDPMScheduler(), dtype=dtype)


def dit(**changes):
    return DiTDenoiser(liven(tiny_transformer(**changes)), tiny_vae(), DDPMScheduler())


def mean_features(**options):
    """Features of the mean of the output averaged over timesteps, where a test needs gradients."""
    return FeatureConfig(**{"functional": "mean", "combine": "mean"} | options)


def rows_of(denoiser, rows=4, seed=0, functional="loss", prediction="network"):
    """(objective, its inputs) for random samples at spread noise levels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, *denoiser.sample_shape)
    clean = torch.rand(shape, generator=generator) * 2 - 1
    noise = torch.randn(shape, generator=generator)
    sigma = torch.logspace(-1, 1, rows, dtype=torch.float64)
    condition = None
    if denoiser.condition_kind != "none":
        weights = torch.rand(rows, denoiser.num_classes, generator=generator) + 0.1
        condition = denoiser.condition(weights / weights.sum(1, keepdim=True))
    objective = DenoiserObjective(denoiser, functional, prediction)
    return objective, objective.inputs(clean, noise, sigma, torch.ones(rows), condition)


__all__ = [
    "dhariwal",
    "dit",
    "edm",
    "liven",
    "mean_features",
    "ncsn",
    "rows_of",
    "tiny_text_unet",
    "tiny_unet",
    "tiny_vae",
    "unet",
]
