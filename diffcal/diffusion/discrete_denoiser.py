"""What denoisers with a table of timesteps share: from a noise-level call to a network call and back."""

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcal.core.tensors import append_dims
from diffcal.diffusion.denoisers import ConditionKind
from diffcal.diffusion.discrete_noise import DiscreteNoise
from diffcal.errors import ConfigError

__all__ = ["DiscreteDenoiser"]

D = TypeVar("D", bound="DiscreteDenoiser")


class DiscreteDenoiser(ABC):
    """``D(x; sigma, condition)`` of a network that takes ``x_t`` and a timestep.

    See :class:`diffcal.diffusion.denoisers.Denoiser` for the interface. Input and output are float32.

    Args:
        module: The network; it is put into evaluation mode, its parameters stay trainable.
        noise: Its noise levels and prediction.
        sample_shape: (c, h, w) of one ``x``.
        sigma_data: Standard deviation of clean samples.
        condition_kind: ``none``, ``class`` or ``prompt``.
        num_classes: Number of classes or prompts; 0 if unconditional.
        class_names: Their names; numbers if None.
        feature_modules: Submodules whose outputs serve as features, best first.

    Raises:
        ConfigError: names for another number of classes, or a ``sigma_data`` that is not positive.
    """

    def __init__(
        self,
        module: nn.Module,
        noise: DiscreteNoise,
        *,
        sample_shape: tuple[int, int, int],
        sigma_data: float,
        condition_kind: ConditionKind,
        num_classes: int,
        class_names: tuple[str, ...] | None,
        feature_modules: tuple[str, ...],
    ) -> None:
        if class_names is not None and len(class_names) != num_classes:
            raise ConfigError(
                f"class_names has {len(class_names)} names for {num_classes} classes of the network"
            )
        if sigma_data <= 0:
            raise ConfigError(f"sigma_data must be positive, got {sigma_data}")
        self.module = module.eval()
        self.noise = noise
        self.sample_shape = sample_shape
        self.sigma_data = sigma_data
        self.sigma_min, self.sigma_max = noise.sigma_min, noise.sigma_max
        self.condition_kind: ConditionKind = condition_kind
        self.num_classes = num_classes
        self.class_names = class_names or tuple(str(index) for index in range(num_classes))
        self.feature_modules = feature_modules

    def __call__(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Denoised ``x`` in float32, differentiable with respect to ``x`` and the parameters.

        Raises:
            ConfigError: a condition is missing, or given to an unconditional network.
        """
        x = x.float()
        output = self.predict(x, sigma, condition)
        return self.noise.clean(x, append_dims(sigma.float(), x), output)

    def predict(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Raw output of the network, a learned variance left out; arguments as for a call.

        What it predicts (epsilon, sample or v) is ``noise.prediction``.
        """
        if (condition is None) != (self.condition_kind == "none"):
            raise ConfigError(
                "the network is unconditional, but a condition was given"
                if condition is not None
                else f"the network needs a {self.condition_kind} condition: "
                "denoiser.condition(weights)"
            )
        x = x.float()
        x_t = self.noise.network_input(x, append_dims(sigma.float(), x))
        return self._prediction(x_t, self.noise.timestep(sigma), condition)

    def target(
        self,
        clean: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c h w"]:
        """What :meth:`predict` is trained to give for ``clean + sigma * noise``."""
        return self.noise.target(clean, noise, append_dims(sigma.float(), clean))

    @abstractmethod
    def _prediction(
        self, x_t: Float[Tensor, "b c h w"], timestep: Tensor, condition: Tensor | None
    ) -> Float[Tensor, "b c h w"]:
        """See :meth:`predict`, for the noised image of the variance preserving form."""

    def to(self: D, device: torch.device | str) -> D:
        """The same denoiser, its parameters moved to ``device`` in place."""
        self.module.to(device)
        self.noise = self.noise.to(device)
        return self
