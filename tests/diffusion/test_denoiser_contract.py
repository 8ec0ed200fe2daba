"""Every adapter keeps the contract of denoisers."""

import torch
from denoiser_contract import check_denoiser
from diffusers import DDPMScheduler
from tiny_diffusers import tiny_transformer, tiny_unet, tiny_vae
from tiny_edm import tiny_edm
from torch import nn

from diffcal.diffusion.diffusers_dit import DiTDenoiser
from diffcal.diffusion.diffusers_unet import UNet2DDenoiser
from diffcal.diffusion.module_denoiser import ModuleDenoiser, schedule_noise


class Small(nn.Module):
    """``module(x_t, timestep, weights)`` of a few parameters."""

    def __init__(self):
        super().__init__()
        self.conv, self.shift = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(3, 64)

    def forward(self, x_t, timestep, weights=None):
        output = self.conv(x_t) * (1 + timestep[:, None, None, None] / 1000)
        return output if weights is None else output + self.shift(weights).view(-1, 1, 8, 8)


def test_edm_networks():
    check_denoiser(tiny_edm())
    check_denoiser(tiny_edm(classes=0, label_dropout=0.0))


def test_unets_of_diffusers():
    check_denoiser(UNet2DDenoiser(tiny_unet(), DDPMScheduler()))
    check_denoiser(UNet2DDenoiser(tiny_unet(), DDPMScheduler(), null_class=4))
    check_denoiser(UNet2DDenoiser(tiny_unet(None), DDPMScheduler()))


def test_transformers_on_latents():
    check_denoiser(DiTDenoiser(tiny_transformer(), tiny_vae(), DDPMScheduler()))


def test_plain_modules():
    torch.manual_seed(0)
    for prediction in ("epsilon", "sample", "v_prediction"):
        noise = schedule_noise(prediction=prediction)
        if prediction != "sample":  # which may well be wrong where there is no noise
            check_denoiser(ModuleDenoiser(Small(), noise, sample_shape=(1, 8, 8), num_classes=3))
            check_denoiser(ModuleDenoiser(Small(), noise, sample_shape=(1, 8, 8)))
