"""Images to scaled latents and back through a variational autoencoder, in float32."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffcal.diffusion.denoisers import images_to_model, model_to_images
from diffcal.errors import CheckpointError, DataError

__all__ = ["LatentCodec"]


class LatentCodec:
    """Encoder and decoder of a latent diffusion model, with the scale that its network was trained on.

    Latents are ``(z - mean) * scaling_factor / std``, where mean and std are 0 and 1 unless the
    autoencoder's config names them (``shift_factor``, ``latents_mean``, ``latents_std``). Weights
    are held in float32 and autocast is off: half precision overflows in published decoders.

    Args:
        vae: diffusers ``AutoencoderKL``.
        chunk: Images that pass through the autoencoder at once. With 1, the default, results do
            not depend on how many are given together, and memory stays small.

    Raises:
        CheckpointError: another kind of autoencoder, or images that are neither grey nor RGB.
    """

    def __init__(self, vae: nn.Module, *, chunk: int = 1) -> None:
        name = type(vae).__name__
        if name != "AutoencoderKL":
            raise CheckpointError(
                f"autoencoder '{name}' is not supported; supported: AutoencoderKL"
            )
        config: Any = vae.config
        if config.in_channels != config.out_channels or config.out_channels not in (1, 3):
            raise CheckpointError(
                f"the autoencoder maps {config.in_channels} to {config.out_channels} channels; "
                "1 (grey) or 3 (RGB) are supported"
            )
        self.vae: Any = vae.float().eval().requires_grad_(False)
        self.chunk = chunk
        self.image_channels: int = config.out_channels
        self.latent_channels: int = config.latent_channels
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        """Pixels of one latent position along each axis."""
        shift = config.get("shift_factor") or 0.0
        mean = config.get("latents_mean")
        std = config.get("latents_std")
        channels = self.latent_channels
        self._mean = _per_channel(shift if mean is None else mean, channels)
        self._scale = config.scaling_factor / _per_channel(1.0 if std is None else std, channels)

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b z y x"]:
        """Scaled latents of images: the mode of the encoder's distribution.

        Raises:
            DataError: other channels than the autoencoder's, or a size it cannot halve often enough.
        """
        _, height, width, channels = images.shape
        if channels != self.image_channels:
            raise DataError(
                f"images have {channels} channels, but the autoencoder takes {self.image_channels}"
            )
        if height % self.downsampling or width % self.downsampling:
            raise DataError(
                f"images of {height} x {width} pixels do not divide by the autoencoder's "
                f"downsampling of {self.downsampling}; resize them"
            )
        pixels = images_to_model(images)
        with torch.autocast(pixels.device.type, enabled=False):
            parts = [self.vae.encode(part).latent_dist.mode() for part in pixels.split(self.chunk)]
        return (torch.cat(parts) - self._mean) * self._scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b z y x"]) -> UInt8[Tensor, "b h w c"]:
        """Images of scaled latents."""
        z = latents.float() / self._scale + self._mean
        with torch.autocast(z.device.type, enabled=False):
            parts = [self.vae.decode(part).sample for part in z.split(self.chunk)]
        return model_to_images(torch.cat(parts))

    def to(self, device: torch.device | str) -> "LatentCodec":
        """The same codec with its parameters on ``device``."""
        self.vae.to(device)
        self._mean, self._scale = self._mean.to(device), self._scale.to(device)
        return self


def _per_channel(value: float | Sequence[float | int], channels: int) -> Tensor:
    vector = torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1)
    if vector.shape[0] not in (1, channels):
        raise CheckpointError(
            f"the autoencoder's latents_mean or latents_std has {vector.shape[0]} entries "
            f"for {channels} latent channels"
        )
    return vector.expand(channels, 1, 1).clone()
