"""Small convolutional networks that train on a CPU in seconds to minutes."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffcal.models.resnet import initialise

__all__ = ["SmallCnn"]


class SmallCnn(nn.Module):
    """Stages of two 3x3 convolutions with BatchNorm, halved by max-pooling in between.

    Images above 16 pixels are halved at once by a strided first convolution, which keeps the
    expensive full resolution out of the network: 8x8 digits and 32x32 photographs both train fast.

    Args:
        widths: Channels of each stage; stages stop early where less than 2 pixels would be left.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        size = image_size
        layers: list[nn.Module] = []
        channels = in_channels
        for index, width in enumerate(widths):
            stride = 2 if index == 0 and image_size > 16 else 1
            if index > 0:
                if size < 4:
                    break
                layers.append(nn.MaxPool2d(2))
                size //= 2
            layers += _convolution(channels, width, stride) + _convolution(width, width, 1)
            size = -(-size // stride)
            channels = width
        self.stages = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Penultimate features: the largest value of each channel of the last feature map."""
        return F.adaptive_max_pool2d(self.stages(x), 1).flatten(1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits of normalised images."""
        return self.fc(self.forward_features(x))


def _convolution(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
