"""Any module that predicts from a noised image and its timestep, as a denoiser."""

import hashlib

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffcal.core.digests import hash_tensors
from diffcal.diffusion.denoisers import images_to_model, model_to_images
from diffcal.diffusion.discrete_denoiser import DiscreteDenoiser
from diffcal.diffusion.discrete_noise import DiscreteNoise, PredictionType, TimestepRule
from diffcal.diffusion.schedules import AlphasKind, alphas_cumprod, sigma_of_alphas_cumprod
from diffcal.errors import ConfigError

__all__ = ["ModuleDenoiser", "schedule_noise"]


def schedule_noise(
    kind: AlphasKind = "ddpm_linear",
    prediction: PredictionType = "epsilon",
    rule: TimestepRule = "continuous",
) -> DiscreteNoise:
    """Noise levels of a named schedule of 1000 timesteps, without a scheduler object."""
    levels = sigma_of_alphas_cumprod(alphas_cumprod(kind))
    return DiscreteNoise(log_sigmas=levels.log(), prediction=prediction, rule=rule)


class ModuleDenoiser(DiscreteDenoiser):
    """``D(x; sigma, condition)`` of ``module(x_t, timestep)`` or ``module(x_t, timestep, weights)``.

    For networks of one's own: nothing is asked of the module besides that call. ``x_t`` is the noised
    image in variance preserving form, float32 ``[b, c, h, w]``, ``timestep`` ``[b]`` float32, or int64
    for integer timesteps, and ``weights`` ``[b, k]`` weights over classes.

    Args:
        module: The network; it is put into evaluation mode.
        noise: Its noise levels and what it predicts; see :func:`schedule_noise`.
        sample_shape: (c, h, w) of one image, pixels in [-1, 1].
        sigma_data: Standard deviation of clean images.
        num_classes: Classes that ``weights`` ranges over; 0: the module is called without them.
        class_names: Their names; numbers if None.
        feature_modules: Submodules whose outputs serve as image features, best first.

    Raises:
        ConfigError: names for another number of classes, or a ``sigma_data`` that is not positive.
    """

    def __init__(
        self,
        module: nn.Module,
        noise: DiscreteNoise,
        *,
        sample_shape: tuple[int, int, int],
        sigma_data: float = 0.5,
        num_classes: int = 0,
        class_names: tuple[str, ...] | None = None,
        feature_modules: tuple[str, ...] = (),
    ) -> None:
        super().__init__(
            module,
            noise,
            sample_shape=sample_shape,
            sigma_data=sigma_data,
            condition_kind="class" if num_classes else "none",
            num_classes=num_classes,
            class_names=class_names,
            feature_modules=feature_modules,
        )

    def _prediction(
        self, x_t: Float[Tensor, "b c h w"], timestep: Tensor, condition: Tensor | None
    ) -> Float[Tensor, "b c h w"]:
        inputs = (x_t, timestep)
        return self.module(*inputs) if condition is None else self.module(*inputs, condition)

    def condition(self, weights: Float[Tensor, "b k"] | None) -> Tensor | None:
        """Weights over the classes as the module takes them; None for an unconditional module.

        Raises:
            ConfigError: no weights, or for another number of classes.
        """
        if not self.num_classes:
            return None
        if weights is None or weights.shape[1] != self.num_classes:
            raise ConfigError(f"give weights over the {self.num_classes} classes, one row each")
        return weights.to(next(self.module.parameters()).device, torch.float32)

    def unconditional(self, batch_size: int) -> Tensor:
        """There is no branch without a condition that could be told apart.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a plain module has no unconditional branch, so that it cannot be guided")

    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
        """Pixels in [-1, 1]."""
        return images_to_model(images)

    def decode(self, x: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
        """Images of clean samples."""
        return model_to_images(x)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of class, weights and noise levels."""
        digest = hashlib.sha256()
        kind = type(self.module)
        digest.update(f"{kind.__module__}.{kind.__qualname__}|{self.noise.prediction}|".encode())
        hash_tensors(digest, self.module.state_dict().items())
        hash_tensors(digest, [("log_sigmas", self.noise.log_sigmas)])
        return digest.hexdigest()
