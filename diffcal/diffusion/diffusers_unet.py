"""Pixel-space U-Nets of diffusers (``UNet2DModel``), unconditional or with soft class conditions."""

from typing import Any

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from diffcal.diffusion.denoisers import images_to_model, model_to_images
from diffcal.diffusion.diffusers_base import DiffusersDenoiser, config_of, square, up_block_features
from diffcal.diffusion.discrete_noise import TimestepRule, discrete_noise
from diffcal.diffusion.soft_class_embedding import SoftEmbedding
from diffcal.errors import CheckpointError, ConfigError, DataError

__all__ = ["UNet2DDenoiser"]


class UNet2DDenoiser(DiffusersDenoiser):
    """``D(x; sigma, condition)`` of a ``UNet2DModel`` and the scheduler it was trained with.

    The class embedding is replaced in place by one that also takes weights over its rows, so that a
    mix of classes is the mix of their embeddings; integers give what they gave before. A condition
    is a float row of weights over the rows of the table, [b, rows], or integers [b].

    Args:
        module: ``UNet2DModel``; ``num_class_embeds`` makes it class-conditional.
        scheduler: A diffusers scheduler with ``alphas_cumprod``.
        dtype: ``float32``, or ``bfloat16``/``float16`` for autocast around the network.
        timesteps: Give the network interpolated timesteps or the nearest integer ones.
        null_class: Row of the class embedding that training used for dropped labels; it is then not
            counted as a class. None: the network has no unconditional branch.
        class_names: Names of the classes.
        sigma_data: Standard deviation of the images in [-1, 1].

    Raises:
        CheckpointError: an embedding of another kind, a Fourier time embedding, or channels that are
            not images.
        ConfigError: ``null_class`` or ``class_names`` do not fit the network.
    """

    def __init__(
        self,
        module: nn.Module,
        scheduler: Any,
        *,
        dtype: str = "float32",
        timesteps: TimestepRule = "continuous",
        null_class: int | None = None,
        class_names: tuple[str, ...] | None = None,
        sigma_data: float = 0.5,
    ) -> None:
        config = config_of(module)
        if config.time_embedding_type == "fourier":
            raise CheckpointError(
                "UNet2DModel with time_embedding_type 'fourier' takes noise levels of a variance "
                "exploding process, which is not supported; supported: positional, learned"
            )
        if config.time_embedding_type == "learned":
            timesteps = "integer"  # a table of timesteps has nothing between its rows
        if config.in_channels not in (1, 3):
            raise CheckpointError(
                f"UNet2DModel takes {config.in_channels} channels; pixel models have 1 (grey) or 3 "
                "(RGB), latent models need their pipeline folder with the autoencoder"
            )
        rows = _soften(module)
        if null_class is not None and not 0 <= null_class < rows:
            raise ConfigError(
                f"null_class {null_class} is not a row of the class embedding ({rows} rows)"
                if rows
                else "null_class is set, but the network is unconditional"
            )
        super().__init__(
            module,
            discrete_noise(scheduler, timesteps),
            sample_shape=(config.in_channels, *square(config.sample_size)),
            sigma_data=sigma_data,
            condition_kind="class" if rows else "none",
            num_classes=rows - (null_class is not None),
            class_names=class_names,
            feature_modules=up_block_features(module),
            dtype=dtype,
        )
        self.null_class = null_class
        self._rows = rows

    def _network(
        self, x_t: Float[Tensor, "b c h w"], timestep: Tensor, condition: Tensor | None
    ) -> Float[Tensor, "b d h w"]:
        return self.module(x_t, timestep, class_labels=condition, return_dict=False)[0]

    def condition(self, weights: Float[Tensor, "b k"] | None) -> Shaped[Tensor, "b rows"] | None:
        """Weights [b, rows] over the rows of the class embedding, the null class at weight 0.

        Raises:
            ConfigError: weights do not range over the classes.
        """
        if self.condition_kind == "none" and (weights is None or weights.shape[1] == 0):
            return None
        weights = self._check_weights(weights)
        if self.null_class is None:
            return weights
        null = weights.new_zeros(weights.shape[0], 1)
        return torch.cat(
            [weights[:, : self.null_class], null, weights[:, self.null_class :]], dim=1
        )

    def unconditional(self, batch_size: int) -> Tensor:
        """One-hot rows on the null class.

        Raises:
            ConfigError: the network has no null class, or none was named.
        """
        if self.null_class is None:
            raise ConfigError(
                "the network has no unconditional branch"
                if self.condition_kind == "none"
                else "the network's null class is not known: set null_class to the row of the class "
                "embedding that training used for dropped labels, or sample without guidance"
            )
        row = torch.zeros(batch_size, self._rows, device=self.device)
        row[:, self.null_class] = 1
        return row

    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
        """Pixels in [-1, 1].

        Raises:
            DataError: other channels than the network's.
        """
        if images.shape[3] != self.sample_shape[0]:
            raise DataError(
                f"images have {images.shape[3]} channels, but the network takes "
                f"{self.sample_shape[0]}"
            )
        return images_to_model(images)

    def decode(self, x: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
        """Pixels 0..255 of ``x`` in [-1, 1]."""
        return model_to_images(x)


def _soften(module: nn.Module) -> int:
    """Let the class embedding take weights; its number of rows, 0 if unconditional."""
    embedding = module.class_embedding
    if embedding is None:
        return 0
    if not isinstance(embedding, nn.Embedding):
        kind = config_of(module).class_embed_type
        raise CheckpointError(
            f"UNet2DModel with class_embed_type '{kind}' has no table of classes to mix; only "
            "networks with num_class_embeds and no class_embed_type are supported"
        )
    if not isinstance(embedding, SoftEmbedding):
        module.class_embedding = SoftEmbedding(embedding)
    return embedding.num_embeddings
