"""DhariwalUNet, the raw network of ADM.

Module names are those of the published checkpoints: weights match by name and shape.

Source: Karras et al. 2022 (arXiv:2206.00364), appendix F and table 7; Dhariwal & Nichol 2021
(arXiv:2105.05233).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffcal.diffusion.edm_block import UNetBlock, drop_labels
from diffcal.diffusion.edm_layers import (
    Conv2d,
    GroupNorm,
    Initialisation,
    Linear,
    PositionalEmbedding,
)
from diffcal.diffusion.edm_levels import decoder_levels, encoder_levels

__all__ = ["DhariwalUNet"]


class DhariwalUNet(nn.Module):
    """ADM: adaptive scale and shift, attention heads of 64 channels; arguments as SongUNet."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout
        gain = math.sqrt(1 / 3)
        init = Initialisation(mode="kaiming_uniform", weight_gain=gain, bias_gain=gain)
        init_zero = Initialisation(mode="kaiming_uniform", weight_gain=0.0)
        emb_channels = model_channels * channel_mult_emb

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = (
            Linear(augment_dim, model_channels, bias=False, init=init_zero) if augment_dim else None
        )
        self.map_layer0 = Linear(model_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        label_init = Initialisation(mode="kaiming_normal", weight_gain=math.sqrt(label_dim))
        self.map_label = (
            Linear(label_dim, emb_channels, bias=False, init=label_init) if label_dim else None
        )

        def block(cin: int, cout: int, **options: Any) -> UNetBlock:
            return UNetBlock(
                cin, cout, emb_channels, dropout=dropout, init=init, init_zero=init_zero, **options
            )

        widths = [model_channels * mult for mult in channel_mult]
        resolutions = [img_resolution >> level for level in range(len(widths))]
        levels = (block, widths, num_blocks, resolutions, attn_resolutions)
        self.enc = encoder_levels(Conv2d(in_channels, widths[0], 3, init=init), *levels)
        self.dec = decoder_levels(self.enc, *levels)
        self.out_norm = GroupNorm(widths[0])
        self.out_conv = Conv2d(widths[0], out_channels, 3, init=init_zero)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Float[Tensor, "e d"]:
        """Embedding of noise level, class vector (any real weights) and augmentation."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            labels = drop_labels(class_labels, self.label_dropout, self.training)
            emb = emb + self.map_label(labels)
        return F.silu(emb)

    def forward(
        self,
        x: Float[Tensor, "b i h w"],
        noise_labels: Float[Tensor, " e"],
        class_labels: Float[Tensor, "l k"] | None = None,
        augment_labels: Float[Tensor, "m n"] | None = None,
    ) -> Float[Tensor, "b o h w"]:
        emb = self.embed(noise_labels, class_labels, augment_labels)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))
