"""The smallest network of a real kind, for scripts that measure everything around the network."""

import torch

from diffcal.diffusion.edm_denoiser import EDMDenoiser
from diffcal.diffusion.edm_networks import build_network


def tiny_denoiser() -> EDMDenoiser:
    """A class-conditional denoiser of grey 8x8 images with random weights, the same at each call."""
    torch.manual_seed(0)
    kwargs = {
        "img_resolution": 8,
        "img_channels": 1,
        "label_dim": 10,
        "model_type": "SongUNet",
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
    }
    network = build_network({"preconditioner": "EDMPrecond", "kwargs": kwargs})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return EDMDenoiser(network)
