"""The sparse Johnson–Lindenstrauss transform: every coordinate is added to a few buckets."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcal.attribution.counter_hash import hash_bits, hash_keys
from diffcal.attribution.projection import Projector
from diffcal.errors import ConfigError

__all__ = ["SJLT", "bucket_sums"]

TILE = 1 << 18  # coordinates whose buckets are hashed together; values do not depend on it
PIECE = 1 << 15  # on a CPU, hashing runs in pieces that stay in cache
KEPT_COORDINATES = 1 << 28  # buckets stay in memory (4 bytes a coordinate) up to this many


class SJLT(Projector):
    """Coordinate j is added with a random sign to one random bucket in each of ``nonzeros`` groups.

    Divided by sqrt(nonzeros), squared norms are kept in mean, with relative variance below 2/dim.
    Buckets and signs are hashes of (seed, group, j): the same on every device; where a GPU adds in
    parallel only the last bits of a sum vary. About 1.3 ns an entry on one CPU core, where a dense
    projection of four gradients to 4,096 numbers takes 2,000 (signs) to 6,000 (normal)
    (``benchmarks/attribution_projection.json``).

    Source: Kane and Nelson 2014 (arXiv:1012.1577), the block construction; ``nonzeros=1`` is the
    count sketch of Charikar et al. 2002. Used for attribution by GraSS (arXiv:2505.18976).

    Raises:
        ConfigError: ``dim`` is not a multiple of ``nonzeros``.
    """

    def __init__(self, num_params: int, dim: int, seed: int = 0, *, nonzeros: int = 1) -> None:
        if dim % nonzeros:
            raise ConfigError(f"dim {dim} must be a multiple of nonzeros {nonzeros}")
        self.num_params, self.dim, self.seed, self.nonzeros = num_params, dim, seed, nonzeros
        self._keep = num_params * nonzeros <= KEPT_COORDINATES
        self._kept: dict[tuple[int, int, str], Tensor] = {}

    def buckets(
        self, start: int, stop: int, group: int = 0, device: torch.device | str = "cpu"
    ) -> Int[Tensor, " m"]:
        """Bucket of each coordinate in ``start .. stop``, int32: below ``dim`` with a plus sign,
        ``dim`` more with a minus sign."""
        width = self.dim // self.nonzeros
        keys = hash_keys(self.seed, "projection-sjlt", group)
        # Small pieces stay in a CPU's cache; a GPU would spend its time on starting them.
        size = PIECE if torch.device(device).type == "cpu" else TILE
        pieces = []
        for first in range(start, stop, size):
            counters = torch.arange(first, min(first + size, stop), device=device)
            # The product with 2·width takes bucket and sign from the leading bits, without bias.
            slot = (hash_bits(counters, keys) * (2 * width)) >> 32
            slot = torch.where(slot < width, slot, slot + (self.dim - width))
            pieces.append((slot + group * width).to(torch.int32))
        return torch.cat(pieces)

    def _add(self, out: Tensor, block: Tensor, offset: int) -> None:
        stop = offset + block.shape[1]
        for tile in range(offset // TILE, (stop - 1) // TILE + 1):
            first = tile * TILE
            low, high = max(first, offset), min(first + TILE, stop)
            piece = block[:, low - offset : high - offset]
            for group in range(self.nonzeros):
                slots = self._tile(tile, group, block.device)[low - first : high - first]
                sums = bucket_sums(piece, slots, self.dim)
                out.add_(sums, alpha=1 / math.sqrt(self.nonzeros))

    def _tile(self, tile: int, group: int, device: torch.device) -> Tensor:
        key = (tile, group, str(device))
        slots = self._kept.get(key)
        if slots is None:
            start = tile * TILE
            slots = self.buckets(start, min(start + TILE, self.num_params), group, device)
            if self._keep:
                self._kept[key] = slots
        return slots


def bucket_sums(
    block: Float[Tensor, "b m"], slots: Int[Tensor, " m"], dim: int
) -> Float[Tensor, "b {dim}"]:
    """Signed sums: column j goes to bucket ``slots[j]``, or minus it to ``slots[j] - dim``.

    Twice as many buckets instead of a multiplication by signs saves one pass over the block.
    """
    wide = torch.zeros(len(block), 2 * dim, dtype=block.dtype, device=block.device)
    wide.scatter_add_(1, slots.long().expand(len(block), -1), block)
    return wide[:, :dim] - wide[:, dim:]
