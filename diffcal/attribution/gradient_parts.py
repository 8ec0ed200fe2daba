"""What one use of a parameter contributes to per-sample gradients, from input and output gradient.

Every part belongs to one operation (a convolution, a product, a norm) and one parameter. It keeps
what the forward pass saw and, given the gradient of the operation's output, forms the parameter's
per-sample gradient exactly, its factorised sketch without forming it, or its squared norm.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffcal.attribution.projection_factorised import LayerSketch

__all__ = [
    "BroadcastPart",
    "GroupScalePart",
    "NormScalePart",
    "OuterPart",
    "Part",
    "TablePart",
    "by_rows",
    "multiplied",
    "wide_type",
    "widened",
]

PIECE = 1 << 18  # numbers that a CPU takes at once, so that they stay in its cache


def by_rows(tensor: Tensor, rows: int) -> Tensor:
    """``[rows * m, ...]`` as ``[rows, m, ...]``."""
    return tensor.unflatten(0, (rows, -1))


class Part(ABC):
    """Contribution of one operation to the per-sample gradient of one parameter.

    Args:
        name: The parameter.
        shape: Its shape.
        saved: The activation that the forward pass saw, [rows * m, ...], or None.
        rows: Number of rows in the batch.
    """

    def __init__(self, name: str, shape: tuple[int, ...], saved: Tensor | None, rows: int) -> None:
        self.name, self.shape, self.rows = name, shape, rows
        self._saved = saved
        self._version = -1 if saved is None else saved._version
        self.is_sketchable = True
        """Whether :meth:`sketch` of the subclass applies; the gradient is formed where it does not."""

    @property
    def saved(self) -> Tensor:
        """The activation."""
        assert self._saved is not None
        return self._saved

    @property
    def is_changed(self) -> bool:
        """Whether an in-place operation has overwritten the activation since."""
        return self._saved is not None and self._saved._version != self._version

    def keep_copy(self) -> None:
        """Keep a copy of the activation, safe from in-place operations."""
        if self._saved is not None:
            self._saved = self._saved.detach().clone()
            self._version = self._saved._version

    def shrink(self, layer: LayerSketch) -> None:
        """Keep only what :meth:`sketch` needs of the activation, if that is less."""
        return

    @abstractmethod
    def exact(self, g: Tensor) -> Float[Tensor, "b ..."]:
        """Per-sample gradient, of the parameter's shape after the first axis up to flattening."""

    def sketch(self, g: Tensor, layer: LayerSketch) -> Float[Tensor, "b kl kr"]:
        """``left @ gradient @ right.T``, float32 at least."""
        return layer.apply(self.exact(g).reshape(self.rows, layer.rows, layer.columns))

    def squared_norm(self, g: Tensor) -> Float[Tensor, " b"]:
        """Squared L2 norm of :meth:`exact`, float32 at least."""
        return widened(self.exact(g)).reshape(self.rows, -1).square().sum(dim=1)

    def sides(self, g: Tensor) -> tuple[Float[Tensor, "p o"], Float[Tensor, "p i"]] | None:
        """Output gradient and input at every position of all rows, whose outer products add up to the
        gradient of the parameter seen as a matrix; None where it is no such sum."""
        return None


