"""Layers of EDM-family U-Nets: linear, convolution with resampling, group norm, noise embeddings.

Every layer casts its parameters to the dtype of the incoming activation, so one set of float32
weights serves float64, float32 and half-precision activations.

Source: Karras et al. 2022 (arXiv:2206.00364), appendix F; Song et al. 2021 (arXiv:2011.13456) and
Dhariwal & Nichol 2021 (arXiv:2105.05233) for the network families.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffcal.config import check_choices
from diffcal.errors import ConfigError

__all__ = [
    "Conv2d",
    "FourierEmbedding",
    "GroupNorm",
    "Initialisation",
    "Linear",
    "PositionalEmbedding",
    "resampling_filter",
]


@dataclass(frozen=True, kw_only=True)
class Initialisation:
    """Law of fresh weights: a base distribution times a gain, for weight and bias apart."""

    mode: Literal["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"] = (
        "xavier_uniform"
    )
    weight_gain: float = 1.0
    bias_gain: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self)

    def draw(self, shape: Sequence[int], fan_in: int, fan_out: int, gain: float) -> nn.Parameter:
        """Parameter of ``shape``; a gain of 0 draws nothing from the random stream."""
        if gain == 0:
            return nn.Parameter(torch.zeros(*shape))
        base = torch.randn(*shape) if self.mode.endswith("normal") else torch.rand(*shape) * 2 - 1
        variance = {
            "xavier_uniform": 6 / (fan_in + fan_out),
            "xavier_normal": 2 / (fan_in + fan_out),
            "kaiming_uniform": 3 / fan_in,
            "kaiming_normal": 1 / fan_in,
        }[self.mode]
        return nn.Parameter(base * math.sqrt(variance) * gain)


_DEFAULT = Initialisation()


def _cast(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(like.dtype)


class Linear(nn.Module):
    """``x W' + b``, computed in the dtype of ``x`` even inside autocast.

    All linear layers of these networks lie on the path of the noise level and the class, where a
    half-precision product would blur sigma; they cost nothing next to the convolutions.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init: Initialisation = _DEFAULT,
    ) -> None:
        super().__init__()
        fans = (in_features, out_features)
        self.weight = init.draw([out_features, in_features], *fans, init.weight_gain)
        self.bias = init.draw([out_features], *fans, init.bias_gain) if bias else None

    def forward(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.weight.to(x.dtype), _cast(self.bias, x))


class GroupNorm(nn.Module):
    """Group normalisation over ``min(32, channels // 4)`` groups, with scale and shift."""

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups = min(32, num_channels // 4)
        self.eps = eps
        if self.num_groups == 0 or num_channels % self.num_groups:
            raise ConfigError(
                f"group norm over {num_channels} channels: needs at least 4, divisible by "
                f"min(32, channels // 4) = {self.num_groups}"
            )
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return F.group_norm(
            x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


def resampling_filter(taps: Sequence[int | float]) -> Float[Tensor, "1 1 l l"]:
    """Separable 2-D filter that sums to 1, from its 1-D ``taps``, in float32."""
    row = torch.tensor(list(taps), dtype=torch.float32)
    return (row.outer(row) / row.sum().square())[None, None]


class Conv2d(nn.Module):
    """Convolution with optional doubling or halving of height and width.

    Args:
        kernel: Odd size, or 0 for resampling alone (no parameters).
        up: Double first, then convolve.
        down: Halve first, then convolve.
        resample_filter: 1-D taps; [1, 1] is nearest-neighbour doubling and 2x2 averaging.
        fused_resample: Convolve and resample as one operation (``down``: convolution *before*
            decimation, which gives other values than halving first).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[int | float] = (1, 1),
        fused_resample: bool = False,
        init: Initialisation = _DEFAULT,
    ) -> None:
        super().__init__()
        if (up and down) or (kernel and kernel % 2 == 0) or kernel < 0:
            raise ConfigError("convolution: up excludes down, and the kernel must be odd or 0")
        if not kernel and in_channels != out_channels:
            raise ConfigError("convolution without kernel cannot change the number of channels")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused_resample = up, down, fused_resample
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            fans = (in_channels * kernel**2, out_channels * kernel**2)
            shape = [out_channels, in_channels, kernel, kernel]
            self.weight = init.draw(shape, *fans, init.weight_gain)
            self.bias = init.draw([out_channels], *fans, init.bias_gain) if bias else None
        taps = list(resample_filter)
        self.resample_filter: Tensor | None
        self.register_buffer("resample_filter", resampling_filter(taps) if up or down else None)
        # Decided from the constructor's taps so that the forward pass never looks at data.
        self._is_box = taps in ([1, 1], [1.0, 1.0])
        self._conv_padding = kernel // 2
        self._filter_padding = (len(taps) - 1) // 2

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        conv_padding, filter_padding = self._conv_padding, self._filter_padding
        fused = self.fused_resample and self.weight is not None
        if self.up and fused:
            x = self._double(x, max(filter_padding - conv_padding, 0))
            return self._convolve(x, max(conv_padding - filter_padding, 0))
        if self.down and fused:
            return self._add_bias(
                self._halve(self._convolve(x, conv_padding + filter_padding, bias=False), 0)
            )
        if self.up:
            x = self._double(x, filter_padding)
        if self.down:
            x = self._halve(x, filter_padding)
        return self._convolve(x, conv_padding)

    def _convolve(self, x: Tensor, padding: int, bias: bool = True) -> Tensor:
        if self.weight is None:
            return x
        return F.conv2d(
            x, self.weight.to(x.dtype), _cast(self.bias, x) if bias else None, padding=padding
        )

    def _add_bias(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + self.bias.to(x.dtype).reshape(1, -1, 1, 1)

    def _double(self, x: Tensor, padding: int) -> Tensor:
        if self._is_box:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        channels = x.shape[1]
        assert self.resample_filter is not None
        kernel = (4 * self.resample_filter).to(x.dtype).repeat(channels, 1, 1, 1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=padding, groups=channels)

    def _halve(self, x: Tensor, padding: int) -> Tensor:
        if self._is_box:
            return F.avg_pool2d(x, 2)
        channels = x.shape[1]
        assert self.resample_filter is not None
        kernel = self.resample_filter.to(x.dtype).repeat(channels, 1, 1, 1)
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)


class PositionalEmbedding(nn.Module):
    """``[cos(x f), sin(x f)]`` of scalars ``x``, frequencies from 1 down to ``1 / max_positions``."""

    def __init__(
        self, num_channels: int, max_positions: int = 10000, endpoint: bool = False
    ) -> None:
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = num_channels, max_positions, endpoint

    def forward(self, x: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        half = self.num_channels // 2
        steps = torch.arange(half, dtype=x.dtype, device=x.device)
        # A power, not the exponential of a logarithm: phases reach 1000, and the last bit of a
        # frequency then shows in the image.
        frequencies = (1 / self.max_positions) ** (steps / (half - self.endpoint))
        phases = x[:, None] * frequencies
        return torch.cat([phases.cos(), phases.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """``[cos(x g), sin(x g)]`` of scalars ``x`` with fixed random ``g ~ 2 pi Normal(0, scale^2)``."""

    freqs: Tensor

    def __init__(self, num_channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        phases = x[:, None] * (2 * math.pi * self.freqs).to(x.dtype)
        return torch.cat([phases.cos(), phases.sin()], dim=1)
