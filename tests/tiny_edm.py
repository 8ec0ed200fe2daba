"""Tiny EDM networks with random weights everywhere, so that conditions and noise levels matter."""

import torch

from diffcal.diffusion.edm_denoiser import EDMDenoiser
from diffcal.diffusion.edm_networks import build_network


def tiny_edm(classes=3, side=8, channels=1, seed=0, label_dropout=0.1):
    """EDMDenoiser of about 20 000 parameters, none of them at its zero initialisation."""
    network = build_network(
        {
            "preconditioner": "EDMPrecond",
            "kwargs": {
                "img_resolution": side,
                "img_channels": channels,
                "label_dim": classes,
                "model_type": "SongUNet",
                "model_channels": 8,
                "channel_mult": [1, 2],
                "num_blocks": 1,
                "attn_resolutions": [4],
                "dropout": 0.0,
                "label_dropout": label_dropout,
            },
        }
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return EDMDenoiser(network, class_names=tuple("abcdefghij"[:classes]))
