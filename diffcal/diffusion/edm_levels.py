"""The levels of both raw networks: blocks down to the coarsest resolution, and up again.

Layers are made in the order in which they run, since fresh weights come from one random stream, and
carry the names of the published checkpoints.
"""

from collections.abc import Callable, Sequence

from torch import nn

from diffcal.diffusion.edm_block import UNetBlock
from diffcal.diffusion.edm_layers import Conv2d

__all__ = ["Beside", "MakeBlock", "decoder_levels", "encoder_levels"]

MakeBlock = Callable[..., UNetBlock]
"""(channels in, channels out, and ``up``, ``down`` or ``attention``) to a fresh block."""
Beside = Callable[[nn.ModuleDict, int, str, int], None]
"""Adds what a network has beside the blocks of a level, to (layers, level, resolution, channels)."""


def _name(resolution: int) -> str:
    return f"{resolution}x{resolution}"


def encoder_levels(
    first: Conv2d,
    block: MakeBlock,
    widths: Sequence[int],
    num_blocks: int,
    resolutions: Sequence[int],
    attn_resolutions: Sequence[int],
    beside: Beside | None = None,
) -> nn.ModuleDict:
    """Layers from the image down, by name.

    Args:
        first: The convolution that reads the image.
        block: Makes a block.
        widths: Channels of each level, finest first.
        num_blocks: Blocks of a level.
        resolutions: Height and width at each level.
        attn_resolutions: Those whose blocks attend.
        beside: Called after the block that halves the resolution.
    """
    layers = nn.ModuleDict()
    channels = first.out_channels
    for level, (width, resolution) in enumerate(zip(widths, resolutions, strict=True)):
        r = _name(resolution)
        if level == 0:
            layers[f"{r}_conv"] = first
        else:
            layers[f"{r}_down"] = block(channels, channels, down=True)
            if beside is not None:
                beside(layers, level, r, channels)
        for index in range(num_blocks):
            attends = resolution in attn_resolutions
            layers[f"{r}_block{index}"] = block(channels, width, attention=attends)
            channels = width
    return layers


def decoder_levels(
    encoder: nn.ModuleDict,
    block: MakeBlock,
    widths: Sequence[int],
    num_blocks: int,
    resolutions: Sequence[int],
    attn_resolutions: Sequence[int],
    only_last_attends: bool = False,
    beside: Beside | None = None,
) -> nn.ModuleDict:
    """Layers from the coarsest level up, each block but the first ones after a skip of the encoder.

    Args:
        encoder: Of :func:`encoder_levels`, made with the same arguments.
        only_last_attends: Attention in the last block of a level rather than in all.
        beside: Called after the blocks of each level.
    """
    layers = nn.ModuleDict()
    skips = _skip_channels(encoder)
    channels = skips[-1]
    for level in reversed(range(len(widths))):
        r = _name(resolutions[level])
        if level == len(widths) - 1:
            layers[f"{r}_in0"] = block(channels, channels, attention=True)
            layers[f"{r}_in1"] = block(channels, channels)
        else:
            layers[f"{r}_up"] = block(channels, channels, up=True)
        for index in range(num_blocks + 1):
            may_attend = index == num_blocks or not only_last_attends
            attends = may_attend and resolutions[level] in attn_resolutions
            layers[f"{r}_block{index}"] = block(
                channels + skips.pop(), widths[level], attention=attends
            )
            channels = widths[level]
        if beside is not None:
            beside(layers, level, r, channels)
    return layers


def _skip_channels(encoder: nn.ModuleDict) -> list[int]:
    """Channels of the skips that an encoder leaves, in order."""
    return [int(layer.out_channels) for name, layer in encoder.items() if "_aux_" not in name]  # type: ignore[arg-type]
