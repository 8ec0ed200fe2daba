"""Convolution weights: per-sample gradients, and sketches that never unfold the input."""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.gradient_parts import Part, by_rows, widened
from diffcal.attribution.projection_factorised import LayerSketch

__all__ = ["ConvGeometry", "ConvPart", "sketch_convolution", "unfold"]


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
        x, g = self.saved, g
        dtype = torch.promote_types(widened(x).dtype, widened(g).dtype)
        x, g = x.to(dtype), g.to(dtype)
        if self._geometry.is_pointwise and self._geometry.groups == 1:
            gradients = g.flatten(2) @ x.flatten(2).mT
        elif x.is_cuda and self._geometry.groups == 1 and self._geometry.output_padding is None:
            gradients = g.flatten(2) @ unfold(x, self._geometry).mT
        else:
            gradients = torch.stack([self._one(x[n : n + 1], g[n : n + 1]) for n in range(len(x))])
        return by_rows(gradients, self.rows).sum(dim=1) if len(x) != self.rows else gradients

    def _one(self, x: Tensor, g: Tensor) -> Tensor:
        geometry = self._geometry
        # The library's own weight gradient of a batch of one: no unfolded copy of the input.
        return torch.ops.aten.convolution_backward(
            g,
            x,
            x.new_empty(1).expand(self._weight_shape),
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.output_padding is not None,
            geometry.output_padding or (0,) * len(geometry.kernel),
            geometry.groups,
            (False, True, False),
        )[1]

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
        sketches = _contract(x, unfolded, g, layer.left, self._geometry)
        return by_rows(sketches, self.rows).sum(dim=1) if len(x) != self.rows else sketches


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
    return _contract(seen, unfolded, g, left, geometry)


def _sketch_input(
    x: Tensor, right: Tensor | None, taps: int, geometry: ConvGeometry
) -> tuple[Tensor, bool]:
    """The input seen through ``right``, and whether the kernel's positions are mixed in already."""
    if right is None:
        return x, False
    right = right.to(x.device, x.dtype)
    if taps > 1 or geometry.is_pointwise:
        return widened(right @ x.flatten(2)).unflatten(2, x.shape[2:]), False
    weight = right.reshape(len(right), x.shape[1], *geometry.kernel)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(geometry.kernel) - 1]
    sketched = convolve(
        x, weight, stride=geometry.stride, padding=geometry.padding, dilation=geometry.dilation
    )
    return widened(sketched.flatten(2)), True


def _contract(
    x: Tensor, unfolded: bool, g: Tensor, left: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """Sum over positions of outer products of (sketched) output gradients and inputs."""
    x = x if unfolded else widened(unfold(x, geometry))
    g = g.flatten(2)
    if left is None:
        return widened(g) @ x.mT
    left = left.to(g.device, g.dtype)
    small, large, columns = len(left), left.shape[1], x.shape[1]
    if large * columns <= small * (large + columns):
        return left.to(x.dtype) @ (widened(g) @ x.mT)
    return widened(left @ g) @ x.mT


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
