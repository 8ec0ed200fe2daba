"""Classifiers by name."""

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from diffcal.errors import ConfigError
from diffcal.models.densenet import DenseNet
from diffcal.models.resnet import BasicBlock, Bottleneck, ResNet, ThinResNet
from diffcal.models.tiny import SmallCnn
from diffcal.models.wide_resnet import WideResNet

__all__ = ["CLASSIFIERS", "build_classifier"]

Builder = Callable[[int, int, int], nn.Module]
"""``(num_classes, in_channels, image_size) -> module``."""


def _thin(blocks: int) -> Builder:
    return lambda k, c, size: ThinResNet(blocks, num_classes=k, in_channels=c)


def _resnet(block: type[BasicBlock] | type[Bottleneck], *layers: int) -> Builder:
    return lambda k, c, size: ResNet(block, layers, num_classes=k, in_channels=c, image_size=size)


def _wide(depth: int, width: int) -> Builder:
    return lambda k, c, size: WideResNet(depth, width, num_classes=k, in_channels=c)


def _small(*widths: int) -> Builder:
    return lambda k, c, size: SmallCnn(widths, num_classes=k, in_channels=c, image_size=size)


CLASSIFIERS: Mapping[str, Builder] = MappingProxyType(
    {
        # seconds to minutes on a CPU
        "cnn-tiny": _small(16, 32, 64),
        "cnn-small": _small(32, 64, 128),
        "cnn-medium": _small(64, 128, 256),
        # thin networks for 32x32
        "resnet8": _thin(1),
        "resnet20": _thin(3),
        "resnet32": _thin(5),
        "resnet44": _thin(7),
        "resnet56": _thin(9),
        "resnet110": _thin(18),
        # wide networks
        "resnet18": _resnet(BasicBlock, 2, 2, 2, 2),
        "resnet34": _resnet(BasicBlock, 3, 4, 6, 3),
        "resnet50": _resnet(Bottleneck, 3, 4, 6, 3),
        "resnet101": _resnet(Bottleneck, 3, 4, 23, 3),
        "wrn-16-4": _wide(16, 4),
        "wrn-26-10": lambda k, c, size: ThinResNet(
            4, num_classes=k, in_channels=c, width=10, projection=True
        ),
        "wrn-28-10": _wide(28, 10),
        "densenet121": lambda k, c, size: DenseNet(num_classes=k, in_channels=c, image_size=size),
    }
)


def build_classifier(
    name: str, num_classes: int, in_channels: int = 3, image_size: int = 32
) -> nn.Module:
    """Freshly initialised network ``name`` (torch's global generator draws the weights).

    Every network maps normalised images ``[b, c, h, w]`` to logits ``[b, k]``, has its penultimate
    features in ``forward_features(x)`` ``[b, d]`` and its last linear layer under the name ``fc``.

    Raises:
        ConfigError: unknown name (near matches are listed), sizes below 1.
    """
    if name not in CLASSIFIERS:
        close = difflib.get_close_matches(name.lower(), list(CLASSIFIERS), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ConfigError(
            f"unknown classifier '{name}'; {hint or 'known: ' + ', '.join(CLASSIFIERS)}"
        )
    if num_classes < 2 or in_channels < 1 or image_size < 4:
        raise ConfigError(
            "a classifier needs at least 2 classes, 1 channel and 4x4 pixels, got "
            f"{num_classes} classes, {in_channels} channels, {image_size}x{image_size} pixels"
        )
    return CLASSIFIERS[name](num_classes, in_channels, image_size)
