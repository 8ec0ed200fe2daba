"""What the adapters of diffusers models share: number format, weights, identity, attention kernels."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffcal.core.devices import resolve_dtype
from diffcal.core.digests import hash_tensors
from diffcal.diffusion.denoisers import ConditionKind
from diffcal.diffusion.discrete_denoiser import DiscreteDenoiser
from diffcal.diffusion.discrete_noise import DiscreteNoise
from diffcal.errors import CheckpointError, ConfigError, MissingExtraError

__all__ = ["DiffusersAttention", "DiffusersDenoiser", "config_of", "square", "up_block_features"]

DiffusersAttention = Literal["sdpa", "xformers"]


class DiffusersDenoiser(DiscreteDenoiser):
    """``D(x; sigma, condition)`` of a network trained with discrete timesteps.

    Input and output are float32 whatever ``dtype`` the network computes in. All but ``dtype`` is passed
    on to :class:`~.discrete_denoiser.DiscreteDenoiser`.

    Args:
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
        channels = sample_shape[0]
        config = config_of(module)
        out_channels = config.out_channels or channels
        if config.in_channels != channels or out_channels not in (channels, 2 * channels):
            raise CheckpointError(
                f"the network maps {config.in_channels} to {out_channels} channels; a denoiser "
                "gives as many as it takes, or twice as many when it also predicts a variance "
                "(inpainting, super-resolution and other image-to-image networks are not supported)"
            )
        super().__init__(
            module,
            noise,
            sample_shape=sample_shape,
            sigma_data=sigma_data,
            condition_kind=condition_kind,
            num_classes=num_classes,
            class_names=class_names,
            feature_modules=feature_modules,
        )
        self.dtype = resolve_dtype(dtype)
        self._fingerprint: str | None = None

    def _prediction(
        self, x_t: Float[Tensor, "b c h w"], timestep: Tensor, condition: Tensor | None
    ) -> Float[Tensor, "b c h w"]:
        half = self.dtype != torch.float32
        with torch.autocast(x_t.device.type, dtype=self.dtype if half else None, enabled=half):
            output = self._network(x_t, timestep, condition)
        # Networks that also predict a variance put it into the second half of the channels.
        return output[:, : x_t.shape[1]].float()

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

    def set_attention_backend(self, name: DiffusersAttention) -> None:
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
