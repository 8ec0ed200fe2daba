"""SongUNet, the raw network of DDPM++ and NCSN++.

Module names are those of the published checkpoints: weights match by name and shape.

Source: Karras et al. 2022 (arXiv:2206.00364), appendix F and table 7; Song et al. 2021
(arXiv:2011.13456), appendix H.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffcal.diffusion.edm_block import UNetBlock, drop_labels
from diffcal.diffusion.edm_layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Initialisation,
    Linear,
    PositionalEmbedding,
)
from diffcal.diffusion.edm_levels import decoder_levels, encoder_levels

__all__ = ["SongUNet"]


class SongUNet(nn.Module):
    """DDPM++ (positional, standard, [1, 1]) or NCSN++ (fourier, residual, [1, 3, 3, 1]).

    Args:
        img_resolution: Height and width of the images.
        label_dim: Length of class vectors; 0: unconditional.
        augment_dim: Length of augmentation labels; 0: none.
        model_channels: Base number of channels.
        channel_mult: Multiple of it at each resolution, finest first.
        attn_resolutions: Resolutions whose blocks attend.
        label_dropout: Chance that a training example loses its class.
        embedding_type, channel_mult_noise: Noise embedding and its relative width.
        encoder_type, decoder_type, resample_filter: Auxiliary image pyramid and its filter.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
        resample_filter: Sequence[int | float] = (1, 1),
    ) -> None:
        super().__init__()
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout
        init = Initialisation(mode="xavier_uniform")
        init_zero = Initialisation(mode="xavier_uniform", weight_gain=1e-5)
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise

        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = (
            Linear(augment_dim, noise_channels, bias=False, init=init) if augment_dim else None
        )
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)

        def block(cin: int, cout: int, **options: Any) -> UNetBlock:
            return UNetBlock(
                cin,
                cout,
                emb_channels,
                num_heads=1,
                dropout=dropout,
                skip_scale=math.sqrt(0.5),
                eps=1e-6,
                resample_filter=resample_filter,
                resample_proj=True,
                adaptive_scale=False,
                init=init,
                init_zero=init_zero,
                init_attention=Initialisation(mode="xavier_uniform", weight_gain=math.sqrt(0.2)),
                **options,
            )

        aux_channels = in_channels

        def image_down(layers: nn.ModuleDict, level: int, r: str, channels: int) -> None:
            nonlocal aux_channels
            if encoder_type == "skip":
                layers[f"{r}_aux_down"] = Conv2d(
                    aux_channels, aux_channels, 0, down=True, resample_filter=resample_filter
                )
                layers[f"{r}_aux_skip"] = Conv2d(aux_channels, channels, 1, init=init)
            elif encoder_type == "residual":
                layers[f"{r}_aux_residual"] = Conv2d(
                    aux_channels,
                    channels,
                    3,
                    down=True,
                    resample_filter=resample_filter,
                    fused_resample=True,
                    init=init,
                )
                aux_channels = channels

        def image_up(layers: nn.ModuleDict, level: int, r: str, channels: int) -> None:
            if decoder_type != "skip" and level > 0:
                return
            if decoder_type == "skip" and level < len(channel_mult) - 1:
                layers[f"{r}_aux_up"] = Conv2d(
                    out_channels, out_channels, 0, up=True, resample_filter=resample_filter
                )
            layers[f"{r}_aux_norm"] = GroupNorm(channels, eps=1e-6)
            layers[f"{r}_aux_conv"] = Conv2d(channels, out_channels, 3, init=init_zero)

        widths = [model_channels * mult for mult in channel_mult]
        resolutions = [img_resolution >> level for level in range(len(widths))]
        levels = (block, widths, num_blocks, resolutions, attn_resolutions)
        first = Conv2d(in_channels, model_channels, 3, init=init)
        self.enc = encoder_levels(first, *levels, beside=image_down)
        self.dec = decoder_levels(self.enc, *levels, only_last_attends=True, beside=image_up)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Float[Tensor, "e d"]:
        """Embedding of noise level, class vector (any real weights) and augmentation."""
        noise = self.map_noise(noise_labels)
        # The published weights expect [sin, cos].
        emb = noise.reshape(noise.shape[0], 2, -1).flip(1).reshape(noise.shape)
        if self.map_label is not None and class_labels is not None:
            labels = drop_labels(class_labels, self.label_dropout, self.training)
            emb = emb + self.map_label(labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self,
        x: Float[Tensor, "b i h w"],
        noise_labels: Float[Tensor, " e"],
        class_labels: Float[Tensor, "l k"] | None = None,
        augment_labels: Float[Tensor, "m n"] | None = None,
    ) -> Float[Tensor, "b o h w"]:
        emb = self.embed(noise_labels, class_labels, augment_labels)
        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)

        image: Tensor | None = None
        hidden = x
        for name, layer in self.dec.items():
            if "aux_up" in name:
                image = layer(image)
            elif "aux_norm" in name:
                hidden = layer(x)
            elif "aux_conv" in name:
                part = layer(F.silu(hidden))
                image = part if image is None else image + part
            else:
                if "block" in name:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
        assert image is not None  # level 0 always has aux_conv
        return image
