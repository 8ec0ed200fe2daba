import torch

from diffcal.core.tensors import append_dims
from diffcal.diffusion.losses import denoising_loss, edm_loss_weight, log_normal_sigma


def test_loss_of_the_exact_gaussian_denoiser():
    s, sigma, count = 0.8, 0.5, 4096
    generator = torch.Generator().manual_seed(0)
    x = s * torch.randn(count, 1, 4, 4, generator=generator)
    noise = torch.randn(x.shape, generator=generator)

    def exact(x_t, level):
        return s**2 / (s**2 + append_dims(level, x_t) ** 2) * x_t

    loss = denoising_loss(exact, x, torch.full((count,), sigma), noise).mean()
    expected = torch.tensor(s**2 * sigma**2 / (s**2 + sigma**2))
    # 65,536 draws: standard error 0.55 %, so 3 % is over five sigma.
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0)


def test_loss_weight_makes_the_initial_loss_one():
    # A zero network outputs c_skip * x: its weighted error on data of variance sigma_data^2 is 1.
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    sd = 0.5
    error = sigma**2 * sd**2 / (sigma**2 + sd**2)
    torch.testing.assert_close(
        edm_loss_weight(sigma, sd) * error, torch.ones(3).double(), rtol=1e-12, atol=0
    )


def test_log_normal_levels():
    levels = log_normal_sigma(torch.tensor([0.0, 1.0]), -1.2, 1.2)
    torch.testing.assert_close(levels.log(), torch.tensor([-1.2, 0.0]), rtol=0, atol=1e-6)
