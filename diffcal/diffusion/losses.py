"""Per-example denoising losses, with noise and noise level passed in."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.core.tensors import append_dims

__all__ = ["denoising_loss", "edm_loss_weight", "log_normal_sigma"]


def denoising_loss(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, " b"],
    noise: Float[Tensor, "b c h w"],
) -> Float[Tensor, " b"]:
    """Squared denoising error of each example, unreduced and not weighted.

    Args:
        denoise: Maps (noisy x, sigma) to the clean x; conditions are bound by the caller.
        x: Clean samples in model space.
        sigma: Noise standard deviation, in the units of ``x``.
        noise: Standard normal draw, passed in so that the caller owns randomness.

    Returns:
        Mean over c, h, w for each example; multiply by :func:`edm_loss_weight` to train.

    Source: Karras et al. 2022 (arXiv:2206.00364), equation 2.
    """
    noisy = x + append_dims(sigma, x) * noise
    return (denoise(noisy, sigma) - x).square().mean(dim=(1, 2, 3))


def edm_loss_weight(sigma: Float[Tensor, " b"], sigma_data: float = 0.5) -> Float[Tensor, " b"]:
    """Weight ``(sigma^2 + sigma_data^2) / (sigma * sigma_data)^2`` (Karras et al. 2022, table 1)."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def log_normal_sigma(
    standard_normal: Float[Tensor, " b"], mean: float = -1.2, std: float = 1.2
) -> Float[Tensor, " b"]:
    """Training noise levels ``exp(mean + std * n)`` (Karras et al. 2022, table 1)."""
    return torch.exp(mean + std * standard_normal)
