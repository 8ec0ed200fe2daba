"""What the adapters of diffusers models share: from a noise-level call to a network call and back."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffcal.core.devices import resolve_dtype
from diffcal.core.digests import hash_tensors
from diffcal.core.tensors import append_dims
from diffcal.diffusion.denoisers import ConditionKind
from diffcal.diffusion.diffusers_noise import DiscreteNoise
from diffcal.errors import CheckpointError, ConfigError, MissingExtraError

__all__ = ["AttentionBackend", "DiffusersDenoiser", "config_of", "square", "up_block_features"]

AttentionBackend = Literal["sdpa", "xformers"]


class DiffusersDenoiser(ABC):
    """``D(x; sigma, condition)`` of a network trained with discrete timesteps.

    See :class:`diffcal.diffusion.denoisers.Denoiser` for the interface. Input and output are
    float32 whatever ``dtype`` the network computes in.

    Args:
        module: The network; it is put into evaluation mode, its parameters stay trainable.
        noise: Its noise levels and prediction.
        sample_shape: (c, h, w) of one ``x``.
        sigma_data: Standard deviation of clean samples.
        condition_kind: ``none``, ``class`` or ``prompt``.
        num_classes: Number of classes or prompts; 0 if unconditional.
        class_names: Their names; numbers if None.
        feature_modules: Submodules whose outputs serve as features, best first.
        dtype: ``float32``, or ``bfloat16``/``float16`` for autocast around the network.
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
        dtype: str,
    ) -> None:
        if class_names is not None and len(class_names) != num_classes:
            raise ConfigError(
                f"class_names has {len(class_names)} names for {num_classes} classes of the network"
            )
        if sigma_data <= 0:
            raise ConfigError(f"sigma_data must be positive, got {sigma_data}")
        channels = sample_shape[0]
        config = config_of(module)
        out_channels = config.out_channels or channels
        if config.in_channels != channels or out_channels not in (channels, 2 * channels):
            raise CheckpointError(
                f"the network maps {config.in_channels} to {out_channels} channels; a denoiser "
                "gives as many as it takes, or twice as many when it also predicts a variance "
                "(inpainting, super-resolution and other image-to-image networks are not supported)"
            )
        self.module = module.eval()
        self.noise = noise
        self.sample_shape = sample_shape
        self.sigma_data = sigma_data
        self.sigma_min, self.sigma_max = noise.sigma_min, noise.sigma_max
        self.condition_kind: ConditionKind = condition_kind
        self.num_classes = num_classes
        self.class_names = class_names or tuple(str(index) for index in range(num_classes))
        self.feature_modules = feature_modules
        self.dtype = resolve_dtype(dtype)
        self._fingerprint: str | None = None

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
        """Raw output of the network in float32, a learned variance left out; arguments as for a call.

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
        half = self.dtype != torch.float32
        with torch.autocast(x.device.type, dtype=self.dtype if half else None, enabled=half):
            output = self._network(
                self.noise.network_input(x, append_dims(sigma.float(), x)),
                self.noise.timestep(sigma),
                condition,
            )
        # Networks that also predict a variance put it into the second half of the channels.
        return output[:, : x.shape[1]].float()

    def target(
        self,
        clean: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c h w"]:
        """What :meth:`predict` is trained to give for ``clean + sigma * noise``."""
        return self.noise.target(clean, noise, append_dims(sigma.float(), clean))

    @abstractmethod
    def _network(
        self, x_t: Float[Tensor, "b c h w"], timestep: Tensor, condition: Tensor | None
    ) -> Float[Tensor, "b d h w"]:
        """Raw output of the network."""

    @abstractmethod
    def condition(self, weights: Float[Tensor, "b k"] | None) -> Tensor | None:
        """Condition of rows of non-negative weights that sum to 1; None for an unconditional model."""

    @abstractmethod
    def unconditional(self, batch_size: int) -> Tensor:
        """Condition of the unconditional branch."""

    @abstractmethod
    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
        """Clean samples ``x_0`` of images."""

    @abstractmethod
    def decode(self, x: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
        """Images of clean samples."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configs, weights and noise levels; computed once, when first asked for."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            digest.update(f"{type(self).__name__}|{self.noise.prediction}|".encode())
            for name, config, tensors in self._identity():
                digest.update(f"{name}|{_canonical(config)}|".encode())
                hash_tensors(digest, sorted(tensors.items()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _identity(self) -> list[tuple[str, Mapping[str, Any], Mapping[str, Tensor]]]:
        """(name, config, tensors) of everything that decides the samples."""
        return [
            ("network", config_of(self.module), self.module.state_dict()),
            ("noise", {}, {"log_sigmas": self.noise.log_sigmas}),
        ]

    def to(self, device: torch.device | str) -> "DiffusersDenoiser":
        """The same denoiser, its parameters moved to ``device`` in place."""
        self.module.to(device)
        self.noise = self.noise.to(device)
        return self

    def set_attention_backend(self, name: AttentionBackend) -> None:
        """Compute attention with torch's own kernels (``sdpa``, the default) or with ``xformers``.

        Raises:
            MissingExtraError: xformers is asked for and not installed.
            ConfigError: an unknown name, or xformers without a CUDA device.
        """
        network: Any = self.module
        if name == "sdpa":
            network.disable_xformers_memory_efficient_attention()
        elif name == "xformers":
            try:
                network.enable_xformers_memory_efficient_attention()
            except ModuleNotFoundError as error:
                raise MissingExtraError(
                    "attention 'xformers' needs the package xformers: pip install 'diffcal[xformers]', "
                    "or use attention 'sdpa'"
                ) from error
            except ValueError as error:
                raise ConfigError(
                    f"attention 'xformers' cannot be used here ({error}); use 'sdpa'"
                ) from error
        else:
            raise ConfigError(f"unknown attention '{name}': use sdpa or xformers")

    def _check_weights(self, weights: Tensor | None) -> Tensor:
        if weights is None:
            raise ConfigError(
                f"the network is conditioned on {self.num_classes} "
                f"{'prompts' if self.condition_kind == 'prompt' else 'classes'}: give weights, "
                "one row for each sample"
            )
        if weights.shape[1] != self.num_classes:
            raise ConfigError(
                f"weights have {weights.shape[1]} columns, but the network has "
                f"{self.num_classes} {'prompts' if self.condition_kind == 'prompt' else 'classes'}"
            )
        return weights.to(self.device, torch.float32)


def config_of(module: nn.Module) -> Any:
    """Config of a diffusers model: its entries are attributes, and ``get`` works as on a dict."""
    return module.config


def square(size: int | tuple[int, int] | list[int] | None) -> tuple[int, int]:
    """(height, width) of a diffusers ``sample_size``.

    Raises:
        CheckpointError: the config does not tell the size.
    """
    if size is None:
        raise CheckpointError(
            "the network's config has no sample_size: write the trained height and width into it"
        )
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def up_block_features(module: nn.Module) -> tuple[str, ...]:
    """Middle of the up-sampling path first, then the bottleneck, then the other up blocks.

    Every one gives a tensor [b, c, h, w]. The order is what linear probes found on several U-Nets:
    Baranchuk et al. 2022 (arXiv:2112.03126) and Xiang et al. 2023 (arXiv:2303.09769).
    """
    count = len(module.get_submodule("up_blocks"))  # type: ignore[arg-type]
    middle = (count - 1) // 2
    others = sorted((i for i in range(count) if i != middle), key=lambda i: abs(i - middle))
    bottleneck = ("mid_block",) if getattr(module, "mid_block", None) is not None else ()
    return (f"up_blocks.{middle}", *bottleneck, *(f"up_blocks.{index}" for index in others))


def _canonical(config: Mapping[str, Any]) -> str:
    # Names that start with an underscore tell where a config was read, not what it says.
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str)
