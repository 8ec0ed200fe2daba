"""Augmentation and normalisation of image batches against slow, obvious versions."""

import pytest
import torch
from torch.nn import functional as F

from diffcal.calibration.image_batches import (
    augment_images,
    channel_statistics,
    draw_augmentation,
)
from diffcal.calibration.training_config import AugmentationConfig
from diffcal.errors import ConfigError, DataError
from diffcal.models.classifier import normalise


def batch(n=6, h=5, w=7, c=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, h, w, c), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("padding", ["black", "reflect"])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_and_flips_one_by_one(padding, channels):
    images = batch(c=channels)
    config = AugmentationConfig(crop_padding=2, padding=padding)
    draws = draw_augmentation(6, config, torch.Generator().manual_seed(1))
    assert draws.flip.any()
    assert not draws.flip.all()
    result = augment_images(images, config, draws)
    for i, image in enumerate(images):
        mode = "constant" if padding == "black" else "reflect"
        padded = F.pad(image.permute(2, 0, 1)[None].float(), (2, 2, 2, 2), mode=mode)[0]
        top, left = int(draws.top[i]), int(draws.left[i])
        crop = padded[:, top : top + 5, left : left + 7]
        expected = (crop.flip(2) if draws.flip[i] else crop).permute(1, 2, 0).to(torch.uint8)
        torch.testing.assert_close(result[i], expected, rtol=0, atol=0)
    half = augment_images(images[3:], config, draws.part(slice(3, 6)))
    torch.testing.assert_close(half, result[3:], rtol=0, atol=0)


def test_draws_cover_all_crops_and_off_is_off():
    config = AugmentationConfig(crop_padding=1, flip=False)
    draws = draw_augmentation(500, config, torch.Generator().manual_seed(0))
    assert (draws.top.unique().tolist(), draws.left.unique().tolist()) == ([0, 1, 2], [0, 1, 2])
    assert not draws.flip.any()
    off = AugmentationConfig(crop_padding=0, flip=False)
    images = batch()
    same = augment_images(images, off, draw_augmentation(6, off, torch.Generator()))
    torch.testing.assert_close(same, images, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="crop_padding"):
        AugmentationConfig(crop_padding=-1)


def test_statistics_and_normalisation():
    images = batch(n=40)
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    torch.testing.assert_close(mean.double(), scaled.mean(dim=(0, 1, 2)), rtol=1e-6, atol=0)
    exact = scaled.reshape(-1, 3).std(dim=0, correction=0)
    torch.testing.assert_close(std.double(), exact, rtol=1e-6, atol=0)
    x = normalise(images, mean, std)
    assert x.shape == (40, 3, 5, 7)
    assert x.is_contiguous(memory_format=torch.channels_last)
    expected = ((scaled - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-6)
    black = torch.zeros(2, 4, 4, 1, dtype=torch.uint8)
    assert normalise(black, *channel_statistics(black)).abs().max() == 0
    with pytest.raises(DataError, match="no training images"):
        channel_statistics(black[:0])
