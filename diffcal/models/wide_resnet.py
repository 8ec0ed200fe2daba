"""Wide residual networks (pre-activation blocks)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffcal.errors import ConfigError
from diffcal.models.resnet import initialise, thin_blocks

__all__ = ["WideResNet"]


class WideBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice; the shortcut starts after the first activation where
    the shape changes."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        changes = stride != 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d u v"]:
        out = F.relu(self.bn1(x), inplace=True)
        kept = x if self.shortcut is None else self.shortcut(out)
        out = self.dropout(F.relu(self.bn2(self.conv1(out)), inplace=True))
        return self.conv2(out) + kept


class WideResNet(nn.Module):
    """WRN-``depth``-``width``: three stages of 16, 32, 64 times ``width`` channels.

    Raises:
        ConfigError: depth is not 6 n + 4.

    Source: Zagoruyko and Komodakis 2016 (arXiv:1605.07146).
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        num_classes: int,
        in_channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ConfigError(f"depth of a wide ResNet must be 6 n + 4 (10, 16, ...), got {depth}")
        widths = (16, 16 * width, 32 * width, 64 * width)

        def block(in_channels: int, channels: int, stride: int) -> WideBlock:
            return WideBlock(in_channels, channels, stride, dropout)

        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.stages = nn.Sequential(*thin_blocks(block, (depth - 4) // 6, widths))
        self.bn = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Penultimate features: the globally averaged last feature map."""
        x = self.stages(self.conv1(x))
        return F.relu(self.bn(x), inplace=True).mean(dim=(2, 3))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits of normalised images."""
        return self.fc(self.forward_features(x))