class OuterPart(Part):
    """A sum over positions of outer products: linear layers and matrix products.

    Args:
        saved: Input [rows * m, ..., i].
        transposed: The parameter is [i, o] (``input @ weight``) rather than [o, i].
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        saved: Tensor,
        rows: int,
        transposed: bool = False,
    ) -> None:
        super().__init__(name, shape, saved, rows)
        self._transposed = transposed
        self._shrunk = False

    def _positions(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.rows, -1, tensor.shape[-1])

    def _sides(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Row side and column side of the outer products, [b, s, rows of weight], [b, s, columns]."""
        a, g = self._positions(self.saved), self._positions(g)
        return (a, g) if self._transposed else (g, a)

    def exact(self, g: Tensor) -> Tensor:
        left, right = multiplied(*self._sides(g))
        return widened(left.mT @ right)

    def sides(self, g: Tensor) -> tuple[Float[Tensor, "p o"], Float[Tensor, "p i"]] | None:
        """See :meth:`Part.sides`."""
        left, right = self._sides(g)
        return widened(left.flatten(0, 1)), widened(right.flatten(0, 1))

    def counted_input(self, used: Bool[Tensor, "1 *s o"]) -> Float[Tensor, "n *s i"]:
        """The input, each number times the root of how many used outputs have a product with it."""
        return widened(self.saved) * used.sum(dim=-1, keepdim=True).to(wide_type(self.saved)).sqrt()

    def _factor(self, layer: LayerSketch, of_input: bool) -> Tensor | None:
        return layer.left if of_input == self._transposed else layer.right

    def shrink(self, layer: LayerSketch) -> None:
        factor = self._factor(layer, of_input=True)
        self._saved = _mix(self._positions(self.saved), factor)
        self._version, self._shrunk = self._saved._version, True

    def sketch(self, g: Tensor, layer: LayerSketch) -> Tensor:
        a = self.saved
        if not self._shrunk:
            a = _mix(self._positions(a), self._factor(layer, of_input=True))
        g = _mix(self._positions(g), self._factor(layer, of_input=False))
        left, right = multiplied(*((a, g) if self._transposed else (g, a)))
        return widened(left.mT @ right)

    def squared_norm(self, g: Tensor) -> Tensor:
        left, right = multiplied(*self._sides(g))
        positions, o, i = left.shape[1], left.shape[2], right.shape[2]
        # sum_st (l_s . l_t)(r_s . r_t) needs s^2 (o + i) products, the gradient itself s o i.
        if positions * (o + i) >= o * i:
            return widened(left.mT @ right).flatten(1).square().sum(dim=1)
        return (widened(left @ left.mT) * widened(right @ right.mT)).flatten(1).sum(dim=1)


class BroadcastPart(Part):
    """Biases, scales and shifts: the output gradient (times a factor) summed where it was broadcast.

    Args:
        viewed: Shape in which the parameter met the output, without the row axis.
        factor: What the parameter was multiplied with, [rows * m, ...] or None for a sum.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        viewed: tuple[int, ...],
        factor: Tensor | None,
        rows: int,
    ) -> None:
        super().__init__(name, shape, factor, rows)
        self._viewed = viewed

    def exact(self, g: Tensor) -> Tensor:
        if self._saved is not None:
            g = widened(g) * widened(self.saved)
        g = by_rows(g, self.rows)
        # Axes of the output, counted from the end, over which the parameter was repeated.
        inner = g.ndim - 1
        viewed = (1,) * (inner - len(self._viewed)) + self._viewed
        axes = [axis + 1 for axis in range(inner) if viewed[axis] == 1]
        # The last ones first, in the gradient's own format: a widened copy of all of it would cost
        # more than the sum.
        last = [axis for axis in axes if all(a in axes for a in range(axis, g.ndim))]
        first = [axis for axis in axes if axis not in last]
        g = widened(g.sum(dim=last) if last else g)
        return g.sum(dim=first) if first else g


class NormScalePart(Part):
    """Scale of a normalisation layer: output gradient times normalised input, summed over positions.

    Args:
        normalise: From the layer's input to its output before scale and shift.
        channel_axis: Axis of the channels (batch and group norms), or None where the scale has the
            shape of the last axes (layer and RMS norms).
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        saved: Tensor,
        rows: int,
        normalise: Callable[[Tensor], Tensor],
        channel_axis: int | None,
    ) -> None:
        super().__init__(name, shape, saved, rows)
        self._normalise, self._channel_axis = normalise, channel_axis

    def exact(self, g: Tensor) -> Tensor:
        g = widened(g)
        normal = self._normalise(self.saved.to(g.dtype))
        if self._channel_axis is not None:
            g, normal = g.flatten(2), normal.flatten(2)
            product = torch.linalg.vecdot(g, normal) if g.shape[2:] else g * normal
            return by_rows(product, self.rows).sum(dim=1)
        size = prod(self.shape)
        g, normal = g.reshape(self.rows, -1, size), normal.reshape(self.rows, -1, size)
        return (g * normal).sum(dim=1)


