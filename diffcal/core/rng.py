"""Randomness that belongs to items: (seed, stream, index) decides every draw."""

import hashlib

import torch
from torch import Tensor

__all__ = ["item_generator", "item_normal", "item_seed", "item_signs"]


def item_seed(seed: int, stream: str, index: int) -> int:
    """63-bit seed of one item, independent of batch size, process count and order.

    The first 8 bytes, little endian, of the SHA-256 of ``diffcal-csm/v1|seed|index|stream``, top
    bit cleared. The string is part of the format: changing it changes every generated data set.
    """
    text = f"diffcal-csm/v1|{seed}|{index}|{stream}"
    digest = hashlib.sha256(text.encode("ascii")).digest()
    return int.from_bytes(digest[:8], "little") & (2**63 - 1)


def item_generator(seed: int, stream: str, index: int) -> torch.Generator:
    """CPU generator of one item. Draw on the CPU in float32 and move: devices then agree."""
    return torch.Generator("cpu").manual_seed(item_seed(seed, stream, index))


def item_normal(seed: int, stream: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 CPU tensor of ``shape`` drawn by the item's own generator."""
    return torch.randn(shape, generator=item_generator(seed, stream, index))


def item_signs(seed: int, stream: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """Fair signs, float32 CPU tensor of +1 and -1 of ``shape``, drawn by the item's own generator."""
    bits = torch.randint(0, 2, shape, generator=item_generator(seed, stream, index))
    return bits.float().mul_(2).sub_(1)
