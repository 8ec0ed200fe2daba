"""Random bits of a counter, the same on every device: integers only, no state."""

from jaxtyping import Int64
from torch import Tensor

from diffcal.core.rng import item_seed

__all__ = ["hash_bits", "hash_keys"]

MASK = 0xFFFFFFFF
# Multipliers below 2^31, so that a product with 32 bits never overflows a signed 64-bit integer.
FIRST, SECOND = 0x21F0AAAD, 0x735A2D97


def hash_keys(seed: int, stream: str, index: int = 0) -> tuple[int, int]:
    """Two 32-bit keys of a stream for :func:`hash_bits`."""
    value = item_seed(seed, stream, index)
    return value & MASK, value >> 32


def hash_bits(counters: Int64[Tensor, "*n"], keys: tuple[int, int]) -> Int64[Tensor, "*n"]:
    """32 random bits of every non-negative counter, as an integer in [0, 2^32).

    The low and the high half of the counter each pass two rounds of xor, shift and multiply with a
    key. Exact integer arithmetic: CPU and GPU agree bit for bit.
    """
    value = _mix((counters & MASK) ^ keys[0])
    value ^= (counters >> 32) ^ keys[1]
    return _mix(value)


def _mix(value: Tensor) -> Tensor:
    value = value ^ (value >> 16)
    value.mul_(FIRST).bitwise_and_(MASK)
    value ^= value >> 15
    value.mul_(SECOND).bitwise_and_(MASK)
    value ^= value >> 15
    return value