class GroupScalePart(Part):
    """Scale of a group norm, from the statistics that the forward pass computed anyway.

    ``sum g (x - mean) / std`` as two sums, in the order of torch's own backward pass: no second
    normalisation of the input.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        saved: Tensor,
        rows: int,
        mean: Float[Tensor, "n groups"],
        inverse_std: Float[Tensor, "n groups"],
    ) -> None:
        super().__init__(name, shape, saved, rows)
        self._mean, self._inverse_std = mean, inverse_std

    def exact(self, g: Tensor) -> Tensor:
        groups, x = self._mean.shape[1], self.saved
        # On a CPU in pieces that stay in cache.
        size = max(1, PIECE // x[0].numel()) if g.device.type == "cpu" else len(x)
        pairs = zip(g.split(size), x.split(size), strict=True)
        axes, wide = x.ndim - 2, wide_type(g)
        with_input = torch.cat(
            [_over_positions(widened(a) * widened(b), axes, wide) for a, b in pairs]
        )
        alone = _over_positions(g, axes, wide)
        with_input, alone = (t.reshape(len(x), groups, -1) for t in (with_input, alone))
        product = self._inverse_std[..., None] * (with_input - self._mean[..., None] * alone)
        return by_rows(product.flatten(1), self.rows).sum(dim=1)


class TablePart(Part):
    """Embedding tables: the output gradient goes to the row that was looked up.

    Args:
        saved: Integer indices [rows * m, ...].
        padding_index: Row that gets no gradient, or None.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        saved: Int[Tensor, "n *s"],
        rows: int,
        padding_index: int | None,
    ) -> None:
        super().__init__(name, shape, saved, rows)
        self._padding = padding_index

    def _lookups(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """(indices [b, s], output gradients [b, s, d])."""
        index = self.saved.reshape(self.rows, -1)
        g = widened(g).reshape(self.rows, index.shape[1], -1)
        if self._padding is not None:
            g = g.masked_fill((index == self._padding)[..., None], 0)
        return index, g

    def exact(self, g: Tensor) -> Tensor:
        index, g = self._lookups(g)
        out = g.new_zeros(self.rows, *self.shape)
        return out.scatter_add_(1, index[..., None].expand_as(g), g)

    def sketch(self, g: Tensor, layer: LayerSketch) -> Tensor:
        index, g = self._lookups(g)
        g = _mix(g, layer.right)
        if layer.left is None:
            out = g.new_zeros(self.rows, *layer.shape)
            return out.scatter_add_(1, index[..., None].expand_as(g), g)
        return layer.left.to(g.device, g.dtype).mT[index].mT @ g

    def squared_norm(self, g: Tensor) -> Tensor:
        index, g = self._lookups(g)
        same = index[:, :, None] == index[:, None, :]
        return ((g @ g.mT) * same).flatten(1).sum(dim=1)


def _over_positions(tensor: Tensor, axes: int, dtype: torch.dtype) -> Tensor:
    """Sum over the last ``axes`` axes."""
    return tensor.sum(dim=tuple(range(-axes, 0)), dtype=dtype) if axes else tensor.to(dtype)


def wide_type(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return tensor.to(wide_type(tensor))


def multiplied(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of a product in the format in which it is taken: bfloat16 if both are, else wide.

    float16 would overflow: it is widened.
    """
    if left.dtype == right.dtype == torch.bfloat16:
        return left, right
    dtype = torch.promote_types(wide_type(left), wide_type(right))
    return left.to(dtype), right.to(dtype)


def _mix(positions: Tensor, factor: Tensor | None) -> Tensor:
    """The last axis times a factor, in the activation's format."""
    if factor is None:
        return positions
    return positions @ factor.to(positions.device, positions.dtype).mT
