"""Our noise-level form against the loops of diffusers itself, from the same noise."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMPipeline, DDIMScheduler, EulerDiscreteScheduler
from tiny_diffusers import tiny_unet

from diffcal.diffusion.diffusers_unet import UNet2DDenoiser

STEPS = 10  # divides the 1000 timesteps: DDIMScheduler rounds its stride down otherwise


def euler(denoiser, x, sigmas, condition):
    """Euler steps of the probability-flow equation dx/dsigma = (x - D) / sigma."""
    for now, after in pairwise(sigmas):
        clean = denoiser(x, now.expand(len(x)).float(), condition)
        x = x + (after - now).float() * (x - clean) / now.float()
    return x


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_euler_steps_are_ddim(prediction):
    """Song et al. 2021 (arXiv:2010.02502), section 4.3: DDIM is Euler's method in sigma."""
    network, labels = tiny_unet(), torch.tensor([0, 3])
    scheduler = DDIMScheduler(
        prediction_type=prediction, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(STEPS)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = noise
    for t in scheduler.timesteps:
        output = network(expected, t, class_labels=labels).sample
        expected = scheduler.step(output, t, expected).prev_sample

    denoiser = UNet2DDenoiser(network, scheduler)
    sigmas = torch.cat([denoiser.noise.sigma(scheduler.timesteps), torch.zeros(1)])
    start = noise * (1 + sigmas[0] ** 2).sqrt().float()
    result = euler(denoiser, start, sigmas, denoiser.condition(torch.eye(5)[labels]))
    scale = float(expected.abs().max())
    torch.testing.assert_close(result, expected, atol=1e-3 * scale, rtol=0)


@torch.no_grad()
def test_fractional_timesteps_are_those_of_the_schedulers_karras_levels():
    """diffusers interpolates timesteps in ln sigma as well when it is given other noise levels."""
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(STEPS)
    denoiser = UNet2DDenoiser(tiny_unet(None), EulerDiscreteScheduler())
    timesteps = denoiser.noise.timestep(scheduler.sigmas[:-1])
    torch.testing.assert_close(timesteps, scheduler.timesteps, atol=1e-2, rtol=0)


@torch.no_grad()
def test_images_are_those_of_the_pipeline():
    network = tiny_unet(None)
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipeline = DDIMPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(1),
        num_inference_steps=STEPS,
        output_type="np",
        use_clipped_model_output=False,
    ).images
    denoiser = UNet2DDenoiser(network, scheduler)
    sigmas = torch.cat([denoiser.noise.sigma(pipeline.scheduler.timesteps), torch.zeros(1)])
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    start = noise * (1 + sigmas[0] ** 2).sqrt().float()
    result = denoiser.decode(euler(denoiser, start, sigmas, None))
    difference = result.int() - torch.from_numpy(images * 255).round().int()
    assert difference.abs().max() <= 1
