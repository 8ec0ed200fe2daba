"""Convolution weights: per-sample gradients, and sketches that never unfold the input."""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from diffcal.attribution.gradient_parts import Part, by_rows, multiplied, widened
from diffcal.attribution.projection_factorised import LayerSketch

__all__ = ["ConvGeometry", "ConvPart", "sketch_convolution", "unfold", "weight_gradients"]

FEW_ENTRIES = 4  # of a row, from which one call for each row beats a batched product on a CPU
LARGE_ARRAY = 1 << 25  # bytes: memory pages of fresh arrays above cost more than the arithmetic


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel and steps of a convolution of one to three dimensions; padding is symmetric zeros."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    output_padding: tuple[int, ...] | None = None
    """Set for transposed convolutions only."""

    @property
    def is_pointwise(self) -> bool:
        """Kernel of one position, visited everywhere."""
        ones = (1,) * len(self.kernel)
        return (
            self.output_padding is None
            and self.kernel == ones
            and self.stride == ones
            and not any(self.padding)
        )


class ConvPart(Part):
    """Weight [o, i / groups, *kernel] of a convolution, or [i, o / groups, *kernel] transposed.

    Args:
        saved: Input [rows * m, i, *positions], padded already where the padding is not zeros.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        saved: Tensor,
        rows: int,
        geometry: ConvGeometry,
        weight_shape: tuple[int, ...],
    ) -> None:
        super().__init__(name, shape, saved, rows)
        self._geometry, self._weight_shape = geometry, weight_shape
        self._shrunk = self._unfolded = False

    def exact(self, g: Tensor) -> Tensor:
        geometry = self._geometry
        x, g = multiplied(self.saved, g)
        if geometry.is_pointwise and geometry.groups == 1:
            return _summed(widened(g.flatten(2) @ x.flatten(2).mT), self.rows)
        if x.is_cuda and self._can_sketch:
            return _summed(widened(g.flatten(2) @ unfold(x, geometry).mT), self.rows)
        return weight_gradients(x, g, self._weight_shape, geometry, self.rows)

    def counted_input(self, used: Bool[Tensor, "1 o *q"]) -> Float[Tensor, "n i *p"]:
        """The input, each number times the root of how many used outputs have a product with it."""
        geometry, x = self._geometry, widened(self.saved)
        weight = x.new_ones(()).expand(self._weight_shape)
        # The counts are the gradient of the sum of used outputs where all weights are 1.
        counts = _backward(used.to(x.dtype), x[:1], weight, geometry, of_input=True)
        return x * counts.round().sqrt()

    def sides(self, g: Tensor) -> tuple[Float[Tensor, "p o"], Float[Tensor, "p i"]] | None:
        """See :meth:`Part.sides`; None for groups and transposed convolutions."""
        if not self._can_sketch:
            return None
        seen = unfold(widened(self.saved), self._geometry)
        return widened(g).flatten(2).mT.flatten(0, 1), seen.mT.flatten(0, 1)

    @property
    def _can_sketch(self) -> bool:
        return self._geometry.groups == 1 and self._geometry.output_padding is None

    def shrink(self, layer: LayerSketch) -> None:
        if self._can_sketch and layer.right is not None:
            self._saved, self._unfolded = self._seen(layer)
            self._version, self._shrunk = self._saved._version, True

    def _seen(self, layer: LayerSketch) -> tuple[Tensor, bool]:
        return _sketch_input(self.saved, layer.right, layer.taps, self._geometry)

    def sketch(self, g: Tensor, layer: LayerSketch) -> Tensor:
        if not self._can_sketch:
            return super().sketch(g, layer)
        x, unfolded = (self.saved, self._unfolded) if self._shrunk else self._seen(layer)
        return _contract(x, unfolded, g, layer.left, self._geometry, self.rows)


def weight_gradients(
    x: Float[Tensor, "n i *p"],
    g: Float[Tensor, "n o *q"],
    shape: tuple[int, ...],
    geometry: ConvGeometry,
    rows: int,
) -> Float[Tensor, "b ..."]:
    """Weight gradient of each of ``rows`` equal parts of a batch, float32 at least.

    The library's own, of a part at a time: no unfolded copy of the input, and the more entries in a
    row, the nearer to the speed of an ordinary backward pass.
    """
    weight = x.new_empty(1).expand(shape)
    parts = [
        _backward(one_g, one_x, weight, geometry, of_input=False)
        for one_x, one_g in zip(x.tensor_split(rows), g.tensor_split(rows), strict=True)
    ]
    return widened(torch.stack(parts))


def _backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry, *, of_input: bool
) -> Tensor:
    """The library's gradient of the input, or of the weight."""
    found = torch.ops.aten.convolution_backward(
        g,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.output_padding is not None,
        geometry.output_padding or (0,) * len(geometry.kernel),
        geometry.groups,
        (of_input, not of_input, False),
    )
    return found[0 if of_input else 1]


