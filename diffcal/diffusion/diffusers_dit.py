"""Class-conditional diffusion transformers of diffusers on latents (``DiTTransformer2DModel``)."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import pad

from diffcal.diffusion.diffusers_base import DiffusersDenoiser, config_of, square
from diffcal.diffusion.diffusers_latents import LatentCodec
from diffcal.diffusion.discrete_noise import TimestepRule, discrete_noise
from diffcal.diffusion.soft_class_embedding import SoftLabelEmbedding
from diffcal.errors import CheckpointError, ConfigError

__all__ = ["DiTDenoiser"]


class DiTDenoiser(DiffusersDenoiser):
    """``D(x; sigma, condition)`` of a ``DiTTransformer2DModel`` with its autoencoder and scheduler.

    Every block holds its own label embedding; all of them are replaced in place by ones that also
    take weights. A condition is a float row [b, rows] over the rows of the tables (the last one is
    the null class of label dropout), or integers [b]. ``x`` are scaled latents.

    Source: Peebles and Xie 2023 (arXiv:2212.09748).

    Args:
        module: ``DiTTransformer2DModel``; a learned variance in its output is dropped.
        vae: ``AutoencoderKL``.
        scheduler: A diffusers scheduler with ``alphas_cumprod``.
        dtype: ``float32``, or ``bfloat16``/``float16`` for autocast around the transformer.
        timesteps: Give the network interpolated timesteps or the nearest integer ones.
        class_names: Names of the classes.
        sigma_data: Standard deviation of scaled latents.
        decode_chunk: Images that pass through the autoencoder at once.

    Raises:
        CheckpointError: no label embedding is found, or transformer and autoencoder do not fit.
        ConfigError: ``class_names`` does not fit the network.
    """

    def __init__(
        self,
        module: nn.Module,
        vae: nn.Module,
        scheduler: Any,
        *,
        dtype: str = "float32",
        timesteps: TimestepRule = "continuous",
        class_names: tuple[str, ...] | None = None,
        sigma_data: float = 1.0,
        decode_chunk: int = 1,
    ) -> None:
        config = config_of(module)
        codec = LatentCodec(vae, chunk=decode_chunk)
        if codec.latent_channels != config.in_channels:
            raise CheckpointError(
                f"the transformer takes {config.in_channels} latent channels, but the "
                f"autoencoder gives {codec.latent_channels}"
            )
        num_classes, self._rows = _soften(module)
        super().__init__(
            module,
            discrete_noise(scheduler, timesteps),
            sample_shape=(codec.latent_channels, *square(config.sample_size)),
            sigma_data=sigma_data,
            condition_kind="class",
            num_classes=num_classes,
            class_names=class_names,
            feature_modules=_block_features(module),
            dtype=dtype,
        )
        self.codec = codec

    def _network(
        self, x_t: Float[Tensor, "b c h w"], timestep: Tensor, condition: Tensor | None
    ) -> Float[Tensor, "b d h w"]:
        return self.module(x_t, timestep=timestep, class_labels=condition, return_dict=False)[0]

    def condition(self, weights: Float[Tensor, "b k"] | None) -> Float[Tensor, "b rows"]:
        """Weights [b, rows] over the rows of the label embeddings, the null class at weight 0.

        Raises:
            ConfigError: weights do not range over the classes.
        """
        return pad(self._check_weights(weights), (0, self._rows - self.num_classes))

    def unconditional(self, batch_size: int) -> Float[Tensor, "b rows"]:
        """One-hot rows on the null class.

        Raises:
            ConfigError: the network was trained without label dropout.
        """
        if self._rows == self.num_classes:
            raise ConfigError("the network was trained without label dropout: it has no null class")
        row = torch.zeros(batch_size, self._rows, device=self.device)
        row[:, self.num_classes] = 1
        return row

    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b z y x"]:
        """Scaled latents of images: the mode of the encoder's distribution."""
        return self.codec.encode(images.to(self.device))

    def decode(self, x: Float[Tensor, "b z y x"]) -> UInt8[Tensor, "b h w c"]:
        """Images of scaled latents, decoded in float32."""
        return self.codec.decode(x)

    def to(self, device: torch.device | str) -> "DiTDenoiser":
        """The same denoiser, transformer and autoencoder moved to ``device`` in place."""
        self.codec.to(device)
        super().to(device)
        return self

    def _identity(self) -> list[Any]:
        vae = self.codec.vae
        return [*super()._identity(), ("autoencoder", vae.config, vae.state_dict())]


def _soften(module: nn.Module) -> tuple[int, int]:
    """Let every label embedding take weights; (number of classes, rows of the tables)."""
    from diffusers.models.embeddings import LabelEmbedding

    found = set()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LabelEmbedding):
                child = SoftLabelEmbedding(
                    child.embedding_table, child.num_classes, child.dropout_prob
                )
                setattr(parent, name, child)
            if isinstance(child, SoftLabelEmbedding):
                found.add((child.num_classes, child.embedding_table.num_embeddings))
    if len(found) != 1:
        raise CheckpointError(
            "the transformer has no label embedding: it is not class-conditional"
            if not found
            else f"the blocks of the transformer have different numbers of classes: {sorted(found)}"
        )
    return found.pop()


def _block_features(module: nn.Module) -> tuple[str, ...]:
    # Tokens [b, s, d]; the middle of the stack first, as linear probes find on transformers (Xiang et
    # al. 2023, arXiv:2303.09769).
    count = len(module.get_submodule("transformer_blocks"))  # type: ignore[arg-type]
    order = sorted(range(count), key=lambda index: abs(index - count // 2))
    return tuple(f"transformer_blocks.{index}" for index in order)
