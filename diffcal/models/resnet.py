"""Residual networks for small images: the thin CIFAR family and the wide ImageNet family."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "ThinResNet", "initialise", "thin_blocks"]

Block = Callable[[int, int, int], nn.Module]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Args:
        in_channels: Channels that come in.
        channels: Channels of the block; the output has ``channels * expansion``.
        stride: Stride of the first convolution and of the shortcut.
        projection: Where the shape changes: a 1x1 convolution with BatchNorm (option B of He et al.
            2016), or without parameters, subsampling and zero channels (option A).
    """

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int, projection: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride, projection)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d u v"]:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions beside a shortcut; four times ``channels`` come out."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride, True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d u v"]:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """ResNet-18, 34, 50, 101 with a stem that fits the image size.

    Up to 47 pixels: one 3x3 convolution, so that the four stages see full, 1/2, 1/4, 1/8 resolution.
    48 to 95 pixels: the same with stride 2, so that a 64-pixel image costs what a 32-pixel one does.
    From 96 pixels: the 7x7 stem with max-pooling of the ImageNet networks.

    Source: He et al. 2016 (arXiv:1512.03385), table 1.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        large = image_size >= 96
        self.conv1 = (
            nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
            if large
            else nn.Conv2d(in_channels, 64, 3, 2 if image_size >= 48 else 1, 1, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        stages: list[nn.Module] = []
        width = 64
        for index, count in enumerate(layers):
            channels = 64 * 2**index
            stages.append(stage(block, width, channels, count, 1 if index == 0 else 2))
            width = channels * block.expansion
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Penultimate features: the globally averaged last feature map."""
        x = self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return self.stages(x).mean(dim=(2, 3))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits of normalised images."""
        return self.fc(self.forward_features(x))


class ThinResNet(nn.Module):
    """ResNet-8, 20, 32, 44, 56, 110: three stages of 16, 32, 64 channels.

    Args:
        blocks: Residual blocks per stage; depth is ``6 * blocks + 2``.
        width: Multiplier of the stages' channels. With 10 and 4 blocks this is the "WRN-26-10" of
            the calibration literature, which is not a Wide ResNet of Zagoruyko and Komodakis
            (their depths are 6 n + 4): it has the original blocks, activation last.
        projection: Shortcuts with a 1x1 convolution where the shape changes, or (the paper's CIFAR
            networks) without parameters.

    Source: He et al. 2016 (arXiv:1512.03385), section 4.2.
    """

    def __init__(
        self,
        blocks: int,
        *,
        num_classes: int,
        in_channels: int = 3,
        width: int = 1,
        projection: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)

        def block(in_channels: int, channels: int, stride: int) -> BasicBlock:
            return BasicBlock(in_channels, channels, stride, projection)

        widths = (16, 16 * width, 32 * width, 64 * width)
        self.stages = nn.Sequential(*thin_blocks(block, blocks, widths))
        self.fc = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Penultimate features: the globally averaged last feature map."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.stages(x).mean(dim=(2, 3))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits of normalised images."""
        return self.fc(self.forward_features(x))


def stage(block: Block, in_channels: int, channels: int, count: int, stride: int) -> nn.Sequential:
    """``count`` blocks, the first of which changes resolution and width."""
    expansion = getattr(block, "expansion", 1)
    blocks = [block(in_channels, channels, stride)]
    blocks += [block(channels * expansion, channels, 1) for _ in range(count - 1)]
    return nn.Sequential(*blocks)


def thin_blocks(block: Block, count: int, widths: Sequence[int]) -> list[nn.Module]:
    """Stages of ``count`` blocks from ``widths[0]`` through ``widths[1:]``, halving between stages."""
    return [
        stage(block, before, after, count, 1 if index == 0 else 2)
        for index, (before, after) in enumerate(pairwise(widths))
    ]


def initialise(model: nn.Module) -> None:
    """He initialisation of convolutions (fan out); BatchNorm at 1 and 0; linear layers with bias 0.

    Source: He et al. 2015 (arXiv:1502.01852).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class _PaddedSubsampling(nn.Module):
    """Every ``stride``-th pixel, with zero channels added on both sides."""

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        padded = F.pad(x, (0, 0, 0, 0, before, self.extra_channels - before))
        return padded.contiguous(memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    # strides, because a slice is contiguous in neither format
    return torch.channels_last if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format


def _shortcut(in_channels: int, out_channels: int, stride: int, projection: bool) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if not projection:
        return _PaddedSubsampling(out_channels - in_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )
