"""The one interface between diffusion models and everything else: ``D(x; sigma, condition)``."""

from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

__all__ = ["ConditionKind", "Denoiser", "images_to_model", "model_to_images"]

ConditionKind = Literal["none", "class", "prompt"]


@runtime_checkable
class Denoiser(Protocol):
    """Posterior mean of the clean sample, ``D(x; sigma, condition)``, for ``x = x_0 + sigma * noise``.

    Every model family is one adapter to this. The state ``x`` is in the units in which
    ``x_0`` has standard deviation ``sigma_data`` (pixels: [-1, 1]; latent models: scaled latents), with
    noise *added* at scale ``sigma`` (variance exploding form), whatever the network was trained with.

    A condition is a tensor whose first axis is the batch. It comes from weights over classes or
    prompts through :meth:`condition`, so that mixes of any number of classes are the general case
    and a pure class is a one-hot row.
    """

    module: nn.Module
    """The network that holds the parameters (attribution differentiates through it)."""
    sample_shape: tuple[int, int, int]
    """(c, h, w) of one ``x``."""
    sigma_data: float
    sigma_min: float
    sigma_max: float
    condition_kind: ConditionKind
    num_classes: int
    """Number of classes or prompts that weights range over; 0 when unconditional."""
    class_names: tuple[str, ...]
    """Names of the classes (or the prompts); ``("0", "1", ...)`` if the checkpoint does not tell."""
    feature_modules: tuple[str, ...]
    """Names (for ``module.get_submodule``) whose outputs serve as image features, best first."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 that identifies architecture and weights."""
        ...

    def __call__(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Denoised ``x`` in float32, differentiable with respect to ``x`` and the parameters."""
        ...

    def condition(self, weights: Float[Tensor, "b k"] | None) -> Tensor | None:
        """Condition of rows of non-negative weights that sum to 1; None for an unconditional model."""
        ...

    def unconditional(self, batch_size: int) -> Tensor:
        """Condition of the unconditional branch, for guidance.

        Raises:
            ConfigError: the model was not trained with dropped conditions.
        """
        ...

    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
        """Clean samples ``x_0`` of images (latent models: the mode of the encoder, scaled)."""
        ...

    def decode(self, x: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
        """Images of clean samples."""
        ...

    def to(self, device: torch.device | str) -> "Denoiser":
        """The same denoiser with its parameters on ``device``."""
        ...


def images_to_model(images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
    """Pixels 0..255 as float32 in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def model_to_images(x: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
    """Pixels ``trunc(clip(127.5 x + 128, 0, 255))`` of ``x`` in [-1, 1] (the EDM rule)."""
    pixels = (x * 127.5 + 128).clip(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()
