"""Dense random projections, drawn in blocks: the matrix never exists as a whole."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from diffcal.attribution.counter_hash import hash_bits, hash_keys
from diffcal.attribution.projection import Projector
from diffcal.core.rng import item_generator

__all__ = ["GaussianProjection", "RademacherProjection"]

TILE = (
    256  # coordinates that are drawn together: part of the format, other tiles draw other numbers
)
KEPT_BYTES = 64 << 20  # tiles stay in memory up to this much, which spares tiny models the drawing


class DenseProjection(Projector):
    """Independent entries of mean 0 and variance 1/dim: squared norms are kept in mean.

    With ``unit_variance`` entries have variance 1. Drawing the matrix costs more than applying it to
    a few gradients, and it is drawn again for every batch: prefer an SJLT, or take large batches.

    Source: Johnson and Lindenstrauss 1984; Achlioptas 2003 for random signs. The relative variance
    of a squared norm is 2/dim (Gaussian), below it for signs.
    """

    def __init__(
        self, num_params: int, dim: int, seed: int = 0, *, unit_variance: bool = False
    ) -> None:
        self.num_params, self.dim, self.seed = num_params, dim, seed
        self.scale = 1.0 if unit_variance else 1 / math.sqrt(dim)
        self._kept: dict[tuple[int, str], Tensor] = {}

    def _add(self, out: Tensor, block: Tensor, offset: int) -> None:
        stop = offset + block.shape[1]
        for tile in range(offset // TILE, (stop - 1) // TILE + 1):
            first = tile * TILE
            low, high = max(first, offset), min(first + TILE, stop)
            matrix = self._tile(tile, block.device)[low - first : high - first]
            piece = block[:, low - offset : high - offset]
            out.addmm_(piece, matrix.to(out.dtype), alpha=self.scale)

    def _tile(self, tile: int, device: torch.device) -> Tensor:
        key = (tile, str(device))
        matrix = self._kept.get(key)
        if matrix is None:
            matrix = self._draw(tile, device)
            if (len(self._kept) + 1) * TILE * self.dim * 4 <= KEPT_BYTES:
                self._kept[key] = matrix
        return matrix

    @abstractmethod
    def _draw(self, tile: int, device: torch.device) -> Tensor:
        """Rows ``tile * TILE ..`` of the unscaled matrix, float32 ``[TILE, dim]``."""


class GaussianProjection(DenseProjection):
    """Normal entries, drawn on the CPU tile by tile, so that devices agree."""

    def _draw(self, tile: int, device: torch.device) -> Tensor:
        generator = item_generator(self.seed, "projection-gaussian", tile)
        return torch.randn(TILE, self.dim, generator=generator).to(device)


class RademacherProjection(DenseProjection):
    """Random signs, hashed on the device of the gradients: exact everywhere, no transfer.

    Bit j of the hash of counter ``coordinate · ceil(dim / 32) + w`` decides column 32 w + j.
    """

    def _draw(self, tile: int, device: torch.device) -> Tensor:
        words = -(-self.dim // 32)
        keys = hash_keys(self.seed, "projection-rademacher")
        start = tile * TILE * words
        counters = torch.arange(start, start + TILE * words, device=device)
        bits = hash_bits(counters, keys).view(-1, 1)
        # Eight signs at a time from a table, which is several times faster than single bits.
        octets = (bits >> torch.arange(0, 32, 8, device=device)) & 255
        place = torch.arange(8, device=device)
        table = ((torch.arange(256, device=device)[:, None] >> place) & 1).float() * 2 - 1
        signs = table.index_select(0, octets.flatten())
        return signs.view(TILE, words * 32)[:, : self.dim]