def _summed(entries: Tensor, rows: int) -> Tensor:
    """Sum over the entries of each row."""
    return entries if len(entries) == rows else by_rows(entries, rows).sum(dim=1)


def sketch_convolution(
    x: Float[Tensor, "b i *p"],
    g: Float[Tensor, "b o *q"],
    left: Float[Tensor, "kl o"] | None,
    right: Float[Tensor, "kr i_or_i_kernel"] | None,
    geometry: ConvGeometry,
    taps: int = 1,
) -> Float[Tensor, "b kl kr_taps"]:
    """``left @ G @ right.T`` of each sample's weight gradient G [o, i * kernel], which is not formed.

    With ``taps`` (the positions of the kernel), ``right`` mixes input channels and every position
    keeps its own columns: a product at every position, and the weight gradient of a convolution with
    few channels. With ``taps=1``, ``right`` mixes channels and kernel positions together (in the order
    of the weight): a convolution with ``kr`` output channels. The input is never unfolded.

    Source: LoGra (arXiv:2405.13954) for linear layers; the convolution is ours.
    """
    seen, unfolded = _sketch_input(x, right, taps, geometry)
    return _contract(seen, unfolded, g, left, geometry, len(x))


def _sketch_input(
    x: Tensor, right: Tensor | None, taps: int, geometry: ConvGeometry
) -> tuple[Tensor, bool]:
    """The input seen through ``right``, and whether the kernel's positions are mixed in already."""
    if right is None:
        return x, False
    right = right.to(x.device, x.dtype)
    if taps > 1 or geometry.is_pointwise:
        return (right @ x.flatten(2)).unflatten(2, x.shape[2:]), False
    weight = right.reshape(len(right), x.shape[1], *geometry.kernel)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(geometry.kernel) - 1]
    sketched = convolve(
        x, weight, stride=geometry.stride, padding=geometry.padding, dilation=geometry.dilation
    )
    return sketched.flatten(2), True


def _contract(
    x: Tensor, unfolded: bool, g: Tensor, left: Tensor | None, geometry: ConvGeometry, rows: int
) -> Tensor:
    """Sum over positions and entries of outer products of (sketched) output gradients and inputs."""
    x, g = multiplied(x, g)
    if left is None:
        return _products(x, unfolded, g, geometry, rows)
    left = left.to(g.device)
    small, large = left.shape
    columns = x.shape[1] * (1 if unfolded else prod(geometry.kernel))
    if large * columns <= small * (large + columns):
        wide = _products(x, unfolded, g, geometry, rows)
        return left.to(wide.dtype) @ wide
    mixed = (left.to(g.dtype) @ g.flatten(2)).unflatten(2, g.shape[2:])
    return _products(x, unfolded, mixed, geometry, rows)


def _products(
    x: Tensor, unfolded: bool, g: Tensor, geometry: ConvGeometry, rows: int
) -> Float[Tensor, "b o columns"]:
    entries = len(x) // rows
    if not unfolded and not geometry.is_pointwise and x.device.type == "cpu":
        size = x[0].numel() * prod(geometry.kernel) * len(x) * x.element_size()
        if entries >= FEW_ENTRIES or size > LARGE_ARRAY:
            shape = (g.shape[1], x.shape[1], *geometry.kernel)
            return weight_gradients(x, g, shape, geometry, rows).flatten(2)
    x = x if unfolded else unfold(x, geometry)
    return _summed(widened(g.flatten(2) @ x.mT), rows)


def unfold(x: Float[Tensor, "b i *p"], geometry: ConvGeometry) -> Float[Tensor, "b i_kernel q"]:
    """What each kernel position sees, for every output position, in the order of the weight."""
    if geometry.is_pointwise:
        return x.flatten(2)
    sides = [side for amount in reversed(geometry.padding) for side in (amount, amount)]
    x = F.pad(x, sides) if any(sides) else x
    batch_step, channel_step, *steps = x.stride()
    spans = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, geometry.kernel, strict=True)]
    outputs = [
        (size - span) // stride + 1
        for size, span, stride in zip(x.shape[2:], spans, geometry.stride, strict=True)
    ]
    windows = x.as_strided(
        (*x.shape[:2], *geometry.kernel, *outputs),
        (
            batch_step,
            channel_step,
            *(d * step for d, step in zip(geometry.dilation, steps, strict=True)),
            *(s * step for s, step in zip(geometry.stride, steps, strict=True)),
        ),
        x.storage_offset(),
    )
    return windows.reshape(len(x), x.shape[1] * prod(geometry.kernel), prod(outputs))
