"""Layer by layer, two small matrices around each weight gradient: L G Rᵀ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.projection import LocalProjector, overlap, parameter_slices
from diffcal.core.rng import item_generator

__all__ = ["FactorisedProjection", "LayerSketch", "orthonormal_factor"]


@dataclass(frozen=True)
class LayerSketch:
    """How one parameter is sketched.

    The parameter is seen as a matrix ``[rows, columns]``: its first axis against all others (for a
    convolution: output channels against input channels times kernel). A missing factor is the
    identity; vectors have neither. With ``taps`` the right factor mixes input channels alone and
    every kernel position keeps its own columns: the matrix is then ``right`` ⊗ identity.
    """

    start: int
    rows: int
    columns: int
    left: Float[Tensor, "k_left rows"] | None
    right: Float[Tensor, "k_right columns"] | None
    slot: int
    """First entry in the sketch; the layer's ``shape`` follows row by row."""
    taps: int = 1
    """Kernel positions that are kept apart."""

    @property
    def stop(self) -> int:
        """One past the last gradient coordinate of the parameter."""
        return self.start + self.rows * self.columns

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the sketch."""
        rows = self.rows if self.left is None else len(self.left)
        return rows, self.columns if self.right is None else len(self.right) * self.taps

    def apply(self, gradient: Float[Tensor, "b rows columns"]) -> Float[Tensor, "b k_left k_right"]:
        """``left @ gradient @ right.T`` of whole gradients."""
        out = self.mix_columns(gradient)
        return out if self.left is None else self.left.to(out) @ out

    def mix_columns(self, rows: Float[Tensor, "*b columns"]) -> Float[Tensor, "*b k_right_taps"]:
        """Rows of whole gradients times the right factor."""
        if self.right is None:
            return rows
        if self.taps == 1:
            return rows @ self.right.to(rows).mT
        return (self.right.to(rows) @ rows.unflatten(-1, (-1, self.taps))).flatten(-2)


class FactorisedProjection(LocalProjector):
    """The sketches of all parameters one after the other; ``dim`` follows from the shapes.

    Factors have orthonormal rows times sqrt(side / factor_dim), which keeps squared norms in mean.
    Sides up to ``factor_dim`` and all vectors (biases, normalisation weights) are kept whole. What
    sees a layer's input and output gradient applies ``right`` to the one and ``left`` to the other
    and never forms the gradient (``layers``).

    Of convolutions, ``right`` mixes input channels only, to ``2 factor_dim / taps`` of them, and the
    kernel's positions stay apart: about twice ``factor_dim`` columns, at the price of a product per
    position instead of another convolution.

    Source: LoGra (arXiv:2405.13954), section 3; orthonormal instead of normal factors, because the
    common scale error of a Kronecker sketch of nearly rank-one gradients is smaller. Convolutions
    are ours.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], factor_dim: int = 64, seed: int = 0
    ) -> None:
        layers, slot = [], 0
        for index, (shape, (start, stop)) in enumerate(
            zip(shapes, parameter_slices(shapes), strict=True)
        ):
            rows = shape[0] if shape else 1
            columns = (stop - start) // rows if rows else 0
            left = right = None
            taps = math.prod(shape[2:])
            if len(shape) > 1:
                left = orthonormal_factor(rows, factor_dim, seed, 2 * index)
                kept = factor_dim if taps == 1 else max(1, 2 * factor_dim // taps)
                right = orthonormal_factor(columns // taps, kept, seed, 2 * index + 1)
            layer = LayerSketch(start, rows, columns, left, right, slot, taps)
            layers.append(layer)
            slot += math.prod(layer.shape)
        self.layers = tuple(layers)
        self.num_params = layers[-1].stop if layers else 0
        self.dim = slot

    def touched(self, offset: int, stop: int) -> tuple[int, int]:
        """Entries of the layers that ``offset .. stop`` overlaps."""
        reached = [x for x in self.layers if overlap(x.start, x.stop, offset, stop - offset)]
        if not reached:
            return 0, 0
        return reached[0].slot, reached[-1].slot + math.prod(reached[-1].shape)

    def add_at(self, out: Tensor, block: Tensor, offset: int, origin: int) -> None:
        """Add the sketches of the layers that the block overlaps."""
        for layer in self.layers:
            common = overlap(layer.start, layer.stop, offset, block.shape[1])
            if common is None:
                continue
            piece = block[:, common[0] - offset : common[1] - offset]
            low, high = common[0] - layer.start, common[1] - layer.start
            first, last = low // layer.columns, -(-high // layer.columns)
            whole = piece.new_zeros(len(block), (last - first) * layer.columns)
            at = low - first * layer.columns
            whole[:, at : at + piece.shape[1]] = piece
            rows = whole.view(len(block), last - first, layer.columns)
            rows = layer.mix_columns(rows)
            height, width = layer.shape
            slot = layer.slot - origin
            target = out[:, slot : slot + height * width].view(len(block), height, width)
            if layer.left is None:
                target[:, first:last] += rows
            else:
                target += layer.left[:, first:last].to(rows) @ rows


def orthonormal_factor(
    side: int, factor_dim: int, seed: int, index: int
) -> Float[Tensor, "k side"] | None:
    """Random orthonormal rows times sqrt(side / factor_dim), float32 on the CPU; None if not smaller."""
    if side <= factor_dim:
        return None
    generator = item_generator(seed, "projection-factor", index)
    normal = torch.randn(side, factor_dim, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(normal)
    # With the signs of R's diagonal the rows are uniform over all orthonormal frames.
    return ((q * r.diagonal().sign()).mT * math.sqrt(side / factor_dim)).float().contiguous()
