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

from diffcal.diffusion.edm_block import UNetBlock, drop_labels, skip_channels
from diffcal.diffusion.edm_layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Initialisation,
    Linear,
    PositionalEmbedding,
)

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

        self.enc = nn.ModuleDict()
        channels, aux_channels = model_channels, in_channels
        for level, mult in enumerate(channel_mult):
            resolution = img_resolution >> level
            r = f"{resolution}x{resolution}"
            if level == 0:
                self.enc[f"{r}_conv"] = Conv2d(in_channels, channels, 3, init=init)
            else:
                self.enc[f"{r}_down"] = block(channels, channels, down=True)
                if encoder_type == "skip":
                    self.enc[f"{r}_aux_down"] = Conv2d(
                        aux_channels, aux_channels, 0, down=True, resample_filter=resample_filter
                    )
                    self.enc[f"{r}_aux_skip"] = Conv2d(aux_channels, channels, 1, init=init)
                elif encoder_type == "residual":
                    self.enc[f"{r}_aux_residual"] = Conv2d(
                        aux_channels,
                        channels,
                        3,
                        down=True,
                        resample_filter=resample_filter,
                        fused_resample=True,
                        init=init,
                    )
                    aux_channels = channels
            for index in range(num_blocks):
                attends = resolution in attn_resolutions
                cout = model_channels * mult
                self.enc[f"{r}_block{index}"] = block(channels, cout, attention=attends)
                channels = cout

        self.dec = nn.ModuleDict()
        skips = skip_channels(self.enc)
        last = len(channel_mult) - 1
        for level, mult in reversed(list(enumerate(channel_mult))):
            resolution = img_resolution >> level
            r = f"{resolution}x{resolution}"
            if level == last:
                self.dec[f"{r}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{r}_in1"] = block(channels, channels)
            else:
                self.dec[f"{r}_up"] = block(channels, channels, up=True)
            for index in range(num_blocks + 1):
                attends = index == num_blocks and resolution in attn_resolutions
                cout = model_channels * mult
                self.dec[f"{r}_block{index}"] = block(
                    channels + skips.pop(), cout, attention=attends
                )
                channels = cout
            if decoder_type == "skip" or level == 0:
                if level < last and decoder_type == "skip":
                    self.dec[f"{r}_aux_up"] = Conv2d(
                        out_channels, out_channels, 0, up=True, resample_filter=resample_filter
                    )
                self.dec[f"{r}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                self.dec[f"{r}_aux_conv"] = Conv2d(channels, out_channels, 3, init=init_zero)

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
