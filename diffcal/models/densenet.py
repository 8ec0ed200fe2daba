"""DenseNet-121 with a stem for small images."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffcal.models.resnet import initialise

__all__ = ["DenseNet"]


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution to four times the growth, the same with 3x3 to the growth;
    the result is put before what came in."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return torch.cat([out, x], dim=1)


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution, 2x2 average."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d u v"]:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x), inplace=True)), 2)


class DenseNet(nn.Module):
    """Dense blocks of ``layers`` with growth rate ``growth``, halving channels in between.

    The stem is one 3x3 convolution, with stride 2 from 48 pixels on. The defaults are DenseNet-121.

    Source: Huang et al. 2017 (arXiv:1608.06993), DenseNet-BC.
    """

    def __init__(
        self,
        layers: Sequence[int] = (6, 12, 24, 16),
        growth: int = 32,
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        channels = 2 * growth
        stem_stride = 2 if image_size >= 48 else 1
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stem_stride, 1, bias=False)
        stages: list[nn.Module] = []
        for index, count in enumerate(layers):
            for _ in range(count):
                stages.append(DenseLayer(channels, growth))
                channels += growth
            if index < len(layers) - 1:
                stages.append(Transition(channels, channels // 2))
                channels //= 2
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Penultimate features: the globally averaged last feature map."""
        x = self.stages(self.conv1(x))
        return F.relu(self.bn(x), inplace=True).mean(dim=(2, 3))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits of normalised images."""
        return self.fc(self.forward_features(x))
