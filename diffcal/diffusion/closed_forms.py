"""Denoisers of distributions that are known exactly, to judge samplers and mixes without a network."""

import hashlib

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from diffcal.core.tensors import append_dims
from diffcal.diffusion.denoisers import ConditionKind, images_to_model, model_to_images
from diffcal.errors import ConfigError

__all__ = ["GaussianDenoiser", "MixtureDenoiser"]


class _ClosedForm:
    """What both share of :class:`diffcal.diffusion.denoisers.Denoiser`: attributes and conditions.

    Computes in the type of ``x``, unlike networks, so that float64 samples are exact to float64.
    """

    condition_kind: ConditionKind = "class"
    feature_modules: tuple[str, ...] = ()
    sigma_min, sigma_max = 0.0, float("inf")

    def __init__(
        self, means: Float[Tensor, "j c h w"], scale: float, num_classes: int, sigma_data: float
    ) -> None:
        if not scale > 0:
            raise ConfigError(f"scale must be positive, got {scale}")
        self.module: nn.Module = nn.Module()
        self.module.register_buffer("means", means.double())
        self.scale, self.sigma_data = scale, sigma_data
        self.sample_shape = (means.shape[1], means.shape[2], means.shape[3])
        self.num_classes = num_classes
        self.class_names = tuple(str(index) for index in range(num_classes))
        digest = hashlib.sha256(f"{type(self).__name__}|{scale}|{tuple(means.shape)}|".encode())
        digest.update(means.double().cpu().contiguous().numpy().data)
        self.fingerprint = digest.hexdigest()

    @property
    def means(self) -> Float[Tensor, "j c h w"]:
        """Means of the components, float64."""
        return self.module.get_buffer("means")

    def condition(self, weights: Float[Tensor, "b k"] | None) -> Float[Tensor, "b k"]:
        """The weights themselves, in float64.

        Raises:
            ConfigError: no weights, or another number of classes.
        """
        if weights is None or weights.shape[1] != self.num_classes:
            raise ConfigError(f"give weights over {self.num_classes} classes")
        return weights.to(self.means.device, torch.float64)

    def unconditional(self, batch_size: int) -> Float[Tensor, "b k"]:
        """Equal weights of all classes."""
        shape = (batch_size, self.num_classes)
        return torch.full(
            shape, 1 / self.num_classes, dtype=torch.float64, device=self.means.device
        )

    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
        """Pixels in [-1, 1]."""
        return images_to_model(images)

    def decode(self, x: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
        """Pixels 0..255."""
        return model_to_images(x)

    def to(self, device: torch.device | str) -> "_ClosedForm":
        """The same denoiser with its means on ``device``."""
        self.module.to(device)
        return self


class GaussianDenoiser(_ClosedForm):
    """Posterior mean for data ``Normal(sum_k w_k mean_k, scale^2)``: mixing moves the mean.

    ``D = (scale^2 x + sigma^2 sum_k w_k mean_k) / (scale^2 + sigma^2)``, linear in the weights.

    Args:
        means: One for each class.
        scale: Standard deviation of every class.
    """

    def __init__(self, means: Float[Tensor, "k c h w"], scale: float = 0.5) -> None:
        super().__init__(means, scale, len(means), sigma_data=scale)

    def __call__(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Posterior mean, in the type of ``x``."""
        assert condition is not None
        variance = append_dims(sigma.to(x.dtype), x).square()
        mean = torch.einsum("bk,kchw->bchw", condition.to(x.dtype), self.means.to(x.dtype))
        return (self.scale**2 * x + variance * mean) / (self.scale**2 + variance)


class MixtureDenoiser(_ClosedForm):
    """Posterior mean for a mixture of equal Gaussians, several for each class.

    Weights are probabilities of the classes: the components of class k share weight ``w_k`` equally.

    Args:
        means: One for each component.
        labels: Class of each component; every class from 0 has at least one.
        scale: Standard deviation of every component.
    """

    def __init__(
        self, means: Float[Tensor, "j c h w"], labels: Int[Tensor, " j"], scale: float = 0.1
    ) -> None:
        counts = labels.bincount()
        if not bool((counts > 0).all()):
            raise ConfigError("every class needs at least one component")
        sigma_data = float((means.double().var() + scale**2).sqrt())
        super().__init__(means, scale, len(counts), sigma_data)
        share = nn.functional.one_hot(labels, len(counts)).double() / counts
        self.module.register_buffer("share", share.T.contiguous())

    def __call__(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Posterior mean, in the type of ``x``."""
        assert condition is not None
        means = self.means.flatten(1).to(x.dtype)
        prior = condition.to(x.dtype) @ self.module.get_buffer("share").to(x.dtype)
        variance = sigma.to(x.dtype).square()[:, None]
        total = self.scale**2 + variance
        flat = x.flatten(1)
        # |x - m|^2 up to the part that is the same for all components.
        distance = means.square().sum(dim=1) - 2 * flat @ means.T
        posterior = (prior.log() - distance / (2 * total)).softmax(dim=1)
        mean = (self.scale**2 * flat + variance * (posterior @ means)) / total
        return mean.reshape(x.shape)
