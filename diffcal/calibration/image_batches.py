"""uint8 images to augmented, normalised network input, a whole batch at once."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from diffcal.calibration.training_config import AugmentationConfig
from diffcal.errors import DataError

__all__ = ["AugmentationDraws", "augment_images", "channel_statistics", "draw_augmentation"]


@dataclass(frozen=True)
class AugmentationDraws:
    """Where each image of a batch is cropped and whether it is mirrored."""

    top: Int[Tensor, " b"]
    left: Int[Tensor, " b"]
    flip: Bool[Tensor, " b"]

    def part(self, rows: slice | Int[Tensor, " m"]) -> "AugmentationDraws":
        """The draws of some of the images."""
        return AugmentationDraws(self.top[rows], self.left[rows], self.flip[rows])


def draw_augmentation(
    count: int, config: AugmentationConfig, generator: torch.Generator
) -> AugmentationDraws:
    """Draws for ``count`` images, uniform over the ``(2 padding + 1)^2`` crops."""
    places = 2 * config.crop_padding + 1
    return AugmentationDraws(
        top=torch.randint(places, (count,), generator=generator),
        left=torch.randint(places, (count,), generator=generator),
        flip=(torch.rand(count, generator=generator) < 0.5) & config.flip,
    )


def augment_images(
    images: UInt8[Tensor, "b h w c"], config: AugmentationConfig, draws: AugmentationDraws
) -> UInt8[Tensor, "b h w c"]:
    """Cropped and mirrored images of the same size."""
    count, height, width, channels = images.shape
    pad = config.crop_padding
    if pad == 0 and not config.flip:
        return images
    if pad and config.padding == "reflect":
        moved = images.permute(0, 3, 1, 2).float()  # reflection exists for floating tensors only
        padded = F.pad(moved, (pad, pad, pad, pad), mode="reflect").to(torch.uint8)
        images = padded.permute(0, 2, 3, 1).contiguous()
    elif pad:
        images = F.pad(images, (0, 0, pad, pad, pad, pad))
    device = images.device
    top, left, flip = (t.to(device) for t in (draws.top, draws.left, draws.flip))
    columns = torch.arange(width, device=device).expand(count, width)
    columns = torch.where(flip[:, None], columns.flip(1), columns) + left[:, None]
    rows = torch.arange(height, device=device) + top[:, None]
    whole_width = width + 2 * pad
    pixel = rows[:, :, None] * whole_width + columns[:, None, :]
    pixel = pixel + torch.arange(count, device=device)[:, None, None] * (
        whole_width * (height + 2 * pad)
    )
    flat = images.reshape(-1, channels).index_select(0, pixel.reshape(-1))
    return flat.reshape(count, height, width, channels)


def channel_statistics(
    images: UInt8[Tensor, "n h w c"],
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Mean and standard deviation of each channel, pixels in [0, 1], float32.

    Raises:
        DataError: there are no images.
    """
    if images.numel() == 0:
        raise DataError("there are no training images")
    channels = images.shape[-1]
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(channels):
        # exact in integers, and without a float copy of the data set
        counts = torch.bincount(images[..., channel].reshape(-1), minlength=256).double()
        share = counts / counts.sum()
        mean = (share * levels).sum()
        means.append(mean)
        stds.append((share * (levels - mean).square()).sum().sqrt())
    # a constant channel is only centred
    return torch.stack(means).float(), torch.stack([s if s > 0 else s + 1 for s in stds]).float()
