"""What both EDM-family U-Nets are made of: the residual block, skips, and dropping of labels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffcal.diffusion.attention import attention
from diffcal.diffusion.edm_layers import Conv2d, GroupNorm, Initialisation, Linear
from diffcal.errors import ConfigError

__all__ = ["UNetBlock", "drop_labels"]


class UNetBlock(nn.Module):
    """Two convolutions with noise-level modulation, a skip, and optional self-attention.

    Args:
        emb_channels: Length of the embedding of noise level and class.
        up: Double height and width in the first convolution.
        down: Halve them there.
        attention: Self-attention after the convolutions.
        num_heads: Heads; None: ``out_channels // channels_per_head``, where 0 leaves attention out.
        skip_scale: Factor after each residual sum.
        resample_proj: A resampling skip gets a 1x1 convolution even at equal channels.
        adaptive_scale: Modulate the second norm by scale and shift; otherwise add before the norm.
        init, init_zero, init_attention: Laws of ordinary layers, of each branch's last layer, and
            of the attention's input projection (None: as ``init``).

    Source: Karras et al. 2022 (arXiv:2206.00364), appendix F.1, figure 8.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[int | float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: Initialisation | None = None,
        init_zero: Initialisation | None = None,
        init_attention: Initialisation | None = None,
    ) -> None:
        super().__init__()
        init = init or Initialisation()
        init_zero = init_zero or Initialisation(weight_gain=0.0)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        if not attention:
            self.num_heads = 0
        else:
            self.num_heads = num_heads or out_channels // channels_per_head
        if self.num_heads and out_channels % self.num_heads:
            raise ConfigError(
                f"{out_channels} channels do not divide into {self.num_heads} attention heads"
            )
        resampling = {"up": up, "down": down, "resample_filter": resample_filter}
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, init=init, **resampling)
        self.affine = Linear(emb_channels, out_channels * (1 + adaptive_scale), init=init)
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=init_zero)
        self.skip: Conv2d | None = None
        if in_channels != out_channels or up or down:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, init=init, **resampling)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(
                out_channels,
                out_channels * 3,
                1,
                init=init if init_attention is None else init_attention,
            )
            self.proj = Conv2d(out_channels, out_channels, 1, init=init_zero)

    def forward(
        self, x: Float[Tensor, "b i h w"], emb: Float[Tensor, "e d"]
    ) -> Float[Tensor, "b o h2 w2"]:
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + modulation))
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        h = self.conv1(h)
        h = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            h = (h + self._attend(h)) * self.skip_scale
        return h

    def _attend(self, h: Tensor) -> Tensor:
        b, c, height, width = h.shape
        # Channel (head * d + j) * 3 + t holds component j of q, k or v (t = 0, 1, 2).
        qkv = self.qkv(self.norm2(h)).reshape(b, self.num_heads, c // self.num_heads, 3, -1)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        mixed = attention(q, k, v)
        return self.proj(mixed.transpose(2, 3).reshape(b, c, height, width))


def drop_labels(labels: Tensor, probability: float, training: bool) -> Tensor:
    """Labels with whole rows set to zero at random, in training only."""
    if not training or not probability:
        return labels
    keep = torch.rand(labels.shape[0], 1, device=labels.device) >= probability
    return labels * keep.to(labels.dtype)
