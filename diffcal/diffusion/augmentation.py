"""Non-leaky augmentation: the network is told what was done, so samples stay clean."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffcal.errors import ConfigError

__all__ = ["AUGMENT_LABELS", "AugmentConfig", "augment"]

AUGMENT_LABELS = 9
"""Length of the augmentation label: xflip 1, yflip 1, scale 1, rotation 2, anisotropy 2, shift 2."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Geometric augmentations, each applied to an image with ``probability``.

    Defaults follow Karras et al. 2022 (arXiv:2206.00364), appendix F.2: one switch per kind,
    strengths in powers of two (scale, anisotropy), turns (rotation) and image widths (shift).
    """

    probability: float = 0.12
    xflip: bool = True
    yflip: bool = False
    scale: bool = True
    rotate: bool = True
    anisotropy: bool = True
    translate: bool = True
    scale_std: float = 0.2
    anisotropy_std: float = 0.2
    translate_std: float = 0.125

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"augment.probability must lie in [0, 1], got {self.probability}")


def augment(
    x: Float[Tensor, "b c h w"], config: AugmentConfig, generator: torch.Generator
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b l"]]:
    """Randomly transformed images and the labels that describe the transformation.

    Draws come from ``generator`` on the CPU, a fixed number per image whatever is switched on.
    Images are resampled once, bilinearly, with mirrored borders.

    Returns:
        Images, and labels [b, 9] that are all zero for an image left alone.
    """
    count = x.shape[0]
    hit = (torch.rand(count, 6, generator=generator) < config.probability).double()
    draws = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    turns = torch.rand(count, 3, generator=generator, dtype=torch.float64) * 2 - 1

    xflip = hit[:, 0] * config.xflip * (turns[:, 2] < 0)
    yflip = hit[:, 1] * config.yflip * (turns[:, 2].abs() < 0.5)
    scale = hit[:, 2] * config.scale * draws[:, 0] * config.scale_std
    angle = hit[:, 3] * config.rotate * turns[:, 0] * math.pi
    squeeze = hit[:, 4] * config.anisotropy * draws[:, 1] * config.anisotropy_std
    squeeze_angle = turns[:, 1] * math.pi
    shift = hit[:, 5:6] * config.translate * draws[:, 2:4] * config.translate_std

    labels = torch.stack(
        [
            xflip,
            yflip,
            scale,
            angle.cos() - 1,
            angle.sin(),
            squeeze * squeeze_angle.cos(),
            squeeze * squeeze_angle.sin(),
            shift[:, 0],
            shift[:, 1],
        ],
        dim=1,
    )
    # Matrix from output to input coordinates in [-1, 1]; square images make turns exact.
    flips = torch.diag_embed(torch.stack([1 - 2 * xflip, 1 - 2 * yflip], dim=1))
    matrix = flips @ torch.diag_embed(torch.exp2(-scale)[:, None].expand(count, 2)) @ _turn(-angle)
    stretch = torch.diag_embed(torch.exp2(torch.stack([-squeeze, squeeze], dim=1)))
    matrix = matrix @ _turn(squeeze_angle) @ stretch @ _turn(-squeeze_angle)
    offset = -(matrix @ (2 * shift)[:, :, None])
    theta = torch.cat([matrix, offset], dim=2).to(device=x.device, dtype=x.dtype)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    labels = labels.to(device=x.device, dtype=x.dtype)
    untouched = (labels == 0).all(dim=1)
    return torch.where(untouched[:, None, None, None], x, moved), labels


def _turn(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=-2)
